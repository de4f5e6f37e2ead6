"""What recipes of probes share: recall, copying."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs.bases.text import MUON
from research.errors import UserError
from research.train.config import base_config

AROUND_LINEAR_ATTENTION = ("gla", "retention", "deltanet", "gated_deltanet", "cosformer", "performer", "sla")


def probe_argument(recipe: str, arg: str, sizes: Mapping[str, Any]) -> tuple[Any, int]:
    """Reads SIZExSTATE, either part of which may be left out: the entry of `sizes` (by default the first) and the state
    (16).

    Raises:
      UserError: an unknown size, or a state that is no whole number from 1.
    """
    name, _, state = arg.partition("x")
    name = name or next(iter(sizes))
    if name not in sizes or (state and not (state.isdigit() and int(state))):
        example = f"{next(iter(sizes))}x16"
        raise UserError(
            f"{recipe}:{arg} is unknown; valid: SIZE or SIZExSTATE, SIZE one of {', '.join(sizes)}, STATE from 1, "
            f"e.g. {example}"
        )
    return sizes[name], int(state or 16)


def probe_config(dim: int, state: int, *, heads: int = 4, attention_heads: int = 1) -> ml_collections.ConfigDict:
    """Returns what the recipes of probes share: two layers of a mixer alone, fresh examples in every epoch, Muon, an
    end at 99 %.

    Args:
      dim: channels.
      state: features of a head's keys, by which the memory of every mixer but attention grows: mixers around linear
        attention hold state x dim numbers a layer, Mamba and Mamba-2 state x 2 dim, and HGRN, which has no keys, 4 x
        state.
      heads: of the mixers around linear attention and of Mamba-2 and 3, each with keys of its own.
      attention_heads: of attention.
    """
    config = base_config()
    options = {
        kind: {"num_heads": heads, "d_state": state, "head_dim": dim // heads} for kind in AROUND_LINEAR_ATTENTION
    }
    options |= {
        "attention": {"num_heads": attention_heads},
        "hgrn": {"d_inner": 4 * state, "d_conv": 4},
        "mamba": {"d_state": state},
    }
    options |= {
        kind: {"num_heads": heads, "ngroups": heads, "d_state": state, "head_dim": 2 * dim // heads}
        for kind in ("mamba2", "mamba3")
    }
    config.model = {"name": "sequence", "pattern": "attention", "dim": dim, "depth": 2, "unroll": True, **options}
    config.data.options = {"fresh": True}
    config.task.metric = "accuracy"
    config.optim.update(MUON)
    config.train.log_every = "5%"
    config.eval.update({"every": "10%", "batch_size": 250, "stop_at": 0.99})
    config.checkpoint.every = "0"
    config.report.latency = False
    return config

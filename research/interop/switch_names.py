"""One sparse feed-forward block of transformers' Switch (SwitchTransformersSparseMLP), in and out of our names.

Each expert takes the first `expert_capacity` tokens of every sequence that choose it; the others go by it. So it was in
releases up to 4.57 and is again in 5.23 and later. In those between the capacity never binds, and before about 4.51 a
token that found no place came out as it went in, where here and now it comes out as zeros.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.errors import UserError
from research.interop.array_tables import Entry, check, from_foreign_arrays, match, to_foreign_arrays
from research.interop.array_values import check_values
from research.interop.foreign_configs import no_place
from research.modules.moe_options import FAMILIES, Moe
from research.modules.state import Arrays

ROUTER = "router.classifier.weight"
NEEDS = {"expert": "relu", "router": "top_k", "num_experts_per_tok": 1, "num_shared_experts": 0, "renormalize": False,
         "scoring_func": "softmax", "routed_scaling_factor": 1.0, "learned_noise": False,
         "bias_update_rate": 0.0}  # fmt: skip


def switch_entries(experts: int, prefix: str = "") -> list[Entry]:
    """Returns every array of a block of so many experts under both names; ours are those of `MoeFfn`."""
    products = {"wi": "up", "wo": "down"}
    return [
        Entry(f"{prefix}{ROUTER}", ("router",), "linear"),
        *(
            Entry(f"{prefix}experts.expert_{j}.{name}.weight", (own,), "linear", (j,))
            for j in range(experts)
            for name, own in products.items()
        ),
    ]


def switch_from_foreign(
    state: Mapping[str, np.ndarray], prefix: str = "", *, expert_capacity: int = 64
) -> tuple[Moe, Arrays]:
    """Returns (options, parameters of `MoeFfn`) of a block; experts are two products with a ReLU between.

    Args:
      state: foreign name -> array; names without the prefix are passed over.
      prefix: of the block's names, such as "encoder.block.1.layer.1.mlp.".
      expert_capacity: the field of the config.json: places of each expert for the tokens of one sequence.

    Raises:
      UserError: arrays that are missing, unknown or of another shape, or no place at all.
    """
    if expert_capacity < 1:
        raise UserError(f"switch: expert_capacity={expert_capacity}; valid: whole numbers from 1")
    own = {name: w for name, w in state.items() if name.startswith(prefix)}
    router, first = f"{prefix}{ROUTER}", f"{prefix}experts.expert_0.wi.weight"
    if absent := [name for name in (router, first) if name not in own or np.ndim(own[name]) != 2]:
        raise UserError(f"switch: {absent[0]} is missing or no matrix; give the prefix of the block's names")
    (experts, dim), hidden = own[router].shape, own[first].shape[0]
    shapes = {"router": (dim, experts), "up": (experts, dim, hidden), "down": (experts, hidden, dim)}
    table = switch_entries(experts, prefix)
    report = match(table, shapes, {name: w.shape for name, w in own.items()})
    check(report, f"switch: the weights do not fit {experts} experts of {hidden} hidden units for {dim} channels")
    check_values("switch", own)
    spec = dataclasses.replace(
        FAMILIES["switch"],
        num_experts=experts,
        ffn_dim=hidden,
        capacity="fixed",
        capacity_factor=float(expert_capacity),
        eval_capacity_factor=0.0,
    )
    return spec, from_foreign_arrays(table, shapes, own)


def switch_to_foreign(spec: Moe, params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The inverse of `switch_from_foreign`: foreign name -> array.

    Raises:
      UserError: options that the block does not have, by name.
    """
    no_place("switch", spec, NEEDS, "moe.")
    return to_foreign_arrays(switch_entries(spec.num_experts, prefix), params)

"""What recipes of in-context learning share."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs.bases.text import MUON
from research.train.config import base_config

IN_CONTEXT_SIZES = {
    "small": dict(dim=64, depth=4, heads=2, optim={**MUON, "lr": 0.003, "weight_decay": 0.0, "clip_norm": 1.0}),
    "published": dict(
        dim=256,
        depth=12,
        heads=8,
        optim={"name": "adamw", "lr": 1e-4, "weight_decay": 0.0, "schedule": "constant", "warmup": "0"},
    ),
}
"""Of in-context learners: 0.2 M parameters for two cores, and the 9.5 M of Garg et al. 2022 (arXiv 2208.01066) with
their optimizer."""


def in_context_config(task: str, size: str, updates: int, options: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns what the recipes of in-context learning share: a transformer, 64 fresh prompts an update, no latency.

    Args:
      task: name of the function class.
      size: one of `IN_CONTEXT_SIZES`.
      updates: number of updates.
      options: fields of the function class, and the curriculum.
    """
    sizes = IN_CONTEXT_SIZES[size]
    config = base_config()
    config.model = {
        "name": "sequence",
        "pattern": "attention",
        "ffn": "mlp",
        "dim": sizes["dim"],
        "depth": sizes["depth"],
        "unroll": True,
    }
    config.model.attention = {"num_heads": sizes["heads"]}
    config.data.update({"name": f"in_context:{task}", "batch_size": 64})
    config.data.options = {**options, "train_examples": 64_000, "test_examples": 4000, "fresh": True}
    config.optim.update(sizes["optim"])
    config.train.update({"duration": str(updates), "log_every": "2%"})
    config.eval.update({"every": "20%", "batch_size": 500})
    config.checkpoint.every = "50%"
    config.report.latency = False
    return config

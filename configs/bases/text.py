"""What small language recipes share."""

import ml_collections

from research.train.config import base_config

MUON = {"name": "muon", "lr": 0.01, "momentum": 0.95, "weight_decay": 0.05, "schedule": "linear", "warmup": "5%"}
"""Optimizer of the small sequence recipes."""


def text_config(updates: int, *, max_bytes: int) -> ml_collections.ConfigDict:
    """Returns what the small language recipes share: bytes of Python's standard library, windows of 128, Muon, no
    latency.

    Args:
      updates: number of updates.
      max_bytes: how much of the text is taken.
    """
    config = base_config()
    config.data.update({"name": "stdlib_text", "batch_size": 16})
    config.data.options = {"length": 128, "tokenizer": "bytes", "max_bytes": max_bytes}
    config.task.metric = "bits_per_byte"
    config.optim.update(MUON)
    config.train.update({"duration": str(updates), "log_every": "5%"})
    config.eval.update({"every": "0", "batch_size": 64})
    config.checkpoint.update({"every": "0"})
    config.report.latency = False
    return config

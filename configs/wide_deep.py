"""Wide against deep (Wide Attention, arXiv 2210.00640): layers x heads held constant, from the deepest to a single layer.

    make wide-deep
    python -m launch.train --config=configs/wide_deep.py:1 --workdir=runs/wide

Argument: the number of layers, 1, 2, 4 or 8 (default 1), of 8, 4, 2 or 1 heads of 32 features. Any mixer with heads:
--config.model.pattern=gla and the like.
Hardware: two CPU cores, about two minutes a run. Data: the text of Python's standard library, bytes.
"""

from research.errors import UserError
from research.train.config import base_config

LAYERS_TIMES_HEADS, HEAD_DIM = 8, 32


def get_config(arg: str = "1"):
    depth = int(arg or "1") if (arg or "1").isdigit() else 0
    if depth not in (1, 2, 4, 8):
        raise UserError(f"configs/wide_deep.py:{arg} is unknown; valid: 1, 2, 4, 8 layers")
    config = base_config()
    heads = {"heads": LAYERS_TIMES_HEADS // depth, "head_dim": HEAD_DIM}
    config.model = {
        "name": "sequence",
        "pattern": "attention",
        "ffn": "glu",
        "dim": 128,
        "depth": depth,
        "unroll": True,
        "attention": heads,
    }
    config.data.update({"name": "stdlib_text", "batch_size": 16})
    config.data.options = {"length": 128, "tokenizer": "bytes", "max_bytes": 2_000_000}
    config.task.metric = "bits_per_byte"
    config.optim.update({"name": "muon", "lr": 0.01, "momentum": 0.95, "weight_decay": 0.05, "schedule": "linear", "warmup": "5%"})
    config.train.update({"duration": "600", "log_every": "10%"})
    config.eval.update({"every": "0", "batch_size": 64})
    config.checkpoint.update({"every": "0"})
    config.report.latency_batches = (1,)
    return config

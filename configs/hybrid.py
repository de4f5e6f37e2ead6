"""Hybrids: two layers of linear time to one of sliding-window attention, against pure stacks of either.

    make hybrid
    python -m launch.train --config=configs/hybrid.py --workdir=runs/hybrid

Hardware: two CPU cores, ten minutes for the three, one on each core at a time. Numbers to expect: 1.85 bits per byte,
against 1.87 of Mamba-2 alone and 1.95 of windows alone. Data: the text of Python's standard library, bytes. Other
patterns: --config.model.pattern="mamba2 mamba2 attention".
"""

from configs.bases.text import text_config


def get_config():
    config = text_config(600, max_bytes=2_000_000)
    config.model = {
        "name": "hybrid_small",
        "dim": 128,
        "depth": 3,
        "pattern": "mamba2 mamba2 window",
        "ffn": "glu",
        "unroll": True,
        "window": {"num_heads": 4},
    }
    config.expect = {"full": (None, 1.94)}
    config.report.update({"latency": True, "latency_batches": (1,)})
    return config

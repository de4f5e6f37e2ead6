"""Wide against deep (Wide Attention, arXiv 2210.00640): layers x heads held constant, from the deepest to a single
layer.

    make wide-deep
    python -m launch.train --config=configs/wide_deep.py:1 --workdir=runs/wide

Argument: the number of layers, 1, 2, 4 or 8 (default 1), of 8, 4, 2 or 1 heads of 32 features. Any mixer with heads:
--config.model.pattern=gla and the like. Hardware: two CPU cores, nine minutes for all four, one on each core at a time.
Numbers to expect: 2.18, 2.01, 1.96 and 1.95 bits per byte with 1, 2, 4 and 8 layers. Data: the text of Python's
standard library, bytes.
"""

from configs.bases.text import text_config
from research.errors import UserError

LAYERS_TIMES_HEADS, HEAD_DIM = 8, 32


def get_config(arg: str = "1"):
    depth = int(arg or "1") if (arg or "1").isdigit() else 0
    if depth not in (1, 2, 4, 8):
        raise UserError(f"configs/wide_deep.py:{arg} is unknown; valid: 1, 2, 4, 8 layers")
    config = text_config(600, max_bytes=2_000_000)
    heads = {"num_heads": LAYERS_TIMES_HEADS // depth, "head_dim": HEAD_DIM}
    config.model = {
        "name": "sequence",
        "pattern": "attention",
        "ffn": "glu",
        "dim": 128,
        "depth": depth,
        "unroll": True,
        "attention": heads,
    }
    config.expect = {"full": (None, {1: 2.3, 2: 2.1, 4: 2.05, 8: 2.05}[depth])}
    config.report.update({"latency": True, "latency_batches": (1,)})
    return config

"""Four language models in one by the sandwich rule (arXiv 1903.05134), and the small ones draft for the full one
(self-speculative decoding).

    python -m launch.train --config=configs/sandwich_lm.py --workdir=runs/sandwich_lm
    python -m launch.generate --workdir=runs/sandwich_lm --prompt="def " --draft=w50_d50 --temperature=0

Hardware: two CPU cores, 360 s with compiling. Number to expect: 1.79 bits per byte for the full network. Data: the text
of Python's standard library, bytes.
"""

from configs.bases.text import text_config


def get_config():
    config = text_config(600, max_bytes=4_000_000)
    config.model = {
        "name": "sequence",
        "pattern": "hgrn",
        "hgrn": {"d_conv": 4},
        "ffn": "glu",
        "dim": 160,
        "depth": 4,
        "ffn_dim": 320,
        "unroll": True,
    }
    config.nested.points = {"d50": "depth=0.5", "w50": "width=0.5", "w50_d50": "width=0.5,depth=0.5"}
    config.methods = ("sandwich",)
    config.method.sandwich = {"count": 3}
    config.checkpoint.every = "50%"
    config.expect = {"full": (None, 1.88), "smallest_share": 0.83, "networks": 4, "wall_s": (None, 480.0)}
    config.report.update({"latency": True, "latency_batches": (1,)})
    return config

"""A language model on the text of Python's own standard library, byte by byte: nothing to download, a sample at the
end.

    python -m launch.train --config=configs/lm_quickstart.py --workdir=runs/lm_quickstart
    python -m launch.generate --workdir=runs/lm_quickstart --prompt="def " --temperature=0.7

Hardware: two CPU cores, 211 s with compiling. Number to expect: 1.67 bits per byte. The files' names decide the split,
so figures move a little with the version of Python; the digest of the training text stands in the report.
"""

from configs.bases.text import text_config


def get_config():
    config = text_config(900, max_bytes=4_000_000)
    config.model = {
        "name": "sequence",
        "pattern": "hgrn",
        "hgrn": {"d_conv": 4},
        "ffn": "glu",
        "dim": 160,
        "depth": 3,
        "ffn_dim": 320,
        "unroll": True,
    }
    config.report.sample = "def "
    config.expect = {"full": (None, 1.75), "wall_s": (None, 300.0)}
    config.eval.every = config.checkpoint.every = "50%"
    return config

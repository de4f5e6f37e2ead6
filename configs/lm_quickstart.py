"""A language model on the text of Python's own standard library, byte by byte: nothing to download, a sample at the end.

    python -m launch.train --config=configs/lm_quickstart.py --workdir=runs/lm_quickstart
    python -m launch.generate --workdir=runs/lm_quickstart --prompt="def " --temperature=0.7

Hardware: two CPU cores, under five minutes with compiling. The files' names decide the split, so figures move a little with the
version of Python; the manifest's digest stands in the report.
"""

from research.train.config import base_config


def get_config(arg: str = ""):
    del arg
    config = base_config()
    config.model = {
        "name": "sequence",
        "pattern": "hgrn",
        "hgrn": {"taps": 4},
        "ffn": "glu",
        "dim": 160,
        "depth": 3,
        "ffn_dim": 320,
        "unroll": True,
    }
    config.data.update({"name": "stdlib_text", "batch_size": 16})
    config.data.options = {"length": 128, "tokenizer": "bytes", "max_bytes": 4_000_000}
    config.task.metric = "bits_per_byte"
    config.optim.update({"name": "muon", "lr": 0.01, "momentum": 0.95, "weight_decay": 0.05, "schedule": "linear", "warmup": "5%"})
    config.train.update({"duration": "1500", "log_every": "5%"})
    config.eval.update({"every": "50%", "batch_size": 64})
    config.checkpoint.update({"every": "50%"})
    config.report.latency = False
    return config

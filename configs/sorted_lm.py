"""A sorted language model: four networks in one, and the small ones draft for the full one (self-speculative decoding).

    python -m launch.train --config=configs/sorted_lm.py --workdir=runs/sorted_lm
    python -m launch.generate --workdir=runs/sorted_lm --prompt="def " --draft=w50_d50 --temperature=0

Hardware: two CPU cores, about six minutes. Data: the text of Python's standard library, bytes.
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
        "depth": 4,
        "ffn_dim": 320,
        "unroll": True,
    }
    config.data.update({"name": "stdlib_text", "batch_size": 16})
    config.data.options = {"length": 128, "tokenizer": "bytes", "max_bytes": 4_000_000}
    config.task.metric = "bits_per_byte"
    config.nested.update(
        {"scheme": "sandwich", "count": 3, "points": {"d50": "depth=0.5", "w50": "width=0.5", "w50_d50": "width=0.5,depth=0.5"}}
    )
    config.optim.update({"name": "muon", "lr": 0.01, "momentum": 0.95, "weight_decay": 0.05, "schedule": "linear", "warmup": "5%"})
    config.train.update({"duration": "1000", "log_every": "5%"})
    config.eval.update({"every": "0", "batch_size": 64})
    config.checkpoint.update({"every": "50%"})
    config.report.latency_batches = (1,)
    return config

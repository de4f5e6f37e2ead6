"""Recipe of runs of seconds that try methods: digits, a small Transformer without batch norm, two networks in one.

Used as a config file: `--config=tests/methods/tiny.py[:METHOD,METHOD]`.
"""

from research.train.config import base_config

MODEL = {
    "name": "vit_tiny_patch16_224",
    "patch_size": 4,
    "dim": 16,
    "depth": 2,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_dim": 32,
    "unroll": True,
}


def get_config(arg: str = ""):
    config = base_config()
    config.model = dict(MODEL)
    config.data.update({"name": "digits", "batch_size": 32, "validation_fraction": 0.1})
    config.nested.points = {"s": "width=0.5"}
    config.methods = tuple(filter(None, arg.split(",")))
    if "customisation" in config.methods:
        config.model = {"name": "customised", "backbone": dict(MODEL), "budget": 0.9}
        config.data.update({"name": "replay:digits"})
        config.data.options = {"count": 60, "replay_count": 100}
    config.method = {name: {"count": 2} for name in ("sorted", "sandwich")}
    config.optim.update({"lr": 5e-3, "warmup": "0"})
    config.train.update({"duration": "8", "log_every": "1"})
    config.eval.update({"every": "0", "batch_size": 64, "calibrate_batches": 0})
    config.checkpoint.update({"every": "2", "keep_last": 9, "keep_best": False})
    config.report.latency = False
    return config

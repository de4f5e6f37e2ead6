"""Selective copying (Gu and Dao 2023, section 4.1.1): repeat the tokens that stand among noise, in order.

    make selective-copying
    python -m launch.train --config=configs/selective_copying.py --config.model.pattern=mamba --workdir=runs/copying

Arguments: small (16 tokens within length 256), published (within length 4096, 400,000 updates, for bigger machines).
Hardware: two CPU cores; not timed yet; stopped at 99 %.
"""

from research.errors import UserError
from research.train.config import base_config

SIZES = {
    "small": dict(noise=224, train=20_000, batch=32, epochs="6ep"),
    "published": dict(noise=4064, train=640_000, batch=64, epochs="40ep"),
}


def get_config(arg: str = "small"):
    arg = arg or "small"
    if arg not in SIZES:
        raise UserError(f"configs/selective_copying.py:{arg} is unknown; valid: {', '.join(SIZES)}")
    size = SIZES[arg]
    config = base_config()
    config.model = {"name": "sequence", "pattern": "mamba", "dim": 64, "depth": 2, "unroll": True}
    config.data.update({"name": "probe:selective_copying", "batch_size": size["batch"]})
    config.data.options = {"copies": 16, "noise": size["noise"], "train_examples": size["train"], "test_examples": 500, "fresh": True}
    config.task.metric = "accuracy"
    config.optim.update({"name": "adamw", "lr": 2e-3, "weight_decay": 0.0, "warmup": "5%"})
    config.train.update({"duration": size["epochs"], "log_every": "5%"})
    config.eval.update({"every": "10%", "batch_size": 100, "stop_at": 0.99})
    config.checkpoint.update({"every": "0"})
    config.report.latency = False
    return config

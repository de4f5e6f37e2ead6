"""Multi-query associative recall (Zoology, Arora et al. 2023, arXiv 2312.04927): which mixers look up, and with how much state.

    make mqar
    python -m launch.train --config=configs/mqar.py:128 --config.model.pattern=mamba2 --workdir=runs/mqar_one

Arguments: 64 or 128 (length; 4 or 8 pairs, vocabulary 256, for two cores), published (vocabulary 8192, 512 tokens, 64 pairs, for bigger machines).
Hardware: two CPU cores, one to two minutes a run (looks; the sweep is not measured yet). Two layers of the mixer alone, each run stopped at 99 %.
"""

from research.errors import UserError
from research.train.config import base_config

SIZES = {
    "64": dict(vocab_size=256, length=64, pairs=4, train=20_000, batch=64, dim=64, epochs="5ep"),
    "128": dict(vocab_size=256, length=128, pairs=8, train=20_000, batch=64, dim=64, epochs="5ep"),
    "published": dict(vocab_size=8192, length=512, pairs=64, train=100_000, batch=256, dim=128, epochs="64ep"),
}


def get_config(arg: str = "64"):
    arg = arg or "64"
    if arg not in SIZES:
        raise UserError(f"configs/mqar.py:{arg} is unknown; valid: {', '.join(SIZES)}")
    size = SIZES[arg]
    config = base_config()
    config.model = {"name": "sequence", "pattern": "attention", "dim": size["dim"], "depth": 2, "unroll": True}
    config.data.update({"name": "probe:mqar", "batch_size": size["batch"]})
    config.data.options = {
        "vocab_size": size["vocab_size"],
        "length": size["length"],
        "pairs": size["pairs"],
        "train_examples": size["train"],
        "test_examples": 1000,
        "random_non_queries": False,
        "fresh": True,
    }
    config.task.metric = "accuracy"
    config.optim.update({"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "warmup": "10%"})
    config.train.update({"duration": size["epochs"], "log_every": "5%"})
    config.eval.update({"every": "1ep", "batch_size": 250, "stop_at": 0.99})
    config.checkpoint.update({"every": "0"})
    config.report.latency = False
    return config

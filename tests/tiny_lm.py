"""Recipe of a language-model run of seconds, for tests: characters of a text given by --config.data.dir."""

from research.train.config import base_config


def get_config(arg: str = "sandwich"):
    config = base_config()
    config.model = {"name": "sequence", "pattern": "hgrn", "dim": 32, "depth": 2, "hgrn": {"taps": 3}}
    config.data.update({"name": "text", "batch_size": 8})
    config.data.options = {"length": 24, "tokenizer": "chars"}
    config.nested.update({"scheme": arg, "count": 2, "points": {"s": "width=0.5"}})
    config.optim.update({"name": "muon", "lr": 2e-2, "momentum": 0.9, "warmup": "2"})
    config.train.update({"duration": "40", "log_every": "4"})
    config.eval.update({"every": "20", "batch_size": 16})
    config.checkpoint.update({"every": "20"})
    config.report.latency = False
    return config

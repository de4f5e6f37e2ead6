"""The recipe of the old run `image` as it is said today."""

from tests import tiny


def get_config(arg: str = ""):
    del arg
    config = tiny.get_config("sandwich")
    config.methods = ("sandwich", "ema")
    config.method = {"sandwich": {"count": 2, "distill": 0.75}, "ema": {"decay": 0.9}}
    config.train.duration = "12"
    config.eval.every = "6"
    config.checkpoint.every = "6"
    return config

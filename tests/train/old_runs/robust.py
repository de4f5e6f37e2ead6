"""The recipe of the old run `robust` as it is said today."""

from tests import tiny_robust


def get_config(arg: str = ""):
    del arg
    config = tiny_robust.get_config("advmoe")
    config.checkpoint.every = "4"
    return config

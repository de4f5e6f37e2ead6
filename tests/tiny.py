"""Recipe of a run of seconds, for tests: digits, a UniRepLKNet of two stages, two networks in one.

Used as a config file: `--config=tests/tiny.py[:SCHEME]`.
"""

from research.train.config import base_config


def get_config(arg: str = "all"):
    config = base_config()
    config.model = {
        "name": "unireplknet_a",
        "depths": (1, 1),
        "dims": (8, 16),
        "kernel_sizes": ((3,), (3,)),
        "stem_strides": (2, 1),
        "layer_scale_init_value": 0.5,
    }
    config.data.update({"name": "digits", "batch_size": 32, "validation_fraction": 0.1})
    config.data.augment = {"crop_padding": 1}
    config.nested.points = {"s": "width=0.5"}
    config.methods = () if arg == "full" else (arg,)
    config.optim.update({"lr": 2e-2, "warmup": "2"})
    config.train.update({"duration": "24", "log_every": "1"})
    config.eval.update({"every": "8", "batch_size": 60, "calibrate_batches": 2})
    config.checkpoint.update({"every": "4", "keep_last": 3, "keep_best": False})
    config.report.latency = False
    return config

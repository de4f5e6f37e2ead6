"""Recipe of robust runs of seconds, for tests: digits, a mixture of two convolutional pathways.

Used as a config file: `--config=tests/tiny_robust.py[:METHOD[,METHOD]]`, attacks beside one method unless a comma
follows it.
"""

from research.train.config import base_config


def get_config(arg: str = "advmoe"):
    config = base_config()
    router = {"router_dims": (4,), "router_depths": (1,)}
    config.model = {
        "name": "advmoe_resnet18",
        "depths": (1, 1),
        "dims": (4, 8),
        "stem_dim": 8,
        "num_experts": 2,
        "implementation": "all",
        **router,
    }
    config.data.update({"name": "digits", "batch_size": 32})
    own, *more = arg.split(",")
    config.methods = (own, *filter(None, more or ["attacks"]))
    config.method[own] = {"epsilon": 0.1, "steps": 1, "step_size": 0.1, "eval_steps": 1}
    if "attacks" in config.methods:
        config.method.attacks = {"names": ("pgd1", "apgd_dlr"), "examples": 70, "steps": 2}
    config.optim.update({"name": "sgd", "lr": 0.05, "nesterov": False, "weight_decay": 5e-4, "warmup": "0"})
    config.train.update({"duration": "8", "log_every": "1"})
    config.eval.update({"every": "4", "batch_size": 60, "calibrate_batches": 0})
    config.checkpoint.update({"every": "3", "keep_last": 3, "keep_best": False})
    config.report.latency = False
    return config

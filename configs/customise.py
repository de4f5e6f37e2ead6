"""LeNet-5 reads simulated handwriting: the global expert of a customisation, trained on a population of writers.

    python -m launch.train --config=configs/customise.py --workdir=runs/customise
    python -m launch.customise --workdir=runs/customise --out=results/customise
    python -m launch.train --config=configs/customise.py:user0 --workdir=runs/customise_user0

Arguments: everybody (the default), or user0 to user9 for one user's customisation in the training loop (method
customisation: the user's images and a replay of everybody's in every batch), from the run runs/customise. Hardware: two
CPU cores, 33 to 116 s with others at work on them. Number to expect: 98.9 % on the population's 360 test images. The
second command makes the network ten users' own (simulated writers, research/data/handwriting.py) within 2.5 % of its
parameters and operations: 72.2 % to 85.3 % on their test images, mean of the ten, and 98.9 % to 98.8 % on the
population's.
"""

from research.errors import UserError
from research.train.config import base_config

USERS = [f"user{user}" for user in range(10)]
OWN, REPLAY = 200, 1080
"""Images of the user, and of everybody, that he is customised with: all of them are a batch."""


def get_config(arg: str = "everybody"):
    arg = arg or "everybody"
    if arg not in ("everybody", *USERS):
        raise UserError(f"configs/customise.py:{arg} is unknown; valid: everybody, {USERS[0]} to {USERS[-1]}")
    return everybody() if arg == "everybody" else customised(USERS.index(arg))


def customised(user: int):
    config = base_config()
    config.model = {"name": "customised", "backbone": "lenet5"}
    config.data.update({"name": "replay:handwriting", "batch_size": OWN + REPLAY})
    config.data.options = {"own": {"user": user}, "count": OWN, "replay_count": REPLAY}
    config.methods = ("customisation",)
    config.method.customisation = {"source": "runs/customise"}
    config.optim.update({"name": "adamw", "lr": 0.02, "weight_decay": 0.01, "warmup": "0"})
    config.train.update({"duration": "1600", "log_every": "5%"})
    config.eval.update({"every": "0"})
    config.checkpoint.update({"every": "25%"})
    config.report.latency = False
    return config


def everybody():
    config = base_config()
    config.model = {"name": "lenet5"}
    config.data.update({"name": "handwriting", "batch_size": 64})
    config.optim.update({"name": "adamw", "lr": 3e-3, "weight_decay": 0.05, "warmup": "5%"})
    config.train.update({"duration": "40ep", "log_every": "5%"})
    config.eval.update({"every": "50%"})
    config.checkpoint.update({"every": "0"})
    config.report.latency = False
    config.expect = {"full": 0.95, "wall_s": (None, 180.0)}
    return config

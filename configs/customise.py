"""LeNet-5 reads simulated handwriting: the global expert of a customisation, trained on a population of writers.

    python -m launch.train --config=configs/customise.py --workdir=runs/customise
    python -m launch.customise --workdir=runs/customise --out=results/customise

Hardware: two CPU cores, 116 s with others at work on them. Number to expect: 98.6 % on the population's 360 test
images. The second command makes the network ten users' own (simulated writers, research/data/handwriting.py) within 2.5
% of its parameters and operations: 72.0 % to 85.4 % on their test images, mean of the ten, and 98.6 % to 98.4 % on the
population's.
"""

from research.train.config import base_config


def get_config(arg: str = ""):
    del arg
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

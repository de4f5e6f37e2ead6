"""HMoDE counts digits scattered on a canvas: a small encoder, seven density maps, gates at every pixel; fresh images in
every epoch.

    python -m launch.reproduce --config=configs/counting.py --workdir=runs/counting --out=results/counting

Hardware: two CPU cores, 48 s. The metric is the mean absolute error of the count on 200 images of up to 40
digits, of test digits that were not trained on. Number to expect: 1.8.
`configs/counting.py:local` adds the relative local counting loss.
"""

from research.errors import UserError
from research.train.config import base_config


def get_config(arg: str = ""):
    if arg not in ("", "local"):
        raise UserError(f"counting:{arg} is unknown; valid: local")
    config = base_config()
    config.model = {"name": "hmode", "dims": (8, 16, 32, 32, 32), "depths": (1, 1, 2, 2, 2), "head_dim": 16}
    config.data.update({"name": "counting", "batch_size": 16})
    config.data.options = {"train_examples": 1600, "test_examples": 200, "fresh": True}
    config.task.local_counting = 0.001 if arg == "local" else 0.0
    config.optim.update({"name": "adamw", "lr": 2e-3, "weight_decay": 0.01, "warmup": "5%"})
    config.train.update({"duration": "4ep", "log_every": "5%"})
    config.eval.update({"every": "50%", "batch_size": 50, "calibrate_batches": 8})
    config.checkpoint.update({"every": "0"})
    config.report.latency = False
    config.expect = {"full": (None, 2.5), "wall_s": (None, 300.0)}
    return config

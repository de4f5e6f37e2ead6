"""Nine networks in one on scikit-learn's digits: the first thing to run.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

    # its acceptance criteria, judged
    python -m launch.reproduce --config=configs/quickstart.py --seeds=0,1,2 --workdir=runs/reproduce

Hardware: two CPU cores, less than two minutes, most of them compiling. Number to expect: 99 % for the full network.
Data: 1,293 training, 144 validation and 360 test images of 8x8 pixels, inside scikit-learn.
"""

from configs.bases.images import NINE_NETWORKS
from research.train.config import base_config


def get_config():
    config = base_config()
    config.model = {
        "name": "unireplknet_a",
        "depths": (1, 2),
        "dims": (16, 48),
        "kernel_sizes": ((3,), (7,)),
        "stem_strides": (1, 1),
        "layer_scale_init_value": 0.1,
        "unroll": True,
        # On maps of 8x8 pixels compiling counts for more than a step, and this implementation compiles quickest.
        "implementation": "depthwise_conv2d=toeplitz",
    }
    config.data.update({"name": "digits", "batch_size": 64, "augment": {"mean": (0.3,), "std": (0.37,)}})
    config.task.update({"label_smoothing": 0.1})
    config.nested.points = NINE_NETWORKS
    config.methods = ("sandwich",)
    config.method.sandwich = {"count": 3}
    config.optim.update({"name": "adamw", "lr": 3e-3, "weight_decay": 0.05, "warmup": "10%"})
    config.train.update({"duration": "30ep"})
    config.eval.update({"every": "50%"})
    config.checkpoint.update({"every": "25%"})
    config.report.latency_batches = (1,)
    config.expect = {
        "full": 0.975,
        "smallest_share": 0.96,
        "smallest_flops": (None, 0.25),
        "networks": 9,
        "wall_s": (None, 120.0),
    }
    return config

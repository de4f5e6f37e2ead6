"""Nine networks in one on scikit-learn's digits: the first thing to run.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: two CPU cores. Data: 1,293 training, 144 validation and 360 test images of 8x8 pixels, inside scikit-learn.
"""

from research.train.config import base_config


def get_config(arg: str = ""):
    del arg
    config = base_config()
    config.model = {
        "name": "unireplknet_a",
        "depths": (1, 2),
        "dims": (24, 64),
        "kernels": ((3,), (7,)),
        "stem_strides": (1, 1),
        "layer_scale": 0.1,
    }
    config.data.update({"name": "digits", "batch_size": 128, "augment": {"crop_padding": 1, "mean": (0.3,), "std": (0.37,)}})
    config.task.update({"label_smoothing": 0.1})
    config.nested.update(
        {
            "scheme": "sandwich",
            "count": 4,
            "points": {
                "w75": "width=0.75",
                "w75_d50": "width=0.75,depth=0.5",
                "w75_f50": "width=0.75,ffn=0.5",
                "f50": "ffn=0.5",
                "w50": "width=0.5",
                "w50_d50": "width=0.5,depth=0.5",
                "w50_f50": "width=0.5,ffn=0.5",
                "w50_d50_f50": "width=0.5,depth=0.5,ffn=0.5",
            },
        }
    )
    config.optim.update({"name": "adamw", "lr": 4e-3, "weight_decay": 0.05, "warmup": "10%"})
    config.train.update({"duration": "50ep"})
    config.eval.update({"every": "50%"})
    config.checkpoint.update({"every": "25%"})
    return config

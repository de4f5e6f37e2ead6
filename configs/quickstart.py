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
        "depths": (1, 1, 2, 1),
        "dims": (16, 32, 48, 64),
        "kernels": ((3,), (7,), (7,), (3,)),
        "stem_strides": (1, 1),
        "layer_scale": 0.1,
        "unroll": True,
    }
    config.data.update({"name": "digits", "batch_size": 128, "augment": {"crop_padding": 1, "mean": (0.3,), "std": (0.37,)}})
    config.nested.update(
        {
            "scheme": "sandwich",
            "count": 4,
            "points": {
                "xl": "width=0.75",
                "l": "width=0.75,depth=0.5",
                "m": "width=0.5",
                "m_thin": "width=0.5,ffn=0.5",
                "s": "width=0.5,depth=0.5",
                "s_thin": "width=0.5,depth=0.5,ffn=0.5",
                "xs": "width=0.25",
                "xxs": "width=0.25,depth=0.5",
            },
        }
    )
    config.optim.update({"name": "adamw", "lr": 4e-3, "weight_decay": 0.05, "warmup": "10%"})
    config.train.update({"duration": "20ep"})
    config.eval.update({"every": "50%"})
    config.checkpoint.update({"every": "25%"})
    return config

"""UniRepLKNet-T on ImageNet-1K with the hyper-parameters of the paper (arXiv 2311.15599; released command line of the
official repository).

    python -m launch.prepare --dataset=tfds:imagenet2012 --from=DIR_WITH_THE_TAR_FILES
    python -m launch.train --config=configs/imagenet_unireplknet_t.py --workdir=DIR                       # one network
    # many-in-one, sandwich rule
    python -m launch.train --config=configs/imagenet_unireplknet_t.py:sandwich --workdir=DIR
    # two steps, synthetic data
    python -m launch.train --config=configs/imagenet_unireplknet_t.py:shrunken --workdir=runs/try

Where it differs from the released recipe: random crops are taken from images that were resized to 256 pixels, not from
the originals; random erasing fills its box with the mean colour, not with random pixels; RandAugment has the operations
of its paper (timm's `rand-m9-mstd0.5-inc1` adds invert and solarize-add); 1 % of the training images are kept for
validation; float32 sums under bfloat16 instead of PyTorch's mixed precision; GRN's vectors are decayed by a rule of
this file.

Hardware: a pod or several GPUs; 300 epochs at batch 4096, bfloat16. Not run here. Number of the released recipe: 83.2 %
top-1 (README of the official repository). `shrunken` runs on a laptop in two minutes and checks the plumbing only.
"""

from research.errors import UserError
from research.train.config import base_config


def get_config(arg: str = ""):
    if arg not in ("", "sandwich", "shrunken"):
        raise UserError(f"config argument {arg!r}; valid: sandwich, shrunken")
    config = base_config()
    config.model = {"name": "unireplknet_t", "drop_path_rate": 0.2}
    config.data.update({"name": "tfds:imagenet2012", "batch_size": 4096, "validation_fraction": 0.01})
    config.data.options = {"train_split": "train", "test_split": "validation", "image_size": 256}
    config.data.augment = {
        "resized_crop": 224,
        "flip": True,
        "randaugment": (2, 9),
        "random_erasing": 0.25,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    config.task.update({"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "switch": 0.5})
    # Vectors and biases are not decayed; the reference keeps GRN's vectors as 4-D arrays, so they are.
    config.optim.update({"name": "adamw", "lr": 4e-3, "weight_decay": 0.05, "warmup": "20ep", "final_lr": 1e-6})
    config.optim.decay_rules = ((r"/grn/", 1.0), (r"\|[^,]*$", 0.0), (".*", 1.0))
    config.train.update({"duration": "300ep", "precision": "bfloat16", "remat": "dots", "log_every": "100"})
    config.eval.update({"every": "5ep", "batch_size": 4000})
    config.checkpoint.update({"every": "1ep", "keep_every": 0})
    if arg == "sandwich":
        config.nested.points = {"m": "width=0.75", "s": "width=0.5", "xs": "width=0.5,depth=0.5"}
        config.methods = ("sandwich",)
        config.method.sandwich = {"count": 4}
    if arg == "shrunken":
        config.model = {
            "name": "unireplknet_t",
            "drop_path_rate": 0.2,
            "dims": (8, 12, 16, 24),
            "depths": (3, 3, 4, 3),
            "image_size": 64,
        }
        config.data.update({"name": "synthetic", "batch_size": 16, "validation_fraction": 0.25})
        config.data.options = {"image_size": 96, "channels": 3, "examples": 64, "test_examples": 16}
        config.data.augment.resized_crop = 64
        config.optim.warmup = "1"
        config.train.update({"duration": "2", "log_every": "1"})
        config.eval.update({"every": "0", "batch_size": 16, "calibrate_batches": 2})
        config.checkpoint.every = "0"
        config.report.latency = False
    return config

"""AdvMoE at the size of its paper (Zhang et al. 2023, arXiv 2308.10110): CIFAR-10, two pathways of half the width.

    python -m launch.train --config=configs/cifar10_advmoe.py:resnet18 --workdir=runs/cifar10_advmoe
    python -m launch.train --config=configs/cifar10_advmoe.py:dense --workdir=runs/cifar10_dense

The argument is resnet18, vgg16, wrn28_10 (mixtures, trained in alternation), or dense (ResNet-18 of full width,
TRADES). As released: 100 epochs of batches of 128 with two updates each, SGD with momentum 0.9, weight decay 5e-4 on
every parameter, learning rate 0.1 by a cosine, attacks of 8/255 in 2 steps of 5/255, beta = alpha = 6, no
normalisation. Not as released: the best checkpoint is chosen on held-out training images, the router's loss cannot
become NaN, attacks follow the gradient of the function instead of the router's straight-through gate, and each phase
attacks its own loss; --config.method.advmoe.through_gate=True --config.method.advmoe.shared_attack=True are the
released ones.

Hardware: one accelerator; not run here. Data: `tfds:cifar10`, see `python -m launch.prepare --helpshort`. To expect,
as commonly quoted for the paper: robust accuracy 51.8 % (AdvMoE) against 50.1 % (dense) under PGD-50.
"""

from research.errors import UserError
from research.train.config import base_config

MODELS = {
    "resnet18": "advmoe_resnet18",
    "vgg16": "advmoe_vgg16",
    "wrn28_10": "advmoe_wrn28_10",
    "dense": "resnet18_cifar",
}


def get_config(arg: str = "resnet18"):
    if arg not in MODELS:
        raise UserError(f"cifar10_advmoe:{arg} is unknown; valid: {', '.join(MODELS)}")
    config = base_config()
    config.model = {"name": MODELS[arg]}
    config.data.update({"name": "tfds:cifar10", "batch_size": 128, "validation_fraction": 0.02})
    config.data.augment = {"crop_padding": 4, "flip": True}
    method = "trades" if arg == "dense" else "advmoe"
    config.methods = (method, "attacks")
    config.method[method] = {"eval_steps": 10}
    config.method.attacks = {"names": ("pgd50", "apgd_ce", "apgd_t", "apgd"), "examples": 10_000}
    config.optim.update({"name": "sgd", "lr": 0.1, "nesterov": False, "weight_decay": 5e-4, "warmup": "0"})
    config.optim.decay_rules = ((".*", 1.0),)
    config.train.update({"duration": "100ep", "log_every": "0.1%"})
    config.eval.update({"every": "5%", "calibrate_batches": 0})
    config.checkpoint.every = "5%"
    return config

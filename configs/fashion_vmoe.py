"""A vision Transformer with mixtures of experts in every second block (V-MoE, arXiv 2106.05974) against the dense one
of the same active FLOPs.

    make fashion-vmoe
    python -m launch.train --config=configs/fashion_vmoe.py:moe --workdir=runs/fashion_vmoe

Argument: dense; moe (8 experts, top-2 with noise, importance and load losses, batch priority and a capacity of 1.05);
soft (Soft MoE). Hardware: two CPU cores, one for each of two runs; 52 minutes for all six with others at work on them.
Numbers to expect over three seeds (results/fashion_vmoe): 86.0 % of the test images against 85.2 % of the dense
network, better with every seed, and no expert dead. Data: `dataset-fashion-mnist` of Debian, or any folder with the
four IDX files.
"""

from dataclasses import asdict, replace

from research.errors import UserError
from research.modules.moe_options import FAMILIES
from research.train.config import base_config

DIM, HIDDEN = 96, 384
MIXTURES = {
    "moe": replace(FAMILIES["v_moe"], ffn_dim=HIDDEN // 2, priority=True, eval_capacity_factor=0.0),
    "soft": replace(FAMILIES["soft"], ffn_dim=HIDDEN, slots_per_expert=2),
}


def get_config(arg: str = "moe"):
    arg = arg or "moe"
    if arg not in ("dense", *MIXTURES):
        raise UserError(f"configs/fashion_vmoe.py:{arg} is unknown; valid: dense, {', '.join(MIXTURES)}")
    config = base_config()
    config.model = {
        "name": "vit_tiny_patch16_224",
        "dim": DIM,
        "depth": 4,
        "num_heads": 4,
        "head_dim": 24,
        "patch_size": 7,
        "unroll": True,
    }
    config.model.mlp_dim = HIDDEN
    if arg != "dense":
        config.model.update({"ffn": "mlp moe", "moe": asdict(MIXTURES[arg])})
    config.data.update({"name": "fashion_mnist", "batch_size": 128, "validation_fraction": 0.05})
    config.data.augment = {"crop_padding": 1, "flip": True, "mean": (0.286,), "std": (0.353,)}
    config.optim.update({"name": "adamw", "lr": 2e-3, "weight_decay": 0.05, "warmup": "5%"})
    config.train.update({"duration": "4ep", "log_every": "2%"})
    config.eval.update({"every": "0"})
    config.checkpoint.update({"every": "0"})
    config.report.update({"latency": False})
    config.expect = {"dense": {"full": 0.845}, "moe": {"full": 0.853, "dead_experts": (None, 0.0)}}.get(arg, {})
    return config

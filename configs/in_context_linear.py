"""In-context linear regression (Garg et al. 2022, arXiv 2208.01066): the trained model against least squares, ridge and gradient descent.

    python -m launch.in_context --config=configs/in_context_linear.py --workdir=runs/in_context_linear --out=results/in_context_linear

Arguments: small (5 dimensions, 0.2 M parameters, 6,000 updates), published (20 dimensions, 9.5 M parameters, 500,000 updates).
Hardware: two CPU cores, 219 s for the small one. Any mixer: --config.model.pattern=mamba2; any task: --config.data.name=in_context:dnf.
"""

from research.errors import UserError
from research.train.config import base_config

SIZES = {
    "small": dict(dims=5, points=11, dim=64, depth=4, heads=2, updates="6000", lr=1e-3),
    "published": dict(dims=20, points=41, dim=256, depth=12, heads=8, updates="500001", lr=1e-4),
}


def get_config(arg: str = "small"):
    arg = arg or "small"
    if arg not in SIZES:
        raise UserError(f"configs/in_context_linear.py:{arg} is unknown; valid: {', '.join(SIZES)}")
    size = SIZES[arg]
    config = base_config()
    config.model = {
        "name": "sequence",
        "pattern": "attention",
        "ffn": "mlp",
        "dim": size["dim"],
        "depth": size["depth"],
        "attention": {"heads": size["heads"]},
        "unroll": True,
    }
    config.data.update({"name": "in_context:linear", "batch_size": 64})
    config.data.options = {"dims": size["dims"], "points": size["points"], "train_examples": 64_000, "test_examples": 4000, "fresh": True}
    config.optim.update({"name": "adamw", "lr": size["lr"], "weight_decay": 0.0, "warmup": "2%", "clip_norm": 1.0})
    config.train.update({"duration": size["updates"], "log_every": "2%"})
    config.eval.update({"every": "20%", "batch_size": 500})
    config.checkpoint.update({"every": "50%"})
    config.report.latency = False
    return config

"""In-context linear regression (Garg et al. 2022, arXiv 2208.01066): the trained model against least squares, ridge and gradient descent.

    python -m launch.in_context --config=configs/in_context_linear.py --workdir=runs/in_context_linear --out=results/in_context_linear

Arguments: small (5 dimensions, 0.2 M parameters, 20,000 updates of Muon), published (20 dimensions, 9.5 M parameters, 500,001 updates
of Adam with the paper's curriculum).
Hardware: two CPU cores, TIME for the small one. Any mixer: --config.model.pattern=mamba2; any task: --config.data.name=in_context:dnf.
"""

from research.errors import UserError
from research.train.config import MUON, base_config

ADAM = {"name": "adamw", "lr": 1e-4, "weight_decay": 0.0, "schedule": "constant", "warmup": "0"}
CURRICULUM = {"every": 2, "dims": (5, 1), "points": (11, 2)}
"""Of the published recipe: one coordinate and two points more every 2,000 updates."""
SIZES = {
    "small": dict(dims=5, points=11, dim=64, depth=4, heads=2, updates="20000", optim={**MUON, "lr": 0.003, "weight_decay": 0.0}),
    "published": dict(dims=20, points=41, dim=256, depth=12, heads=8, updates="500001", optim=ADAM),
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
    if arg == "published":
        config.data.options.curriculum = CURRICULUM
    config.optim.update({"clip_norm": 1.0, **size["optim"]})
    config.train.update({"duration": size["updates"], "log_every": "2%"})
    config.eval.update({"every": "20%", "batch_size": 500})
    config.checkpoint.update({"every": "50%"})
    config.report.latency = False
    return config

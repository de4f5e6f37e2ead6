"""In-context linear regression (Garg et al. 2022, arXiv 2208.01066): the trained model against least squares, ridge and
gradient descent.

    python -m launch.in_context --config=configs/in_context_linear.py --workdir=runs/in_context_linear \\
        --out=results/in_context_linear

Arguments: small (5 dimensions, 0.2 M parameters, 20,000 updates of Muon), published (20 dimensions, 9.5 M parameters,
500,001 updates of Adam with the paper's curriculum). Hardware: one CPU core, 1448 s for the small one. Any mixer:
--config.model.pattern=mamba2; any task: --config.data.name=in_context:noisy_linear.
"""

from configs.bases.in_context import in_context_config
from research.errors import UserError

CURRICULUM = {"every": 2, "dims": (5, 1), "points": (11, 2)}
"""One coordinate and two points more every two epochs of 1,000 updates."""
SIZES = {
    "small": dict(updates=20_000, options={"dims": 5, "points": 11}),
    "published": dict(updates=500_001, options={"dims": 20, "points": 41, "curriculum": CURRICULUM}),
}


def get_config(arg: str = "small"):
    arg = arg or "small"
    if arg not in SIZES:
        raise UserError(f"configs/in_context_linear.py:{arg} is unknown; valid: {', '.join(SIZES)}")
    return in_context_config("linear", arg, **SIZES[arg])

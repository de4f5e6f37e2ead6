"""Images read as sequences, pixel by pixel (Le et al. 2015, arXiv 1504.00941; Tay et al. 2020, arXiv 2011.04006):
classifiers of linear cost.

    python -m launch.train --config=configs/pixel_sequences.py --workdir=runs/pixels
    python -m launch.reproduce --config=configs/pixel_sequences.py --seeds=0 --workdir=runs/reproduce_pixels \\
        --out=results/pixel_sequences
    python -m launch.sweep --config=configs/pixel_sequences.py --grid=model.pattern=mamba2,gla,hgrn,attention \\
        --workdir=runs/pixels_sweep

Arguments: digits (64 pixels of scikit-learn's digits), fashion (Fashion-MNIST as 196 patches of 2x2). Hardware: two CPU
cores, 76 s for the digits: 96.4 % of the 360 test images (one seed; Fashion-MNIST was not trained to its end). Any
mixer: --config.model.pattern=gla.
"""

from configs.bases.text import MUON
from research.errors import UserError
from research.train.config import base_config

SIZES = {
    "digits": dict(data="digits", side=1, dim=64, batch=64, duration="30ep"),
    "fashion": dict(data="fashion_mnist", side=2, dim=64, batch=64, duration="2ep"),
}


def get_config(arg: str = "digits"):
    arg = arg or "digits"
    if arg not in SIZES:
        raise UserError(f"configs/pixel_sequences.py:{arg} is unknown; valid: {', '.join(SIZES)}")
    size = SIZES[arg]
    config = base_config()
    config.model = {"name": "mamba2_small", "dim": size["dim"], "depth": 2, "mamba2": {"d_state": 32}, "unroll": True}
    config.data.update({"name": size["data"], "batch_size": size["batch"]})
    config.data.augment = {"sequence": size["side"], "mean": 0.5, "std": 0.5}
    config.optim.update(MUON)
    config.train.update({"duration": size["duration"], "log_every": "5%"})
    config.eval.update({"every": "20%", "batch_size": 180})
    config.checkpoint.every = "50%"
    config.report.latency = False
    if arg == "digits":
        config.expect = {"full": (0.945, None), "wall_s": (None, 300.0)}
    return config

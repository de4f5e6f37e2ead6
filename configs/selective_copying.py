"""Selective copying (Gu and Dao 2023, section 4.1.1): repeat the tokens that stand among noise, in order.

    make selective-copying
    python -m launch.train --config=configs/selective_copying.py:smallx16 --config.model.pattern=mamba --workdir=runs/copying

Arguments: SIZExSTATE. Sizes: small (8 tokens within length 256), published (16 within length 4096, 400,000 updates, for bigger machines).
STATE: as in configs/mqar.py; default 16.
Hardware: two CPU cores, one and a half to eight minutes a run on one of them. Two layers of the mixer alone, fresh examples in every epoch, each run stopped at 99 %.
"""

from research.errors import UserError
from research.train.config import probe_config

SIZES = {
    "small": dict(copies=8, length=256, train=20_000, batch=16, updates="1500"),
    "published": dict(copies=16, length=4096, train=640_000, batch=64, updates="40ep"),
}


def get_config(arg: str = "smallx16"):
    name, _, state = (arg or "small").partition("x")
    if name not in SIZES or not (state or "16").isdigit():
        raise UserError(
            f"configs/selective_copying.py:{arg} is unknown; valid: SIZExSTATE with SIZE one of {', '.join(SIZES)}, e.g. smallx16"
        )
    size = SIZES[name]
    config = probe_config(64, int(state or 16))
    config.data.update({"name": "probe:selective_copying", "batch_size": size["batch"]})
    config.data.options.update({"copies": size["copies"], "length": size["length"], "train_examples": size["train"], "test_examples": 500})
    config.train.duration = size["updates"]
    config.eval.batch_size = 100
    return config

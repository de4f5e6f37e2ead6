"""Selective copying (Gu and Dao 2023, section 4.1.1): repeat the tokens that stand among noise, in order.

    make selective-copying
    python -m launch.train --config=configs/selective_copying.py:smallx16 --config.model.pattern=mamba \\
        --workdir=runs/copying

Arguments: SIZExSTATE. Sizes: small (8 tokens within length 256), published (16 within length 4096, 400,000 updates, for
bigger machines). STATE: as in configs/mqar.py; default 16. Hardware: two CPU cores, one and a half to eight minutes a
run on one of them. Two layers of the mixer alone, fresh examples in every epoch, each run stopped at 99 %.
"""

from configs.bases.probes import probe_argument, probe_config

SIZES = {
    "small": dict(copies=8, length=256, train=20_000, batch=16, updates="1500"),
    "published": dict(copies=16, length=4096, train=640_000, batch=64, updates="40ep"),
}


def get_config(arg: str = ""):
    size, state = probe_argument("configs/selective_copying.py", arg, SIZES)
    config = probe_config(64, state)
    config.data.update({"name": "probe:selective_copying", "batch_size": size["batch"]})
    config.data.options.update(
        {"copies": size["copies"], "length": size["length"], "train_examples": size["train"], "test_examples": 500}
    )
    config.train.duration = size["updates"]
    config.eval.batch_size = 100
    config.report.chosen = "one learning rate for all, not tuned"
    return config

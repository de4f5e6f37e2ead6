"""Mamba-130M on token files, for a pod: the published model and recipe (Gu and Dao 2023, appendix E.2).

    python -m launch.train --config=configs/mamba_130m.py --config.data.dir=DIR --workdir=runs/mamba_130m

Arguments: mamba (default), mamba2 (its 130M), shrunken (two updates of a tiny one, to try the wiring). Hardware: a TPU
or GPU pod, data parallel over all devices; 0.5 M tokens an update, 4,800 updates = 2.5 B tokens. DIR holds train.bin
and val.bin of 16-bit tokens (GPT-NeoX's vocabulary). Not trained by us; it builds under eval_shape in the tests.
"""

from research.errors import UserError
from research.train.config import base_config


def get_config(arg: str = "mamba"):
    arg = arg or "mamba"
    if arg not in ("mamba", "mamba2", "shrunken"):
        raise UserError(f"configs/mamba_130m.py:{arg} is unknown; valid: mamba, mamba2, shrunken")
    config = base_config()
    vocab_size = 50288 if arg == "mamba2" else 50280
    config.model = {"name": "mamba2_130m" if arg == "mamba2" else "mamba_130m", "vocab_size": vocab_size}
    config.data.update({"name": "token_file", "batch_size": 256})
    config.data.options = {"length": 2048, "vocab_size": 50277}
    config.optim.update(
        {
            "name": "adamw",
            "lr": 3e-3,
            "b2": 0.95,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "warmup": "10%",
            "final_lr": 1e-5,
        }
    )
    config.train.update({"duration": "4800", "precision": "bfloat16", "remat": "full"})
    config.eval.update({"every": "10%", "batch_size": 64})
    config.checkpoint.update({"every": "5%", "keep_every": 960})
    config.report.latency = False
    if arg == "shrunken":
        config.model.update({"dim": 32, "depth": 2})
        config.data.update({"batch_size": 4})
        config.data.options["length"] = 32
        config.train.duration = "2"
        config.eval.batch_size = 4
        config.optim.warmup = "0"
    return config

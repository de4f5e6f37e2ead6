"""Tiny Shakespeare by characters, attention-free: a gated recurrence (HGRN with a short convolution), gated linear
units, Muon.

    python -m launch.versus --peer=nanogpt:CHECKOUT \\
        --configs=configs/shakespeare.py:small,configs/shakespeare.py:large --out=results/shakespeare
    python -m launch.train --config=configs/shakespeare.py:small --workdir=runs/shakespeare
    python -m launch.generate --workdir=runs/shakespeare --prompt="ROMEO:" --temperature=0.8

Arguments: small (no more parameters than nanoGPT's CPU recipe, about its time), quick (about half of its time), large
(ten minutes). Hardware: two CPU cores. Data: the text as `tinyshakespeare.txt` in data/ or in --config.data.dir;
nanoGPT's split.
"""

from configs.bases.text import MUON
from research.errors import UserError
from research.train.config import base_config

SIZES = {
    "quick": dict(dim=160, depth=3, ffn_dim=320, batch=16, length=128, steps="230", dropout=0.0),
    "small": dict(dim=160, depth=3, ffn_dim=320, batch=16, length=128, steps="560", dropout=0.0),
    "large": dict(dim=192, depth=4, ffn_dim=384, batch=8, length=256, steps="2300", dropout=0.1),
}


def get_config(arg: str = "small"):
    arg = arg or "small"
    if arg not in SIZES:
        raise UserError(f"configs/shakespeare.py:{arg} is unknown; valid: {', '.join(SIZES)}")
    size = SIZES[arg]
    config = base_config()
    config.model = {
        "name": "sequence",
        "pattern": "hgrn",
        "hgrn": {"d_conv": 4},
        "ffn": "glu",
        "unroll": True,
        **{key: size[key] for key in ("dim", "depth", "ffn_dim", "dropout")},
    }
    config.data.update({"name": "tiny_shakespeare", "batch_size": size["batch"]})
    config.data.options = {"length": size["length"], "tokenizer": "chars"}
    config.optim.update(MUON)
    config.train.update({"duration": size["steps"], "log_every": "2%"})
    config.eval.update({"every": "0", "batch_size": 64})
    config.checkpoint.update({"every": "0"})
    config.report.latency = False
    return config

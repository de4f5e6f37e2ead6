"""Multi-query associative recall (Zoology, Arora et al. 2023, arXiv 2312.04927): which mixers look up, and with how
much state.

    make mqar
    python -m launch.train --config=configs/mqar.py:128x16 --config.model.pattern=mamba2 --workdir=runs/mqar_one

Arguments: LENGTHxSTATE. Lengths: 64 or 128 (4 or 8 pairs, vocabulary 256, for two cores), published (vocabulary 8192,
512 tokens, 64 pairs, for bigger machines). STATE: features of a head's keys, by which the memory of every mixer grows
(`probe_config`); default 16. Hardware: two CPU cores, one to ten minutes a run on one of them. One learning rate for
all; of attention 1 and 2 heads were looked at: at length 64 two of them find the rule too late, at length 128 a single
one does. Two layers of the mixer alone, fresh examples in every epoch, each run stopped at 99 %.
"""

from configs.bases.probes import probe_argument, probe_config

SIZES = {
    "64": dict(vocab_size=256, length=64, pairs=4, train=20_000, batch=32, dim=64, attention_heads=1, updates="1500"),
    "128": dict(vocab_size=256, length=128, pairs=8, train=20_000, batch=32, dim=64, attention_heads=2, updates="1500"),
    "published": dict(
        vocab_size=8192, length=512, pairs=64, train=100_000, batch=256, dim=128, attention_heads=1, updates="64ep"
    ),
}


def get_config(arg: str = ""):
    size, state = probe_argument("configs/mqar.py", arg, SIZES)
    config = probe_config(size["dim"], state, attention_heads=size["attention_heads"])
    config.data.update({"name": "probe:mqar", "batch_size": size["batch"]})
    config.data.options.update({key: size[key] for key in ("vocab_size", "length", "pairs")})
    config.data.options.update({"train_examples": size["train"], "test_examples": 1000, "random_non_queries": False})
    config.train.duration = size["updates"]
    config.report.chosen = "attention's number of heads, by test accuracy; one learning rate for all, not tuned"
    return config

"""Sentence encoders for five domains: one that is told the domain and sends it to experts of its own, beside the dense
one.

    make domain-encoder
    python -m launch.train --config=configs/domain_encoder.py:domain --workdir=runs/domain_encoder_one
    python -m launch.embed --workdir=runs/domain_encoder_one --query="wait until all tasks are done" --domain=system

Arguments: dense (one FFN for all), domain (one a domain, arXiv 2401.15713; the default). Both read the
domain's token at position 0 and cost the same FLOPs a text. The pairs are docstrings and the bodies of their functions
in Python's standard library, 4,400 to train on. From pretrained dense weights instead:
--config.methods=upcycling
--config.method.upcycling.source=runs/domain_encoder/arg=dense_seed=0. The paper's loss, mnr_plus, takes raw products of
vectors, which fits encoders that are pretrained; from scratch the longest vectors become everybody's target, so here
vectors have length 1, products are divided by 0.05 and the loss is the symmetric one, each text's target its own pair.
Hardware: two CPU cores, one for each of two runs, 150 to 230 s of a core each with compiling. Numbers to expect (means
of three seeds and largest distance from them, results/domain_encoder): accuracy@1 among the 64 texts of an evaluation
batch 0.489 +- 0.004 dense and 0.477 +- 0.014 domain, no dead expert; judged by launch.embed, F1 0.774 +- 0.015 and
0.782 +- 0.011, ROC-AUC 0.857 +- 0.010 and 0.855 +- 0.008, TF-IDF of the same words 0.815 and 0.871. So at this size,
from scratch, experts do not pay: each sees a fifth of the pairs. What they learn is their domain's: through the next
domain's expert ROC-AUC falls to 0.801 +- 0.009, through its token alone (dense) to 0.845 +- 0.006.
"""

from configs.bases.text import MUON
from research.errors import UserError
from research.train.config import base_config

MODELS = {"dense": "encoder_small", "domain": "domain_encoder_small"}


def get_config(arg: str = "domain"):
    arg = arg or "domain"
    if arg not in MODELS:
        raise UserError(f"configs/domain_encoder.py:{arg} is unknown; valid: {', '.join(MODELS)}")
    config = base_config()
    config.model = {"name": MODELS[arg], "unroll": True, "dropout": 0.1}
    config.data.update({"name": "stdlib_pairs", "batch_size": 64})
    config.data.options = {"length": 32, "vocab_size": 8192}
    config.task.contrastive.update({"loss": "symmetric", "normalize": True, "temperature": 0.05})
    config.optim.update(MUON)
    config.train.update({"duration": "4ep", "log_every": "5%"})
    config.eval.update({"every": "25%", "batch_size": 64, "calibrate_batches": 0})
    config.checkpoint.every = "50%"
    config.report.latency = False
    config.expect = {"dense": {"full": (0.47, None)}, "domain": {"full": (0.45, None), "dead_experts": (None, 0.0)}}[
        arg
    ]
    return config

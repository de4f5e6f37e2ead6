"""A language model whose FFNs are mixtures of experts, against the dense one of the same active FLOPs.

    make moe-lm
    python -m launch.train --config=configs/moe_lm.py:moe --workdir=runs/moe_lm

Argument: dense; moe (8 experts, of which a token visits 2, each half as wide as the dense part, nobody dropped); or a
family of research/modules/moe.py, such as switch, gshard, deepseek, deepseek_v3 or hash, with 8 experts of that active
width. Hardware: two CPU cores, one for each of two runs; 31 minutes for all six with others at work on them. Numbers to
expect over three seeds (results/moe_lm): 1.837 bits per byte against 1.854 of the dense network, 1.828 against 1.843 on
the validation text, better with every seed, and no expert dead. The mixture stores 2.7 times the parameters. Data: the
text of Python's standard library, bytes.
"""

from dataclasses import asdict, replace

from configs.bases.text import text_config
from research.errors import UserError
from research.modules.moe_options import FAMILIES, Moe

CAUSAL = [name for name, family in FAMILIES.items() if family.router in ("top_k", "hash")]


def get_config(arg: str = "moe"):
    arg = arg or "moe"
    if arg not in ("dense", "moe", *CAUSAL):
        raise UserError(f"configs/moe_lm.py:{arg} is unknown; valid: dense, moe, {', '.join(CAUSAL)}")
    config = text_config(600, max_bytes=2_000_000)
    config.model = {
        "name": "sequence",
        "pattern": "hgrn",
        "hgrn": {"d_conv": 4},
        "dim": 160,
        "depth": 3,
        "ffn_dim": 320,
        "unroll": True,
    }
    config.model.ffn = "glu" if arg == "dense" else "moe"
    if arg != "dense":
        family = FAMILIES.get(arg, Moe(balance_loss_coef=0.01))
        config.model.moe = asdict(
            replace(
                family,
                num_experts=8,
                num_experts_per_tok=min(family.num_experts_per_tok, 2),
                num_shared_experts=min(family.num_shared_experts, 1),
                num_expert_groups=1,
            )
        )
    config.eval.every = "25%"
    config.expect = {"dense": {"full": (None, 1.88)}, "moe": {"full": (None, 1.85), "dead_experts": (None, 0.0)}}.get(
        arg, {}
    )
    return config

"""Published language models with mixtures of experts, as configs of the sequence family, and the parameters that a token meets.

Mixtral of experts (Jiang et al. 2024, arXiv 2401.04088, table 1) and Qwen3 (Yang et al. 2025, arXiv 2505.09388, table 2).
"""

import dataclasses
import math
from typing import Any

from research.models.sequence import SequenceConfig
from research.modules.axes import role
from research.modules.mixers.attention import Attention
from research.modules.moe import FAMILIES
from research.modules.state import abstract

VARIANTS: dict[str, SequenceConfig] = {
    "mixtral_8x7b": SequenceConfig(
        vocab_size=32000,
        tied=False,
        length=32768,
        dim=4096,
        depth=32,
        pattern="attention",
        ffn="moe",
        attention=Attention(heads=32, kv_heads=8, theta=1e6),
        moe=dataclasses.replace(FAMILIES["mixtral"], hidden=14336),
    ),
    "qwen3_30b_a3b": SequenceConfig(
        vocab_size=151936,
        tied=False,
        length=40960,
        dim=2048,
        depth=48,
        pattern="attention",
        ffn="moe",
        ffn_dim=6144,
        norm_eps=1e-6,
        attention=Attention(heads=32, kv_heads=4, head_dim=128, theta=1e6, qk_norm=True),
        moe=dataclasses.replace(FAMILIES["qwen3"], hidden=768),
    ),
}

PUBLISHED: dict[str, tuple[str, str, int]] = {
    "mixtral_8x7b": ("arXiv 2401.04088", "huggingface.co/mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    "qwen3_30b_a3b": ("arXiv 2505.09388", "github.com/QwenLM/Qwen3", 30_532_122_624),
}
"""Name -> (paper, source, number of parameters)."""


def active_params(config: Any) -> int:
    """Parameters of a model that one token meets: of a mixture's experts those that it is sent to, of everything else all.

    The embedding counts whole, as is usual; so do soft mixtures, whose tokens are spread over all experts.
    """
    full = abstract(config)
    if not any(name.endswith("/load") for name in full.stats) or config.mixture.router == "soft":
        return full.num_params()
    idle = 1 - config.mixture.active / config.mixture.experts
    first = {name: next(r for r in map(role, full.axes[name]) if r != "layers") for name in full.params if full.axes[name]}
    experts = [math.prod(s.shape) for name, s in full.params.items() if first.get(name) == "experts"]
    return full.num_params() - round(idle * sum(experts))

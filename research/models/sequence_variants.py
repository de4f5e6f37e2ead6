"""The named models of the sequence family: published ones, and small ones of every kind of mixer for a laptop.

Mamba (Gu and Dao 2023, table 12), Mamba-2 (Dao and Gu 2024), Mixtral of experts (Jiang et al. 2024, arXiv 2401.04088,
table 1), Qwen3 (Yang et al. 2025, arXiv 2505.09388, table 2).
"""

from dataclasses import replace
from typing import Any

from research.models.registry import Entry, register
from research.models.sequence import SequenceConfig
from research.modules.mixers.attention import Attention
from research.modules.mixers.base import known
from research.modules.moe_options import FAMILIES

_SIZES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
"""Size -> (dim, depth): Gu and Dao 2023, table 12; Mamba-2's models of about the same size are called 780m, 1.3b and
2.7b."""
_MAMBA_COUNTS = (129_135_360, 371_516_416, 793_204_224, 1_372_178_432, 2_768_345_600)
_MAMBA2_NAMES = ("130m", "370m", "780m", "1.3b", "2.7b")
_MAMBA2_COUNTS = (128_989_632, 368_346_624, 780_161_280, 1_343_757_312, 2_702_599_680)


def _config(**fields: Any) -> SequenceConfig:
    """A config by fields of which some are the options of a mixer."""
    return SequenceConfig(**fields)


def _mamba(kind: str, vocab_size: int, size: tuple[int, int]) -> SequenceConfig:
    return SequenceConfig(vocab_size=vocab_size, length=2048, dim=size[0], depth=size[1], pattern=kind)


def _small(pattern: str, ffn: str = "") -> SequenceConfig:
    """About 2 M parameters for a laptop: the mixers of Mamba's kind stand alone, the others take turns with a gated
    linear unit."""
    alone = pattern in known() and known()[pattern].alone
    mixers: dict[str, Any] = {kind: spec(**spec.small) for kind, spec in known().items()}
    return SequenceConfig(
        vocab_size=256,
        length=256,
        dim=192,
        depth=6 if alone or len(pattern.split()) == 3 else 4,
        pattern=pattern,
        ffn=ffn or ("none" if alone else "glu"),
        **mixers,
    )


VARIANTS: dict[str, SequenceConfig] = {
    "sequence": SequenceConfig(),
    **{f"{kind}_small": _small(kind) for kind in SequenceConfig.specs()},
    "hybrid_small": _small("mamba2 mamba2 window"),
    "moe_small": _small("attention", "glu moe"),
    "mixtral_8x7b": _config(
        vocab_size=32000,
        tie_embeddings=False,
        length=32768,
        dim=4096,
        depth=32,
        pattern="attention",
        ffn="moe",
        attention=Attention(num_heads=32, num_kv_heads=8, rope_theta=1e6),
        moe=replace(FAMILIES["mixtral"], ffn_dim=14336),
    ),
    "qwen3_30b_a3b": _config(
        vocab_size=151936,
        tie_embeddings=False,
        length=40960,
        dim=2048,
        depth=48,
        pattern="attention",
        ffn="moe",
        ffn_dim=6144,
        norm_eps=1e-6,
        attention=Attention(num_heads=32, num_kv_heads=4, head_dim=128, rope_theta=1e6, qk_norm=True),
        moe=replace(FAMILIES["qwen3"], ffn_dim=768),
    ),
    **{f"mamba_{name}": _mamba("mamba", 50280, size) for name, size in _SIZES.items()},
    **{
        f"mamba2_{name}": _mamba("mamba2", 50288, size)
        for name, size in zip(_MAMBA2_NAMES, _SIZES.values(), strict=True)
    },
}
"""Published models, small ones for a laptop with every kind of mixer, and "sequence", to set the fields of."""

PUBLISHED: dict[str, tuple[str, str, int]] = {
    "mixtral_8x7b": ("arXiv 2401.04088", "huggingface.co/mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    "qwen3_30b_a3b": ("arXiv 2505.09388", "github.com/QwenLM/Qwen3", 30_532_122_624),
    **{
        f"mamba_{name}": ("arXiv 2312.00752", "github.com/state-spaces/mamba", count)
        for name, count in zip(_SIZES, _MAMBA_COUNTS, strict=True)
    },
    **{
        f"mamba2_{name}": ("arXiv 2405.21060", "github.com/state-spaces/mamba", count)
        for name, count in zip(_MAMBA2_NAMES, _MAMBA2_COUNTS, strict=True)
    },
}
"""Name -> (paper, source, number of parameters)."""


for _name, _model in VARIANTS.items():
    _paper, _source, _count = PUBLISHED.get(_name, (_model.spec(_model.kinds[0]).paper, "this repository", None))
    _tiny: dict[str, Any] = dict(vocab_size=10, length=12, dim=16, depth=2 * len(_model.period), ffn=_model.ffn)
    if _model.has_mixtures:
        _tiny["moe"] = dict(num_experts=4, num_experts_per_tok=2, ffn_dim=16)
    _specs = {kind: _model.options(kind) for kind in dict.fromkeys(_model.kinds)}
    _tiny |= {kind: spec.tiny for kind, spec in _specs.items() if spec.tiny}
    if any(isinstance(spec, Attention) and spec.num_kv_heads for spec in _specs.values()):
        _tiny["attention"] = dict(num_heads=4, num_kv_heads=2, head_dim=8)
    register(Entry(_name, _model, _paper, _source, _tiny, _count))

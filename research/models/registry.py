"""The registry: names of published and small models, how to build them, where they come from."""

import dataclasses
import difflib
import fnmatch
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any

from research.errors import UserError
from research.files import printable
from research.models import encoder, hmode, lenet, resnet, sequence, sequence_variants, unireplknet, vgg, vim, vit, vmamba, wide_resnet
from research.modules.axes import role
from research.modules.state import abstract
from research.values import fit, not_negative


@dataclasses.dataclass(frozen=True)
class Entry:
    """One named model.

    `tiny` holds config overrides that give a shrunken twin with every kind of layer, for tests; `counts` the
    published number of parameters at the default number of classes, or None.
    """

    name: str
    config: Any
    paper: str
    source: str
    tiny: dict[str, Any]
    counts: int | None = None


LARGEST = 2**24
"""Largest whole number that a field of a model takes: far above all sizes, and below those that are only found out when arrays are made."""
_ENTRIES: dict[str, Entry] = {}


def register(entry: Entry) -> None:
    """Adds a model; names are unique."""
    if entry.name in _ENTRIES:
        raise ValueError(f"model {entry.name} is registered twice")
    _ENTRIES[entry.name] = entry


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_ENTRIES, pattern))


def entry(name: str) -> Entry:
    """Returns the registry's entry.

    Raises:
      UserError: no model has this name.
    """
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=5, cutoff=0.4) or list_models()
        raise UserError(f"unknown model {name!r}; near: {', '.join(near)} (all: python -m launch.models)")
    return _ENTRIES[name]


def model_config(name: str, **overrides) -> Any:
    """Returns the config of a named model with some of its fields replaced.

    Raises:
      UserError: unknown model or field, or a value that the model refuses.
    """
    config = entry(name).config
    fields = {f.name: f for f in dataclasses.fields(config)}
    for field in overrides:
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=3, cutoff=0.4) or sorted(fields)
            raise UserError(f"model {name} has no field {field!r}; near: {', '.join(near)}")
    for field, sources in getattr(config, "derived", {}).items():
        if not overrides.keys().isdisjoint(sources):
            overrides.setdefault(field, fields[field].default)
    return replaced(config, name, overrides)


def replaced(config: Any, name: str, fields: dict[str, Any], where: str = "model.") -> Any:
    """Returns the dataclass with some fields replaced; a dictionary replaces fields of a dataclass inside.

    Raises:
      UserError: a field that the inner dataclass does not have, or a value of another type than its annotation.
    """
    values, kinds = {}, typing.get_type_hints(type(config), include_extras=True)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for field, value in fields.items():
        inner = getattr(config, field)
        if dataclasses.is_dataclass(inner) and not isinstance(value, type(inner)):
            value = fit(value, dict, f"{where}{field}")
            valid = [f.name for f in dataclasses.fields(inner)]
            unknown = sorted(set(value) - set(valid))
            if unknown:
                raise UserError(f"model {name} has no field {field}.{unknown[0]}; valid: {', '.join(valid)}")
            values[field] = replaced(inner, name, value, f"{where}{field}.")
        else:
            values[field] = fit(value, kinds[field], f"{where}{field}", not_negative(defaults[field], kinds[field], LARGEST))
    try:
        return dataclasses.replace(config, **values)
    except WRONG as error:
        raise _unfit(name, where, fields, error) from None


WRONG = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, AssertionError)
"""What building a model from sizes that do not fit may raise where no check of the family was before it."""


def _unfit(name: str, where: str, fields: Mapping[str, Any], error: Exception) -> UserError:
    told = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
    return UserError(
        f"model {name} cannot be built with {printable(', '.join(f'{where}{k}={v!r}' for k, v in fields.items()), 200)}: {told}"
    )


def check_buildable(config: Any, name: str, fields: Mapping[str, Any]) -> None:
    """Judges a model by the shapes of its arrays.

    Args:
      fields: those that were given, for the message.

    Raises:
      UserError: it cannot be built, or has an array without an entry.
    """
    try:
        shapes = abstract(config)
    except WRONG as error:
        raise _unfit(name, "model.", fields, error) from None
    if empty := [key for key, array in {**shapes.params, **shapes.stats}.items() if 0 in array.shape]:
        raise _unfit(name, "model.", fields, ValueError(f"{empty[0]} would have no entry"))


def deployed(config: Any, params: dict | None = None, stats: dict | None = None) -> tuple[Any, dict, dict]:
    """Returns (config, params, stats) in the form that runs at inference: merged where the family can be merged.

    Without arrays only the config is converted.
    """
    if not hasattr(config, "deploy"):
        return config, params or {}, stats or {}
    if params is None:
        return dataclasses.replace(config, deploy=True), {}, {}
    return unireplknet.merge_reparam(config, params, stats or {})


def active_params(config: Any) -> int:
    """Parameters of a model that one token, or image, meets: of a mixture's experts those that it is sent to, of everything else all.

    The embedding counts whole, as is usual; so do soft mixtures, whose tokens are spread over all experts.
    """
    full = abstract(config)
    roles = {name: [role(axis) for axis in full.axes[name]] for name in full.params}
    if getattr(config, "router", "") and config.experts > 1:  # one expert of every routed convolution
        of_experts = [name for name, own in roles.items() if "experts" in own and not name.startswith(config.router)]
        idle = 1 - 1 / config.experts
    elif any(name.endswith("/load") for name in full.stats) and config.mixture.router != "soft":
        of_experts = [name for name, own in roles.items() if [r for r in own if r != "layers"][:1] == ["experts"]]
        idle = 1 - config.mixture.active / config.mixture.experts
    else:
        return full.num_params()
    return full.num_params() - round(idle * sum(math.prod(full.params[name].shape) for name in of_experts))


@functools.lru_cache
def model_info(name: str) -> dict[str, Any]:
    """Returns name, family, params, those that a token meets, stats, input shape, paper and source of a named model; no arrays are made."""
    e = entry(name)
    shapes = abstract(e.config)
    return {
        "name": name,
        "family": e.config.family,
        "params": shapes.num_params(),
        "active_params": active_params(e.config),
        "stats": shapes.num_stats(),
        "input": e.config.input_shape(),
        "elastic": tuple(e.config.elastic),
        "paper": e.paper,
        "source": e.source,
    }


def _register_unireplknet() -> None:
    counts = {
        "a": 4_649_060, "f": 6_489_328, "p": 11_080_520, "n": 18_818_880, "t": 31_693_420,
        "s": 56_456_704, "b": 99_089_416, "l": 220_076_056, "xl": 388_690_984,
    }  # fmt: skip
    for size, config in unireplknet.VARIANTS.items():
        pattern = config.kernels
        tiny = dict(
            dims=(8, 12, 16, 24),
            depths=tuple(2 * len(p) if i == 2 else len(p) for i, p in enumerate(pattern)),
            num_classes=10,
            image_size=16,
            stem_strides=(1, 1),
            layer_scale=0.5,
        )
        register(Entry(f"unireplknet_{size}", config, "arXiv 2311.15599", "github.com/AILab-CVC/UniRepLKNet", tiny, counts[size]))


ADVMOE = ("arXiv 2308.10110", "github.com/OPTML-Group/Robust-MoE-CNN")
ROUTER_COUNT = 269_202
TINY_ROUTER = {"experts": 3, "router_dims": (4, 6), "router_depths": (1, 2), "form": "all"}


def _register_resnet() -> None:
    counts = {
        "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160,
        "resnet152": 60_192_808, "resnet18_cifar": 11_173_962,
    }  # fmt: skip
    for name, config in resnet.VARIANTS.items():
        width = 8 * resnet.EXPANSION[config.block]
        depths = (2, 3, 1, 2)[: len(config.depths)]
        dims = (width, 3 * width // 2, 2 * width, 3 * width)[: len(depths)]
        tiny = dict(dims=dims, depths=depths, num_classes=10, image_size=16 if config.stem == "small" else 32)
        if config.experts:
            register(Entry(name, config, *ADVMOE, {**tiny, **TINY_ROUTER, "stem_dim": 12}, 5_565_450 + ROUTER_COUNT))
            continue
        register(Entry(name, config, "arXiv 1512.03385", "github.com/pytorch/vision", tiny, counts.get(name)))


def _register_vgg_and_wide_resnet() -> None:
    counts = {
        "vgg16": 15_311_818, "advmoe_vgg16": 7_690_218 + ROUTER_COUNT,
        "wrn28_10": 36_479_194, "advmoe_wrn28_10": 18_239_602 + ROUTER_COUNT,
    }  # fmt: skip
    origins = {"vgg": ("arXiv 1409.1556", ADVMOE[1]), "wide_resnet": ("arXiv 1605.07146", "github.com/szagoruyko/wide-residual-networks")}
    shapes = {"vgg": dict(depths=(2, 2, 3), hidden=8), "wide_resnet": dict(depths=(2, 3, 2), stem_dim=8)}
    variants: dict[str, Any] = {**vgg.VARIANTS, **wide_resnet.VARIANTS}
    for name, config in variants.items():
        tiny: dict[str, Any] = {"dims": (8, 12, 16), "num_classes": 10, "image_size": 8, **shapes[config.family]}
        routed = bool(config.experts)
        origin = ADVMOE if routed else origins[config.family]
        register(Entry(name, config, *origin, tiny | (TINY_ROUTER if routed else {}), counts[name]))


def _register_vit() -> None:
    counts = {
        "tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656, "large": 304_326_632,
        "tiny_distilled": 5_910_800, "small_distilled": 22_436_432, "base_distilled": 87_338_192,
    }  # fmt: skip
    tiny = dict(dim=32, depth=4, heads=4, head_dim=8, patch_size=4, image_size=16, num_classes=10)
    for name, config in vit.VARIANTS.items():
        kind, size = name.removesuffix("_patch16_224").split("_", 1)
        papers = {"vit": "arXiv 2010.11929", "deit": "arXiv 2012.12877", "vmoe": "arXiv 2106.05974", "soft": "arXiv 2308.00951"}
        source = {"vit": "google-research/vision_transformer", "deit": "facebookresearch/deit"}.get(kind, "google-research/vmoe")
        mixed = dict(dense_blocks=min(config.dense_blocks, 2), moe=dict(experts=4, hidden=16)) if config.has_mixtures else {}
        register(Entry(name, config, papers[kind], f"github.com/{source}", tiny | mixed, counts.get(size)))


def _register_vim() -> None:
    counts = {"tiny": 7_148_008, "small": 25_796_584, "base": 97_598_440}
    tiny = dict(dim=32, depth=4, state=4, patch_size=4, image_size=16, num_classes=10)
    for name, config in vim.VARIANTS.items():
        count = counts.get(name.split("_")[1])
        register(Entry(name, config, "arXiv 2401.09417", "github.com/hustvl/Vim" if count else "this repository", tiny, count))


def _register_vmamba() -> None:
    counts = {
        "vmamba_tiny_s1l8": 30_249_064, "vmamba_tiny_s2l5": 30_705_832,
        "vmamba_small_s2l15": 50_147_752, "vmamba_base_s2l15": 88_557_800,
    }  # fmt: skip
    tiny = dict(dims=(8, 24), depths=(2, 3), ssm_ratio=1.5, num_classes=10, image_size=8, stem_strides=(1, 1))
    for name, config in vmamba.VARIANTS.items():
        count = counts.get(name)
        register(Entry(name, config, "arXiv 2401.10166", "github.com/MzeroMiko/VMamba" if count else "this repository", tiny, count))


def _register_sequence() -> None:
    heads = dict(heads=2, head_dim=8)
    small = {
        "mamba": dict(state=4),
        **{kind: dict(state=8, head_dim=8) for kind in ("mamba2", "mamba3")},
        **{kind: dict(heads=2) for kind in ("gla", "retention", "deltanet", "gated_deltanet", "cosformer", "performer", "sla")},
        "attention": heads,
        "window": heads | dict(window=5),
        "routing": dict(heads=2, local_heads=1, head_dim=8, clusters=2, window=5, local_window=4),
    }
    for name, config in sequence_variants.VARIANTS.items():
        kind = config.kinds[0]
        paper, source, count = sequence_variants.PUBLISHED.get(name, (config.spec(kind).paper, "this repository", None))
        tiny: dict[str, Any] = dict(vocab_size=10, length=12, dim=16, depth=2 * len(config.period), ffn=config.ffn)
        if sequence.MIXTURE in config.ffn_kinds:
            tiny["moe"] = dict(experts=4, active=2, hidden=16)
        tiny |= {k: small[k] for k in set(config.kinds) & set(small)}
        if config.attention.kv_heads:
            tiny["attention"] = dict(heads=4, kv_heads=2, head_dim=8)
        register(Entry(name, config, paper, source, tiny, count))


def _register_encoder() -> None:
    tiny = dict(vocab_size=10, length=12, dim=16, depth=2, outputs=10, domains=3, attention=dict(heads=2, head_dim=8))
    for name, config in encoder.VARIANTS.items():
        register(Entry(name, config, encoder.PAPER, "this repository", tiny))


def _register_hmode() -> None:
    tiny = dict(dims=(4, 8, 8, 12, 16), depths=(1, 2, 1, 1, 2), head_dim=8, image_size=32)
    register(Entry("hmode", hmode.VARIANTS["hmode"], "arXiv 2208.02894", "this repository", tiny))


def _register_lenet() -> None:
    tiny = dict(maps=(4, 6), hidden=(12, 8))
    register(Entry("lenet5", lenet.VARIANTS["lenet5"], "LeCun et al. 1998", "this repository", tiny, 61_706))


_register_unireplknet()
_register_resnet()
_register_vgg_and_wide_resnet()
_register_vit()
_register_sequence()
_register_encoder()
_register_vim()
_register_vmamba()
_register_hmode()
_register_lenet()

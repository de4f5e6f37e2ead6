"""The released UniRepLKNet checkpoints (github.com/AILab-CVC/UniRepLKNet, unireplknet.py) in and out of our names.

One table, made from the config, pairs every official array with ours; both directions and the report read it.
"""

import collections
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.files import printable
from research.interop.array_values import check_values
from research.models.unireplknet import UniRepLKNetConfig
from research.modules.dilated_reparam import BRANCHES
from research.modules.state import Arrays, abstract

TO_OURS = {
    "same": lambda w: w,
    "linear": lambda w: w.T,
    "pointwise": lambda w: w[:, :, 0, 0].T,
    "conv": lambda w: w.transpose(2, 3, 1, 0),
    "depthwise": lambda w: w[:, 0].transpose(1, 2, 0),
    "grn": lambda w: w.reshape(-1),
}
"""Layout -> official array to ours: (out, in), (out, in, 1, 1), (out, in, H, W), (C, 1, K, K), (1, 1, 1, C)."""

TO_OFFICIAL = {
    "same": lambda w: w,
    "linear": lambda w: w.T,
    "pointwise": lambda w: w.T[:, :, None, None],
    "conv": lambda w: w.transpose(3, 2, 0, 1),
    "depthwise": lambda w: w.transpose(2, 0, 1)[:, None],
    "grn": lambda w: w.reshape(1, 1, 1, -1),
}


class Pair(NamedTuple):
    """One official array and its place in ours: entry `index` of the stacked array, or all of it where None."""

    official: str
    ours: str
    layout: str
    index: int | None = None  # type: ignore[assignment]  # in place of a tuple's method of this name


@dataclass(frozen=True)
class Report:
    """What did not match: official names that the file lacks or has beyond the model, and (name, found, expected)
    shapes.

    `batches_tracked` is PyTorch's count of batch-norm updates, which has no place in our statistics.
    """

    matched: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = field(default=())
    batches_tracked: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def name_pairs(config: UniRepLKNetConfig) -> list[Pair]:
    """Returns every array of the model under both names, in the order of the official state dict."""
    pairs = []
    stem = (("0", "conv1", "conv"), ("1", "norm1", "same"), ("3", "conv2", "conv"), ("4", "norm2", "same"))
    for i in range(len(config.dims)):
        for index, ours, layout in stem if i == 0 else (("0", "conv", "conv"), ("1", "norm", "same")):
            pairs += _weight_bias(f"downsample_layers.{i}.{index}", f"reduce/{i}/{ours}", layout)
    for i, pattern in enumerate(config.kernel_sizes):
        for block in range(config.depths[i]):
            repetition, phase = divmod(block, len(pattern))
            prefix = f"stages.{i}.{block}", f"stages/{i}/layer/phases/{phase}"
            pairs += [p._replace(index=repetition) for p in _block_pairs(*prefix, pattern[phase], config.deploy)]
    return pairs + _weight_bias("norm", "norm", "same") + _weight_bias("head", "head", "linear")


def _weight_bias(official: str, ours: str, layout: str) -> list[Pair]:
    weight = "scale" if layout == "same" else "kernel"
    return [Pair(f"{official}.weight", f"{ours}/{weight}", layout), Pair(f"{official}.bias", f"{ours}/bias", "same")]


def _batch_norm(official: str, ours: str) -> list[Pair]:
    moments = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))
    return [Pair(f"{official}.{a}", f"{ours}/{b}", "same") for a, b in moments]


def _block_pairs(official: str, ours: str, size: int, deploy: bool) -> list[Pair]:
    pairs = []
    if not deploy:
        pairs.append(Pair(f"{official}.gamma", f"{ours}/layer_scale", "same"))
    if size:
        dw = f"{official}.dwconv.lk_origin" if size >= 7 else f"{official}.dwconv"
        large = "dw/large" if size >= 7 and not deploy else "dw"
        weight, bias = _weight_bias(dw, f"{ours}/{large}", "depthwise")
        pairs += [weight, bias] if deploy else [weight]
        if size >= 7 and not deploy:
            pairs += _branch_pairs(f"{official}.dwconv", f"{ours}/dw", size)
        if not deploy:
            pairs += _batch_norm(f"{official}.norm", f"{ours}/norm")
    pairs += _weight_bias(f"{official}.se.down", f"{ours}/se/down", "pointwise")
    pairs += _weight_bias(f"{official}.se.up", f"{ours}/se/up", "pointwise")
    pairs += _weight_bias(f"{official}.pwconv1.1", f"{ours}/up", "linear")
    pairs.append(Pair(f"{official}.act.1.gamma", f"{ours}/grn/scale", "grn"))
    weight, bias = _weight_bias(f"{official}.pwconv2.0", f"{ours}/down", "linear")
    if deploy:
        return [*pairs, weight, bias]
    return [
        *pairs,
        Pair(f"{official}.act.1.beta", f"{ours}/grn/bias", "grn"),
        weight,
        *_batch_norm(f"{official}.pwconv2.2", f"{ours}/down_norm"),
    ]


def _branch_pairs(official: str, ours: str, size: int) -> list[Pair]:
    pairs = _batch_norm(f"{official}.origin_bn", f"{ours}/large_norm")
    for dilation, k in BRANCHES[size].items():
        pairs.append(
            Pair(f"{official}.dil_conv_k{k}_{dilation}.weight", f"{ours}/branches/d{dilation}/kernel", "depthwise")
        )
        pairs += _batch_norm(f"{official}.dil_bn_k{k}_{dilation}", f"{ours}/norms/d{dilation}")
    return pairs


def shortest_period(sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the shortest pattern that, repeated a whole number of times, gives `sizes`."""
    sizes = tuple(sizes)
    return next(sizes[:p] for p in range(1, len(sizes) + 1) if sizes[:p] * (len(sizes) // p) == sizes)


def infer_config(shapes: Mapping[str, Sequence[int]], image_size: int = 224) -> UniRepLKNetConfig:
    """Returns the config of the official model whose state dict has these shapes.

    Args:
      shapes: official name -> shape, of the training or the deployed form.
      image_size: height and width in pixels, which shapes do not tell.

    Raises:
      UserError: the names are not those of a UniRepLKNet classifier, or the sizes are none that ours can have.
    """
    blocks = collections.defaultdict(set)
    for name in shapes:
        if found := re.match(r"stages\.(\d{1,4})\.(\d{1,4})\.", name):
            blocks[int(found[1])].add(int(found[2]))
    depths = tuple(len(blocks[i]) for i in sorted(blocks))
    if not blocks or any(b != set(range(len(b))) for b in (set(blocks), *blocks.values())):
        raise UserError("not a UniRepLKNet state dict: blocks 'stages.I.J.*' do not count up from stages.0.0")
    kernels = tuple(
        shortest_period([_kernel_size(shapes, f"stages.{i}.{j}.dwconv") for j in range(d)])
        for i, d in enumerate(depths)
    )
    ups = [_shape(shapes, f"stages.{i}.0.pwconv1.1.weight", 2) for i in range(len(depths))]
    if "head.weight" not in shapes:
        raise UserError(
            "UniRepLKNet state dict without head.weight: a detection or segmentation backbone; a classifier is needed"
        )
    return UniRepLKNetConfig(
        depths=depths,
        dims=tuple(u[1] for u in ups),
        mlp_dims=tuple(u[0] for u in ups),
        kernel_sizes=kernels,
        num_classes=_shape(shapes, "head.weight", 2)[0],
        in_channels=_shape(shapes, "downsample_layers.0.0.weight", 4)[1],
        image_size=image_size,
        deploy=not any(name.endswith(".pwconv2.2.weight") for name in shapes),
    )


def _kernel_size(shapes: Mapping[str, Sequence[int]], dw: str) -> int:
    for name in (f"{dw}.lk_origin.weight", f"{dw}.weight"):
        if name in shapes:
            return _shape(shapes, name, 4)[-1]
    return 0


def _shape(shapes: Mapping[str, Sequence[int]], name: str, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"not a UniRepLKNet state dict: {name} is missing")
    if len(shapes[name]) != rank or min(shapes[name]) < 1:
        raise UserError(f"not a UniRepLKNet state dict: {name} has shape {tuple(shapes[name])}; {rank} axes are needed")
    return tuple(shapes[name])


def match(config: UniRepLKNetConfig, shapes: Mapping[str, Sequence[int]]) -> Report:
    """Compares the names and shapes of an official state dict with those of the model."""
    full = abstract(config)
    ours = {**full.params, **full.stats}
    pairs = name_pairs(config)
    missing, wrong = [], []
    for pair in pairs:
        expected = _official_shape(pair, ours[pair.ours].shape)
        if pair.official not in shapes:
            missing.append(pair.official)
        elif tuple(shapes[pair.official]) != expected:
            wrong.append((pair.official, tuple(shapes[pair.official]), expected))
    known = {p.official for p in pairs} | set(_tracked_names(config))
    unexpected = tuple(name for name in shapes if name not in known)
    return Report(len(pairs) - len(missing) - len(wrong), tuple(missing), unexpected, tuple(wrong))


def _official_shape(pair: Pair, shape: tuple[int, ...]) -> tuple[int, ...]:
    layer = shape if pair.index is None else shape[1:]
    return TO_OFFICIAL[pair.layout](np.broadcast_to(np.float32(0), layer)).shape


def _tracked_names(config: UniRepLKNetConfig) -> list[str]:
    return [
        p.official.replace("running_var", "num_batches_tracked")
        for p in name_pairs(config)
        if p.official.endswith("running_var")
    ]


def from_official(
    state: Mapping[str, np.ndarray], *, image_size: int = 224, dtype: Any = np.float32
) -> tuple[UniRepLKNetConfig, Arrays, Arrays, Report]:
    """Returns (config, params, stats, report) of an official state dict, in training or deployed form.

    Args:
      state: official name -> array; a common prefix `module.` (DistributedDataParallel) is removed.
      image_size: stored in the config.
      dtype: of the returned arrays.

    Raises:
      UserError: not a UniRepLKNet, or arrays are missing or of the wrong shape. Unexpected ones are only reported.
    """
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): w for name, w in state.items()}
    shapes = {name: tuple(w.shape) for name, w in state.items()}
    config = infer_config(shapes, image_size)
    report = match(config, shapes)
    if report.missing or report.wrong_shape:
        raise UserError(f"UniRepLKNet state dict does not fit {_sizes(config)}: {_unmatched(report)}")
    check_values("UniRepLKNet state dict", {pair.official: state[pair.official] for pair in name_pairs(config)})
    tracked = [
        int(state[name])
        for name in _tracked_names(config)
        if name in state and state[name].shape == () and state[name].dtype.kind in "iu"
    ]
    full = abstract(config)
    layers = collections.defaultdict(list)
    for pair in name_pairs(config):
        layers[pair.ours, pair.index is None].append(
            TO_OURS[pair.layout](np.asarray(state[pair.official])).astype(dtype)
        )
    arrays = {ours: jnp.asarray(ws[0] if single else np.stack(ws), dtype) for (ours, single), ws in layers.items()}
    report = Report(report.matched, unexpected=report.unexpected, batches_tracked=max(tracked) if tracked else None)
    return config, {k: arrays[k] for k in full.params}, {k: arrays[k] for k in full.stats}, report


def _sizes(config: UniRepLKNetConfig) -> str:
    return (
        f"depths {config.depths}, dims {config.dims}, kernels {config.kernel_sizes}, "
        f"{'deployed' if config.deploy else 'training'} form"
    )


def _unmatched(report: Report) -> str:
    wrong = [f"{printable(name)} is {found}, needs {needed}" for name, found, needed in report.wrong_shape]
    unexpected = [printable(name) for name in report.unexpected]
    kinds = (("missing", report.missing), ("of wrong shape", wrong), ("unexpected", unexpected))
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in kinds
        if names
    )


def to_official(
    config: UniRepLKNetConfig,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    *,
    batches_tracked: int | None = None,
) -> dict[str, np.ndarray]:
    """The inverse of `from_official`: a state dict that the official class of the same sizes loads strictly.

    Args:
      batches_tracked: value for the official `num_batches_tracked` counters; None leaves these out.

    Raises:
      UserError: a stem that the official network does not have (its strides are fixed at 2, 2).
    """
    if tuple(config.stem_strides) != (2, 2) or len(config.dims) != 4:
        raise UserError(
            "the official UniRepLKNet has 4 stages and stem strides (2, 2); "
            f"got {len(config.dims)} and {config.stem_strides}"
        )
    arrays = {name: np.asarray(w) for name, w in {**params, **stats}.items()}
    state = {}
    for pair in name_pairs(config):
        w = arrays[pair.ours] if pair.index is None else arrays[pair.ours][pair.index]
        state[pair.official] = np.ascontiguousarray(TO_OFFICIAL[pair.layout](w))
        if batches_tracked is not None and pair.official.endswith("running_var"):
            state[pair.official.replace("running_var", "num_batches_tracked")] = np.asarray(batches_tracked, np.int64)
    return state

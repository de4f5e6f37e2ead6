"""Fill rules of the golden numbers (facts sheet on vision, section 12) and the way from PyTorch's layout to ours."""

from collections.abc import Iterator

import numpy as np

from research.modules.dilated_reparam import BRANCHES

Arrays = dict[str, np.ndarray]


def W(shape, tag, a=0.2):
    return (a * np.sin(0.37 * np.arange(np.prod(shape)) + tag)).reshape(shape)


def P(shape, tag):
    return 1 + W(shape, tag)


def V(shape, tag):
    return 1 + W(shape, tag, 0.5)


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def conv(shape, tag):
    """(out, in, kH, kW) -> (kH, kW, in, out)."""
    return W(shape, tag).transpose(2, 3, 1, 0)


def depthwise(channels, size, tag):
    """(C, 1, K, K) -> (K, K, C)."""
    return W((channels, 1, size, size), tag)[:, 0].transpose(1, 2, 0)


def linear(n_out, n_in, tag):
    """(out, in) -> (in, out)."""
    return W((n_out, n_in), tag).T


def batch_norm(prefix: str, channels: int, tag: float, params: Arrays, stats: Arrays) -> None:
    """Fills BN(tag) of section 12."""
    params[f"{prefix}/scale"], params[f"{prefix}/bias"] = P((channels,), tag), W((channels,), tag + 1)
    stats[f"{prefix}/mean"], stats[f"{prefix}/var"] = W((channels,), tag + 2), V((channels,), tag + 3)


def dilated_reparam(prefix: str, channels: int, size: int) -> tuple[Arrays, Arrays]:
    """Fills the block of G3 to G8."""
    params, stats = {f"{prefix}large/kernel": depthwise(channels, size, 20)}, {}
    batch_norm(f"{prefix}large_norm", channels, 21, params, stats)
    for i, (dilation, small) in enumerate(BRANCHES[size].items()):
        params[f"{prefix}branches/d{dilation}/kernel"] = depthwise(channels, small, 30 + 10 * i)
        batch_norm(f"{prefix}norms/d{dilation}", channels, 31 + 10 * i, params, stats)
    return params, stats


def squeeze_excite(prefix: str, channels: int, hidden: int) -> Arrays:
    return {
        f"{prefix}down/kernel": linear(hidden, channels, 12),
        f"{prefix}down/bias": W((hidden,), 13),
        f"{prefix}up/kernel": linear(channels, hidden, 14),
        f"{prefix}up/bias": W((channels,), 15),
    }


def block(size: int) -> tuple[Arrays, Arrays]:
    """Fills the block of G9 (size 13) and G10 (size 3), 4 channels."""
    params, stats = dilated_reparam("dw/", 4, size) if size >= 7 else ({"dw/kernel": depthwise(4, size, 20)}, {})
    batch_norm("norm", 4, 100, params, stats)
    batch_norm("down_norm", 4, 115, params, stats)
    params |= squeeze_excite("se/", 4, 1)
    params |= {
        "up/kernel": linear(16, 4, 110),
        "up/bias": W((16,), 111),
        "grn/scale": W((16,), 112),
        "grn/bias": W((16,), 113),
    }
    params |= {"down/kernel": linear(4, 16, 114), "layer_scale": P((4,), 120)}
    return params, stats


def mini(dims, kernels, classes: int) -> tuple[Arrays, Arrays]:
    """Fills the whole network of section 12.1: tensor number i has the tag i. One block a stage."""
    params, stats, count = {}, {}, iter(range(10**6))
    c = dims[0]
    _conv_norm("reduce/0", "1", (c // 2, 3, 3, 3), count, params)
    _conv_norm("reduce/0", "2", (c, c // 2, 3, 3), count, params)
    for i in range(1, len(dims)):
        _conv_norm(f"reduce/{i}", "", (dims[i], dims[i - 1], 3, 3), count, params)
    for i, (c, size) in enumerate(zip(dims, kernels, strict=True)):
        new, new_stats = {}, {}
        _mini_block(c, size, count, new, new_stats)
        params |= {f"stages/{i}/layer/phases/0/{k}": v[None] for k, v in new.items()}
        stats |= {f"stages/{i}/layer/phases/0/{k}": v[None] for k, v in new_stats.items()}
    c = dims[-1]
    params |= {"norm/scale": P((c,), next(count)), "norm/bias": W((c,), next(count))}
    params |= {"head/kernel": linear(classes, c, next(count)), "head/bias": W((classes,), next(count))}
    assert next(count) == 115
    return params, stats


def _conv_norm(prefix: str, suffix: str, shape, count: Iterator[int], params: Arrays) -> None:
    params[f"{prefix}/conv{suffix}/kernel"] = conv(shape, next(count))
    params[f"{prefix}/conv{suffix}/bias"] = W(shape[:1], next(count))
    params[f"{prefix}/norm{suffix}/scale"] = P(shape[:1], next(count))
    params[f"{prefix}/norm{suffix}/bias"] = W(shape[:1], next(count))


def _numbered_norm(prefix: str, c: int, count: Iterator[int], params: Arrays, stats: Arrays) -> None:
    i = next(count)
    params[f"{prefix}/scale"], params[f"{prefix}/bias"] = P((c,), i), W((c,), next(count))
    stats[f"{prefix}/mean"], stats[f"{prefix}/var"] = W((c,), i + 0.5), V((c,), i + 0.25)


def _mini_block(c: int, size: int, count: Iterator[int], params: Arrays, stats: Arrays) -> None:
    params["layer_scale"] = P((c,), next(count))
    params["dw/large/kernel" if size >= 7 else "dw/kernel"] = depthwise(c, size, next(count))
    if size >= 7:
        _numbered_norm("dw/large_norm", c, count, params, stats)
        for dilation, small in BRANCHES[size].items():
            params[f"dw/branches/d{dilation}/kernel"] = depthwise(c, small, next(count))
            _numbered_norm(f"dw/norms/d{dilation}", c, count, params, stats)
    _numbered_norm("norm", c, count, params, stats)
    q = c // 4
    params["se/down/kernel"], params["se/down/bias"] = linear(q, c, next(count)), W((q,), next(count))
    params["se/up/kernel"], params["se/up/bias"] = linear(c, q, next(count)), W((c,), next(count))
    params["up/kernel"], params["up/bias"] = linear(4 * c, c, next(count)), W((4 * c,), next(count))
    params["grn/scale"], params["grn/bias"] = W((4 * c,), next(count)), W((4 * c,), next(count))
    params["down/kernel"] = linear(c, 4 * c, next(count))
    _numbered_norm("down_norm", c, count, params, stats)

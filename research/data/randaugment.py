"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) on blocks of uint8 images, with timm's increasing severities.

`num_ops=2, magnitude=9, std=0.5, probability=0.5` is close to timm's `rand-m9-mstd0.5-inc1`, with the operations of
the paper (identity among them, no invert and no solarize_add). Examples are grouped by the operation that they drew
and each group is done at once: pixel operations are tables [B, C, 256] that are looked up, equal to those of Pillow to
within one step of 255; geometric ones are done by Pillow itself.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Real, UInt8

from research.errors import UserError

MAX_MAGNITUDE = 10.0
Block = UInt8[np.ndarray, "B H W C"]
Levels = Float[np.ndarray, " B"]
_STREAMS_PER_OP = 5


def apply(
    images: Block, num_ops: int, magnitude: float, std: float, probability: float, draw: Callable[[int], Levels]
) -> Block:
    """Applies `num_ops` operations to each image, each drawn uniformly and applied with `probability`.

    The magnitude of each application is normal(magnitude, std), clipped to 0..10. `draw(stream)` gives one uniform
    number in [0, 1) for each example.
    """
    if images.dtype != np.uint8:
        raise UserError(f"randaugment needs uint8 images, not {images.dtype}; turn it off or give uint8.")
    names = [name for name in OPS if images.shape[3] == 3 or name not in COLOUR_OPS]
    images = images.copy()
    for k in range(num_ops):
        which, happens, sign, u, v = (draw(k * _STREAMS_PER_OP + j) for j in range(_STREAMS_PER_OP))
        normal = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)
        levels = np.clip(magnitude + std * normal, 0, MAX_MAGNITUDE) / MAX_MAGNITUDE
        signed = np.where(sign < 0.5, -levels, levels)
        chosen = np.where(happens < probability, (which * len(names)).astype(np.int64), -1)
        for number, name in enumerate(names):
            rows = np.flatnonzero(chosen == number)
            if len(rows) and name != "identity":
                images[rows] = OPS[name](images[rows], signed[rows])
    return images


def _look_up(images: Block, tables: UInt8[np.ndarray, "B C 256"]) -> Block:
    count, _, _, channels = images.shape
    base = (np.arange(count * channels, dtype=np.int32) * 256).reshape(count, 1, 1, channels)
    found: np.ndarray = tables.reshape(-1)[base + images]
    return found


def _histograms(images: Block) -> Int[np.ndarray, "B C 256"]:
    count, _, _, channels = images.shape
    base = (np.arange(count * channels, dtype=np.int32) * 256).reshape(count, 1, 1, channels)
    return np.bincount((base + images).ravel(), minlength=count * channels * 256).reshape(count, channels, 256)


def _same_table(table: Real[np.ndarray, "B 256"], channels: int) -> UInt8[np.ndarray, "B C 256"]:
    return np.repeat(np.clip(table, 0, 255).astype(np.uint8)[:, None], channels, axis=1)


def _blend(degenerate: np.ndarray, images: np.ndarray, signed: Levels) -> np.ndarray:
    """degenerate + factor * (image - degenerate), where the factor is 1 +- 0.9 level, at least 0.1."""
    factor = np.maximum(0.1, 1 + 0.9 * signed).astype(np.float32).reshape(-1, *[1] * (images.ndim - 1))
    degenerate = degenerate.astype(np.float32)
    blended: np.ndarray = np.clip(degenerate + factor * (images - degenerate), 0, 255).astype(np.uint8)
    return blended


def _grey(images: Block) -> np.ndarray:
    """Luma by ITU-R 601-2 in Pillow's fixed point, [B, H, W, 1]."""
    grey: np.ndarray
    if images.shape[3] != 3:
        grey = images.mean(axis=3, keepdims=True).round()
    else:
        weighted = images.astype(np.int64) @ np.array([19595, 38470, 7471])
        grey = ((weighted + 0x8000) >> 16)[..., None]
    return grey


def identity(images: Block, signed: Levels) -> Block:
    return images


def autocontrast(images: Block, signed: Levels) -> Block:
    """Stretches each channel's range to 0..255."""
    seen = _histograms(images) > 0
    low = seen.argmax(axis=2)[..., None]
    high = 255 - seen[..., ::-1].argmax(axis=2)[..., None]
    scale = 255.0 / np.maximum(high - low, 1)
    ramp = np.arange(256)
    table = np.where(high > low, np.trunc(ramp * scale - low * scale), ramp)
    return _look_up(images, np.clip(table, 0, 255).astype(np.uint8))


def equalize(images: Block, signed: Levels) -> Block:
    """Flattens each channel's histogram."""
    histogram = _histograms(images)
    last = 255 - (histogram > 0)[..., ::-1].argmax(axis=2)[..., None]
    step = (histogram.sum(axis=2, keepdims=True) - np.take_along_axis(histogram, last, axis=2)) // 255
    below = np.cumsum(histogram, axis=2) - histogram
    table = np.where(step > 0, (step // 2 + below) // np.maximum(step, 1), np.arange(256))
    return _look_up(images, np.clip(table, 0, 255).astype(np.uint8))


def solarize(images: Block, signed: Levels) -> Block:
    """Inverts pixels from the threshold 256 - 256 level on."""
    ramp, threshold = np.arange(256), 256 - np.trunc(256 * np.abs(signed))[:, None]
    return _look_up(images, _same_table(np.where(ramp < threshold, ramp, 255 - ramp), images.shape[3]))


def posterize(images: Block, signed: Levels) -> Block:
    """Keeps the top 4 - 4 level bits, at least one."""
    dropped = 8 - np.maximum(4 - np.trunc(4 * np.abs(signed)), 1).astype(np.int64)[:, None]
    return _look_up(images, _same_table(np.arange(256) >> dropped << dropped, images.shape[3]))


def contrast(images: Block, signed: Levels) -> Block:
    """Blends with the mean grey of the image."""
    mean = np.floor(_grey(images).mean(axis=(1, 2, 3)) + 0.5)
    ramp = np.broadcast_to(np.arange(256, dtype=np.float32), (len(images), 256))
    return _look_up(images, _same_table(_blend(mean[:, None], ramp, signed), images.shape[3]))


def brightness(images: Block, signed: Levels) -> Block:
    """Blends with black."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.float32), (len(images), 256))
    return _look_up(images, _same_table(_blend(np.zeros((1, 1)), ramp, signed), images.shape[3]))


def color(images: Block, signed: Levels) -> Block:
    """Blends with the grey image."""
    return _blend(_grey(images), images, signed)


def sharpness(images: Block, signed: Levels) -> Block:
    """Blends with a smoothed image; the outermost pixels are not smoothed."""
    wide = images.astype(np.int32)
    if min(images.shape[1:3]) < 3:
        return images
    columns = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    around = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * wide[:, 1:-1, 1:-1]
    smooth = wide.copy()
    smooth[:, 1:-1, 1:-1] = np.floor(around / 13 + 0.5)
    return _blend(smooth, images, signed)


def _affine(images: Block, matrices: Float[np.ndarray, "B 2 3"]) -> Block:
    """Bilinear resampling: output pixel (x, y) reads input matrix @ (x, y, 1), in units of pixels; 0 outside."""
    from PIL import Image

    size, transform, bilinear = images.shape[2:0:-1], Image.Transform.AFFINE, Image.Resampling.BILINEAR
    result = np.empty_like(images)
    for k, matrix in enumerate(matrices.reshape(-1, 6).tolist()):
        if images.shape[3] == 3:
            result[k] = Image.fromarray(images[k]).transform(size, transform, matrix, bilinear)
            continue
        for channel in range(images.shape[3]):
            plane = Image.fromarray(images[k, :, :, channel])
            result[k, :, :, channel] = plane.transform(size, transform, matrix, bilinear)
    return result


def _matrices(count: int, **entries: np.ndarray) -> Float[np.ndarray, "B 2 3"]:
    matrices = np.zeros((count, 2, 3))
    matrices[:, 0, 0] = matrices[:, 1, 1] = 1
    for name, values in entries.items():
        matrices[:, int(name[1]), int(name[2])] = values
    return matrices


def rotate(images: Block, signed: Levels) -> Block:
    """Turns about the centre by up to 30 degrees, counter-clockwise for a positive level."""
    height, width = images.shape[1:3]
    angle = np.deg2rad(30 * signed)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = width / 2, height / 2
    x_shift, y_shift = x - cos * x + sin * y, y - sin * x - cos * y
    return _affine(images, _matrices(len(images), m00=cos, m01=-sin, m02=x_shift, m10=sin, m11=cos, m12=y_shift))


def shear_x(images: Block, signed: Levels) -> Block:
    return _affine(images, _matrices(len(images), m01=0.3 * signed))


def shear_y(images: Block, signed: Levels) -> Block:
    return _affine(images, _matrices(len(images), m10=0.3 * signed))


def translate_x(images: Block, signed: Levels) -> Block:
    return _affine(images, _matrices(len(images), m02=0.45 * signed * images.shape[2]))


def translate_y(images: Block, signed: Levels) -> Block:
    return _affine(images, _matrices(len(images), m12=0.45 * signed * images.shape[1]))


COLOUR_OPS = ("color",)
# The order is part of what a seed means: append only.
OPS: dict[str, Callable[[Block, Levels], Block]] = {
    op.__name__: op
    for op in (
        identity, autocontrast, equalize, rotate, solarize, posterize, contrast, brightness, sharpness,
        shear_x, shear_y, translate_x, translate_y, color,
    )
}  # fmt: skip

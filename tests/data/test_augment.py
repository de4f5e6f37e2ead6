"""Augmentation: independent of the batch, and every operation does what it says (Pillow is the oracle)."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from research.data import augment as aug
from research.data import randaugment as ra
from research.data.augment import Augment, Draws, make_augment
from research.errors import UserError

RNG = np.random.default_rng(0)
# Smooth images of limited range, so that autocontrast and equalize have something to do.
COARSE = [Image.fromarray(RNG.integers(30, 200, (4, 4, 3), dtype=np.uint8)) for _ in range(6)]
SMOOTH, LARGE = (np.stack([np.asarray(image.resize(size, 3)) for image in COARSE]) for size in ((17, 12), (35, 29)))
FULL = dict(
    pad_to=20, crop_padding=3, flip=True, randaugment=(2, 9), random_erasing=0.5, mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4)
)  # fmt: skip
INDICES, EPOCHS = np.array([5, 900, 17, 3, 44, 8]), np.array([0, 0, 1, 1, 2, 0])


@pytest.mark.parametrize(
    "config", [FULL, {"resized_crop": 9, "flip": True}, {"crop_padding": 2, "crop_mode": "reflect"}]
)
def test_an_example_does_not_depend_on_its_batch(config):
    augment = make_augment(config)
    block = augment(SMOOTH, INDICES, EPOCHS, 7)
    order = np.array([4, 1, 0, 5, 3, 2])
    np.testing.assert_array_equal(augment(SMOOTH[order], INDICES[order], EPOCHS[order], 7), block[order])
    for k in range(6):
        np.testing.assert_array_equal(augment(SMOOTH[k : k + 1], INDICES[k : k + 1], EPOCHS[k : k + 1], 7)[0], block[k])
    assert block.dtype == np.float32 and block.flags.c_contiguous
    assert not np.array_equal(block, augment(SMOOTH, INDICES, EPOCHS, 8))
    assert not np.array_equal(block, augment(SMOOTH, INDICES, EPOCHS + 1, 7))
    assert not np.array_equal(block, augment(SMOOTH, INDICES + 1, EPOCHS, 7))


def test_input_is_left_alone():
    before = SMOOTH.copy()
    make_augment(FULL)(SMOOTH, INDICES, EPOCHS, 0)
    np.testing.assert_array_equal(SMOOTH, before)


def test_draws_are_uniform_and_independent():
    count = 20000
    draws = Draws(1, np.zeros(count, np.int64), np.arange(count))
    streams = np.stack([draws(k) for k in range(4)] + [Draws(2, np.zeros(count), np.arange(count))(0)])
    streams = np.vstack([streams, Draws(1, np.ones(count), np.arange(count))(0)])
    assert streams.min() >= 0 and streams.max() < 1
    assert np.abs(np.histogram(streams, 10, (0, 1))[0] / streams.size - 0.1).max() < 0.003
    assert np.abs(np.corrcoef(streams) - np.eye(6)).max() < 0.03
    assert np.abs(np.corrcoef(streams[0][1:], streams[0][:-1])[0, 1]) < 0.03
    # Golden: the augmentation that a seed means must not move between versions.
    np.testing.assert_array_equal(Draws(-3, np.array([2]), np.array([9]))(1), GOLDEN_DRAW)


GOLDEN_DRAW = [0.31986756579179687]


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_shift_crop_gives_every_shift_of_the_padded_image(mode):
    image, count = RNG.integers(1, 256, (1, 5, 7, 2), dtype=np.uint8), 600
    crops = aug.shift_crop(np.repeat(image, count, 0), 2, mode, Draws(0, np.zeros(count), np.arange(count)))
    padded = np.pad(image[0], ((2, 2), (2, 2), (0, 0)), mode="reflect" if mode == "reflect" else "constant")
    shifts = {(y, x): padded[y : y + 5, x : x + 7].tobytes() for y in range(5) for x in range(5)}
    assert {crop.tobytes() for crop in crops} == set(shifts.values())


def test_flip_mirrors_half():
    images = np.repeat(SMOOTH[:1], 1000, 0)
    flipped = aug.random_flip(images, Draws(0, np.zeros(1000), np.arange(1000)))
    mirrored = (flipped == SMOOTH[0][:, ::-1]).all((1, 2, 3))
    assert ((flipped == SMOOTH[0]).all((1, 2, 3)) ^ mirrored).all()
    assert 430 < mirrored.sum() < 570


def test_normalise_pad_and_preprocess():
    config = make_augment({"pad_to": 20, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]})
    result = config.preprocess(SMOOTH)
    mean, std = np.array(config.mean), np.array(config.std)
    np.testing.assert_allclose(result[:, 4:16, 1:18], (SMOOTH / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result[0, 0, 0], -mean / std, rtol=1e-6)
    assert result.shape == (6, 20, 20, 3)
    floats = (SMOOTH / 255).astype(np.float32)
    np.testing.assert_allclose(config.preprocess(floats), result, rtol=1e-5, atol=1e-6)
    # Without chance in it, training sees what evaluation sees.
    np.testing.assert_array_equal(config(SMOOTH, INDICES, EPOCHS, 0), result)


def test_random_erasing_zeroes_one_box_of_the_stated_area():
    count = 2000
    images = np.ones((count, 30, 40, 1), np.float32)
    erased = aug.random_erase(images, 0.25, Draws(0, np.zeros(count), np.arange(count)))[..., 0] == 0
    hit = erased.any((1, 2))
    assert 0.21 < hit.mean() < 0.29
    boxes = erased[hit]
    heights, widths = boxes.any(2).sum(1), boxes.any(1).sum(1)
    np.testing.assert_array_equal(boxes.sum((1, 2)), heights * widths)
    share = heights * widths / 1200
    assert share.max() < 0.36 and share.min() > 0.01 and share.mean() > 0.1


def test_resized_crop_is_a_view_of_the_image():
    ramp = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, :, None] * 5, (48, 48, 3))
    images = np.repeat(ramp[None], 300, 0)
    crops = aug.random_resized_crop(images, 16, (0.25, 1.0), Draws(0, np.zeros(300), np.arange(300)))
    assert crops.shape == (300, 16, 16, 3) and crops.dtype == np.uint8
    spans = crops[:, 8, -1, 0].astype(int) - crops[:, 8, 0, 0]
    # Widths lie between half (area 1/4 at aspect 3/4: 0.43) and the whole of 235.
    assert spans.min() > 0.38 * 235 and spans.max() <= 235 and spans.std() > 20
    centre = make_augment({"resized_crop": 16}).preprocess(images[:1])[0, 8, :, 0] * 255
    assert centre[0] == pytest.approx(240 - centre[-1] - 5, abs=2) and centre[-1] - centre[0] < 0.875 * 240
    assert aug.random_resized_crop(images[..., :1], 16, (0.2, 1), Draws(0, np.zeros(300), np.arange(300))).shape[3] == 1


def pil(image, op, level):
    """The operation as timm does it with Pillow."""
    picture, factor = Image.fromarray(image), max(0.1, 1 + 0.9 * level)
    affine = lambda *m: picture.transform(picture.size, Image.Transform.AFFINE, m, Image.Resampling.BILINEAR)
    width, height = picture.size
    result = {
        "identity": lambda: picture,
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "rotate": lambda: picture.rotate(30 * level, Image.Resampling.BILINEAR),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(256 * abs(level))),
        "posterize": lambda: ImageOps.posterize(picture, max(1, 4 - int(4 * abs(level)))),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "shear_x": lambda: affine(1, 0.3 * level, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, 0.3 * level, 1, 0),
        "translate_x": lambda: affine(1, 0, 0.45 * level * width, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, 0.45 * level * height),
    }[op]()
    return np.asarray(result)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("op", ra.OPS)
def test_operations_equal_pillow(op, channels):
    if channels == 1 and op in ra.COLOUR_OPS:
        pytest.skip("colour operations are not drawn for one channel")
    levels = np.array([-1.0, -0.6, -0.1, 0.13, 0.5, 0.9])
    noise = RNG.integers(0, 256, LARGE.shape, dtype=np.uint8)
    flat = np.full_like(LARGE, 77)
    for images in (LARGE, noise, flat):
        images = images[..., :channels]
        ours = ra.OPS[op](images, levels)
        theirs = np.stack([pil(i.squeeze(), op, v).reshape(i.shape) for i, v in zip(images, levels, strict=True)])
        assert ours.dtype == np.uint8
        # Pillow blends in float32 and rounds its rotation matrix.
        tolerance = 1 if op in ("contrast", "brightness", "sharpness", "color", "rotate") else 0
        assert np.abs(ours.astype(int) - theirs).max() <= tolerance
    # Solarizing by 10% leaves the dark images alone.
    changed = (ra.OPS[op](LARGE[..., :channels], levels) != LARGE[..., :channels]).any((1, 2, 3))
    assert changed.sum() == 0 if op == "identity" else changed.sum() >= 4


def test_geometry_points_the_stated_way():
    image = np.zeros((1, 11, 11, 1), np.uint8)
    image[0, 5, 9] = 200
    turned = ra.rotate(image, np.array([1.0]))[0, :, :, 0]
    assert np.unravel_index(turned.argmax(), turned.shape) == (3, 8), "counter-clockwise by 30 degrees"
    moved = ra.translate_x(image, np.array([3 / (0.45 * 11)]))[0, :, :, 0]
    assert np.unravel_index(moved.argmax(), moved.shape) == (5, 6)


def test_randaugment_probability_draws_and_magnitude():
    images = np.repeat(LARGE[:1], 400, 0)
    draws = Draws(0, np.zeros(400), np.arange(400))
    off = ra.apply(images, 2, 9, 0.5, 0.0, draws)
    np.testing.assert_array_equal(off, images)
    share = lambda p: (ra.apply(images, 1, 9, 0.5, p, draws) != images).any((1, 2, 3)).mean()
    assert share(1.0) == pytest.approx(13 / 14, abs=0.06) and share(0.5) == pytest.approx(13 / 28, abs=0.08)
    distance = lambda m: np.abs(ra.apply(images, 2, m, 0.0, 1.0, draws).astype(int) - images).mean()
    assert distance(1) < distance(5) < distance(10)
    assert ra.apply(images[..., :1], 2, 9, 0.5, 1.0, draws).shape == (400, 29, 35, 1)


def test_make_augment_reads_configs():
    from ml_collections import ConfigDict

    config = ConfigDict({"crop_padding": 2, "randaugment": (2, 9), "mean": 0.5, "std": (0.25,)})
    assert make_augment(config) == Augment(crop_padding=2, randaugment=(2, 9), mean=(0.5,), std=(0.25,))
    assert make_augment(None) == make_augment({}) == Augment()
    assert hash(make_augment(config)) == hash(make_augment(config))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"crop_pading": 1}, ["crop_pading", "crop_padding"]),
        ({"crop_mode": "edge"}, ["'edge'", "reflect"]),
        ({"crop_padding": -1}, ["crop_padding=-1"]),
        ({"randaugment": (2, 11)}, ["(2, 11.0)", "0..10"]),
        ({"randaugment": (0, 9)}, ["(0, 9.0)"]),
        ({"random_erasing": 1.5}, ["random_erasing=1.5"]),
        ({"std": (0.0,)}, ["std"]),
        ({"resized_crop_scale": (0.5, 0.2)}, ["resized_crop_scale"]),
    ],
)
def test_bad_configs(config, words):
    with pytest.raises(UserError) as caught:
        make_augment(config)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_images_that_do_not_fit_the_config():
    call = lambda images, **config: make_augment(config)(images, INDICES, EPOCHS, 0)
    with pytest.raises(UserError, match="pad_to=8"):
        call(SMOOTH, pad_to=8)
    with pytest.raises(UserError, match="3 channels"):
        call(SMOOTH, mean=(0.1, 0.2))
    with pytest.raises(UserError, match="cannot reflect"):
        call(SMOOTH, crop_padding=12, crop_mode="reflect")
    with pytest.raises(UserError, match="uint8"):
        call(SMOOTH.astype(np.float32) / 255, randaugment=(1, 5))


def test_images_become_sequences_of_patches_after_all_else():
    block = {"image": SMOOTH[:, :, :16], "label": np.arange(6)}
    plain, patched = (
        make_augment({"flip": True, "sequence": side}).train(block, INDICES, EPOCHS, 3) for side in (0, 4)
    )
    image, vectors = plain["image"], patched["vectors"]
    assert vectors.shape == (6, 3 * 4, 4 * 4 * 3) and "image" not in patched
    np.testing.assert_array_equal(vectors[2, 5].reshape(4, 4, 3), image[2, 4:8, 4:8])
    pixels = make_augment({"sequence": 1}).evaluate(block)["vectors"]
    np.testing.assert_array_equal(pixels.reshape(6, 12, 16, 3), make_augment({}).evaluate(block)["image"])
    with pytest.raises(UserError, match=r"sequence=5 does not divide.*pad_to=20"):
        make_augment({"sequence": 5}).evaluate(block)

"""The decoder of other people's images: every mode becomes that of the set by a stated rule, what cannot be read is
told."""

import io

import numpy as np
import pytest
from PIL import Image

from research.data.images import MOST_PIXELS, check_image, decode_image
from research.errors import UserError

RED, CLEAR = (200, 10, 30), (200, 10, 30, 0)


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode, colour, size=(2, 1)):
    return Image.new(mode, size, colour)


def palette(transparent):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, 1, 2, 3])
    image.putpixel((1, 0), 1)
    return encoded(image, transparency=1) if transparent else encoded(image)


WHITE = (255, 255, 255)
CASES = {
    "grey in colour": (encoded(plain("L", 7)), 3, [(7, 7, 7)] * 2),
    "grey with alpha lies over white": (encoded(plain("LA", (100, 128))), 3, [(177, 177, 177)] * 2),
    "clear": (encoded(plain("RGBA", CLEAR)), 3, [WHITE] * 2),
    "half clear": (encoded(plain("RGBA", (0, 100, 200, 51))), 3, [(204, 224, 244)] * 2),
    "alpha that the set has": (encoded(plain("RGBA", CLEAR)), 4, [CLEAR] * 2),
    "none where the set has alpha": (encoded(plain("RGB", RED)), 4, [(*RED, 255)] * 2),
    "palette": (palette(False), 3, [RED, (1, 2, 3)]),
    "palette with a clear colour": (palette(True), 3, [RED, WHITE]),
    "bits": (encoded(plain("1", 1)), 3, [WHITE] * 2),
    "colour in grey, by ITU-R 601": (encoded(plain("RGB", RED)), 1, [(69,)] * 2),
    "clear colour in grey": (encoded(plain("RGBA", CLEAR)), 1, [(255,)] * 2),
    "inks": (encoded(plain("CMYK", (0, 255, 255, 55)), "TIFF"), 3, [(200, 0, 0)] * 2),
    "16 bits": (encoded(Image.fromarray(np.array([[0, 25700]], np.uint16))), 3, [(0, 0, 0), (100, 100, 100)]),
    "16 bits, big-endian": (encoded(Image.fromarray(np.array([[65535, 257]], np.uint16)), "TIFF"), 1, [(255,), (1,)]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_mode_becomes_that_of_the_set(case):
    data, channels, pixels = CASES[case]
    image = decode_image(data, channels)
    assert image.dtype == np.uint8 and image.shape == (1, 2, channels)
    np.testing.assert_array_equal(image[0], pixels)
    check_image(data)


def test_photographs_are_turned_as_they_were_taken():
    image = Image.fromarray(np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    np.testing.assert_array_equal(decode_image(encoded(image, exif=exif), 1)[..., 0], [[120, 0], [160, 40], [200, 80]])


def noise(kind):
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)), kind)


def bomb():
    return encoded(Image.new("1", (MOST_PIXELS // 4096 + 1, 4096)))


DAMAGED = {
    "jpeg cut short": (noise("JPEG")[:-300], "truncated"),
    "png cut short": (noise("PNG")[:-300], "truncated|broken"),
    "gif cut short": (noise("GIF")[:-300], "truncated|not enough|decode"),
    "nothing": (b"", "it is empty"),
    "text": (b"<html>not found</html>", "cannot identify image file"),
    "a program's input": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify image file"),
    "floats": (encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "floating-point"),
    "more than memory": (bomb(), "16385x4096 are more than 67,108,864 pixels"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_cannot_be_read_says_why(case):
    data, word = DAMAGED[case]
    with pytest.raises(UserError, match=word) as told:
        decode_image(data, 3)
    assert "\n" not in str(told.value) and len(str(told.value)) < 120
    if case != "floats":
        with pytest.raises(UserError, match=word):
            check_image(data)

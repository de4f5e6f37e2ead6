"""Images of other people's files: one decoder, which brings every kind to that of the data set.

The rules: the first frame counts; it is turned as its EXIF orientation says; colours of a palette are looked up; CMYK
and the like become RGB as Pillow converts them; 16 bits become 8 by v / 257, rounded; what is transparent lies over
white, unless the data set itself has four channels; grey is repeated where colour is wanted, colour weighed by ITU-R
601-2 where grey is.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from research.errors import UserError
from research.files import printable

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels of a data set -> Pillow's mode."""
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
"""What is read; formats that Pillow hands to other programs (EPS) are not."""
MOST_PIXELS = 2**26
"""Of an image: a few bytes may claim more than memory holds."""
warnings.filterwarnings(
    "ignore", module=r"PIL\."
)  # about damaged images, which are errors here, and for good: threads decode
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode_image(data: bytes, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Returns the pixels of an encoded image, with so many channels (1, 3 or 4).

    Raises:
      UserError: no image, a format that is not read, too large, cut short or damaged; without the image's name.
    """
    from PIL import ImageOps

    with _decoding():
        image = _opened(data)
        image.seek(0)
        image.load()
        return _converted(ImageOps.exif_transpose(image), channels)


def check_image(data: bytes) -> None:
    """Raises the errors of `decode_image` that show without decoding; an image whose end is not where it should be is
    decoded."""
    with _decoding():
        image = _opened(data)
        ends = {"JPEG": b"\xff\xd9" in data[-64:], "MPO": True, "PNG": b"IEND" in data[-16:]}
        if not ends.get(image.format, False):
            image.load()


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turns whatever a decoder raises at damaged bytes into a UserError, but for memory that does not suffice."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split()).split(" <_io")[0]
        raise UserError(printable(told or type(error).__name__, 100)) from None


def _opened(data: bytes) -> Any:
    from PIL import Image

    if not data:
        raise UserError("it is empty")
    Image.init()  # or the formats beyond the most usual are not known yet
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise UserError(f"{image.width}x{image.height} are more than {MOST_PIXELS:,} pixels")
    return image


def _converted(image: Any, channels: int) -> UInt8[np.ndarray, "H W C"]:
    from PIL import Image

    if image.mode == "F":
        raise UserError("its pixels are floating-point numbers, which have no range of their own")
    if image.mode in _SIXTEEN_BITS:
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    wanted = MODES[channels]
    if image.has_transparency_data and wanted != "RGBA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    elif image.mode not in ("L", "RGB", "RGBA", "1"):
        image = image.convert("RGBA" if wanted == "RGBA" else "RGB")  # palettes, CMYK, YCbCr, LAB, HSV
    pixels = np.asarray(image if image.mode == wanted else image.convert(wanted))
    return pixels.reshape(*pixels.shape[:2], channels)

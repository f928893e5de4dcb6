"""Reads one image file as 8-bit RGB (or grey) pixels, by the rules of 20-trainer 7.

Used by `verify` (once, in `prepare`) and by the data sets of each step. The rules: the content, not
the name, says the format; alpha is composited on white; EXIF orientation is applied; 16 bits are
scaled to 8; the first frame of an animation counts; truncated or above 100 megapixels is an error.
It never repairs, skips or replaces an image: that would change labels silently.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import (
    Image,
    TiffImagePlugin,  # noqa: F401  # registers its format
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  # registers its format
)

from qtt_trainer.data_errors import DecodeError
from qtt_trainer.scan import raise_storage

MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MODES = {1: "L", 3: "RGB"}

Image.MAX_IMAGE_PIXELS = None
"""Our own limit is checked before any pixel is decoded; Pillow's would warn below it."""

# Registered now, because threads would race where Pillow does it lazily; not by `init`, which
# imports forty plugins for formats that are not read.
Image.preinit()

_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DECODER_ERRORS = (
    OSError,  # the bytes are in memory: every OSError is Pillow's, none the volume's
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    AssertionError,
    BufferError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders were seen to raise on damaged files (found by fuzzing)."""


def read_image(path: Path, *, channels: int = 3) -> Image.Image:
    """The pixels of a file as an RGB (3 channels) or L (1 channel) image.

    Raises: DecodeError if it is no readable image, DataUnreachableError if the volume failed,
    OSError (FileNotFoundError, …) if it cannot be opened.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise_storage(error, path)
        raise
    return decode(content, channels=channels)


def decode(content: bytes, *, channels: int = 3) -> Image.Image:
    """As `read_image`, from bytes. Raises: DecodeError."""
    with _decoder_errors(content):
        image = _open(content)
        image.load()
        return _upright(_eight_bits(image, MODES[channels]), _orientation(image))


def check(content: bytes) -> tuple[int, int, str]:
    """Decode fully and return (width, height) as displayed and the format's name.

    JPEGs are decoded at a reduced scale: all their data is still read, in a third of the time.
    Raises: DecodeError.
    """
    with _decoder_errors(content):
        image = _open(content)
        width, height = image.size
        kind = image.format or ""
        if kind == "JPEG":
            image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
        _eight_bits(image, "RGB")
        if _orientation(image) >= 5:
            width, height = height, width
        return width, height, kind


def _open(content: bytes) -> Image.Image:
    """An image whose header was read and whose size is allowed, not yet decoded."""
    if not content:
        raise DecodeError("empty file (0 bytes)")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels exceed the limit of 100 megapixels")
    return image


@contextmanager
def _decoder_errors(content: bytes) -> Iterator[None]:
    """Every way in which a decoder fails becomes DecodeError with a short reason."""
    try:
        yield
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError(f"not an image of a supported format ({len(content)} bytes)") from error
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DecodeError(f"damaged: {reason}") from error


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_scaled(np.asarray(image), floating=image.mode == "F"))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    elif image.mode == "LAB":
        image = _from_lab(image)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def _scaled(values: npt.NDArray[Any], *, floating: bool) -> npt.NDArray[np.uint8]:
    """16-bit integers (0 … 65535) or floats (0 … 1, else 0 … 255) as bytes."""
    wide = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=255.0, neginf=0.0)
    if not floating:
        wide = wide / 257.0  # 65535 = 255 * 257
    elif wide.max(initial=0.0) <= 1.0:
        wide = wide * 255.0
    return np.rint(np.clip(wide, 0.0, 255.0)).astype(np.uint8)


def _from_lab(image: Image.Image) -> Image.Image:
    """Pillow converts LAB through a colour profile only."""
    from PIL import ImageCms

    transform = ImageCms.buildTransform(
        ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
    )
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 … 8; damaged EXIF data counts as upright, the pixels are still good."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _TRANSPOSE.get(orientation)
    return image if method is None else image.transpose(method)

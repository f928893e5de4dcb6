"""Decoding rules: what each odd file becomes, and that a broken one is refused, never repaired."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qtt_trainer.data_errors import DecodeError
from qtt_trainer.decode import check, decode, read_image

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged metadata


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(content: bytes, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    image = decode(content)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def png16(values: np.ndarray, colour: int) -> bytes:
    """A 16-bit PNG written by hand: Pillow cannot write 16-bit colour. colour 0 grey, 2 RGB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# --- pixels ------------------------------------------------------------------------------------


def test_alpha_is_composited_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))

    content = encoded(image)

    assert pixel(content, 0) == (255, 0, 0)
    assert pixel(content, 1) == (255, 255, 255)


def test_half_transparent_black_is_grey():
    assert pixel(encoded(Image.new("LA", (1, 1), (0, 128)))) == (127, 127, 127)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 200])
    image.putpixel((1, 0), 1)

    content = encoded(image, kind, transparency=0)

    assert pixel(content, 0) == (255, 255, 255)
    assert pixel(content, 1) == (10, 20, 200)


def test_a_transparent_colour_of_an_rgb_file_is_white():
    content = encoded(Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9))

    assert pixel(content) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_all_256_levels():
    ramp = np.linspace(0, 65535, 1600).round().astype(np.uint16)[None]

    grey = np.asarray(decode(png16(ramp, 0)))[0, :, 0]

    assert grey[0] == 0
    assert grey[-1] == 255
    assert len(np.unique(grey)) == 256
    assert np.abs(grey - ramp[0] / 257.0).max() <= 0.5


def test_sixteen_bit_colour_is_scaled():
    values = np.array([[[65535, 0, 32768]]], np.uint16)

    assert pixel(png16(values, 2)) == (255, 0, 128)


def test_sixteen_bit_tiff_is_scaled_like_png():
    values = np.array([[0, 257 * 100, 65535]], np.uint16)

    content = encoded(Image.fromarray(values), "TIFF")

    assert np.asarray(decode(content))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[0.0, 0.5, 1.0]], [0, 128, 255]), ([[0.0, 100.0, 300.0]], [0, 100, 255])],
    ids=["0..1", "0..255"],
)
def test_float_tiff_is_read_by_its_range(values, expected):
    content = encoded(Image.fromarray(np.array(values, np.float32)), "TIFF")

    assert np.asarray(decode(content))[0, :, 0].tolist() == expected


def test_not_a_number_in_a_float_tiff_is_black():
    content = encoded(Image.fromarray(np.array([[np.nan, 1.0]], np.float32)), "TIFF")

    assert np.asarray(decode(content))[0, :, 0].tolist() == [0, 255]


def test_cmyk_becomes_rgb():
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)

    red, green, blue = pixel(content)

    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_mode_asked_for(mode, channels):
    image = Image.new(mode, (3, 2)) if mode != "I;16" else Image.fromarray(np.ones((2, 3), "u2"))

    decoded = decode(encoded(image), channels=channels)

    assert decoded.mode == {1: "L", 3: "RGB"}[channels]
    assert decoded.size == (3, 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:4, :8] = (255, 0, 0)  # red in the corner that is stored first
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind in {"JPEG", "WEBP"} else {}
    content = encoded(Image.fromarray(stored), kind, exif=exif.tobytes(), **options)

    seen = np.asarray(decode(content)).astype(int)

    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0)}
    corner |= {5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert seen.shape[:2] == ((8, 16) if orientation < 5 else (16, 8))
    assert seen[corner[orientation]][0] > 200
    assert check(content)[:2] == (seen.shape[1], seen.shape[0])


def test_damaged_exif_data_does_not_cost_the_image():
    content = encoded(Image.new("RGB", (4, 4)), "JPEG", exif=b"Exif\0\0garbage" * 3)

    assert decode(content).size == (4, 4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}

    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)

    assert pixel(content) == (255, 0, 0)


def test_the_content_says_the_format_not_the_name(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.new("RGB", (2, 2), "blue"), "PNG"))

    assert read_image(path).getpixel((0, 0)) == (0, 0, 255)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"hello, I am no image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image|damaged"),
    ],
    ids=["empty", "text", "eps", "header-only"],
)
def test_what_is_no_image_is_refused_with_a_reason(content, words):
    with pytest.raises(DecodeError, match=words):
        decode(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("function", [decode, check])
def test_a_truncated_image_is_damaged(kind, function, draw_glyph):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    content = encoded(Image.fromarray(noise), kind)

    for share in (0.3, 0.6, 0.9):
        with pytest.raises(DecodeError):
            function(content[: int(share * len(content))])


def test_above_100_megapixels_is_refused_before_decoding():
    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = struct.pack(">II", 20_000, 5_001)  # IHDR; its checksum follows
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))

    with pytest.raises(DecodeError, match="20000 x 5001 pixels exceed"):
        decode(bytes(content))


def test_100_megapixels_are_allowed():
    content = encoded(Image.new("1", (10_000, 10_000)))

    assert check(content)[:2] == (10_000, 10_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_bytes_end_in_an_image_or_a_decode_error_and_nothing_else(kind, draw_glyph):
    """Fuzz: flips, cuts, insertions. Pillow raises a dozen kinds of errors; one comes out."""
    rng = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    glyph = draw_glyph("7", np.random.default_rng(0))
    options = {"exif": exif.tobytes()} if kind in {"JPEG", "PNG", "WEBP", "TIFF"} else {}
    good = encoded(glyph, kind, **options)
    refused = 0

    for _ in range(300):
        content = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(min(len(content), rng.choice([64, len(content)])))
            action = rng.random()
            if action < 0.7:
                content[place] = rng.randrange(256)
            elif action < 0.85:
                del content[place : place + rng.randint(1, 20)]
            else:
                content[place:place] = rng.randbytes(rng.randint(1, 20))
        outcomes = [_outcome(function, bytes(content)) for function in (decode, check)]
        refused += outcomes[0] is DecodeError
        assert outcomes[0] == outcomes[1], "what prepare accepts, a step must be able to read"

    assert refused > 0


def _outcome(function, content: bytes) -> type | None:
    try:
        function(content)
    except DecodeError:
        return DecodeError
    return None

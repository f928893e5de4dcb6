"""Made-up image data sets: what the shipped prior `tiny` is meta-learned on. No digits, no letters.

A data set is a pure function of its number, which decides everything: the family of pictures, the
number of classes and of images, size, noise, colour and imbalance. What a class looks like
is drawn anew for each data set: its *theme*. Pictures are arrays in [0, 1] of (side, side) or
(side, side, 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Picture = NDArray[np.float64]
Theme = NDArray[np.float64]
"""(classes, numbers): what tells the classes of one data set apart."""
DRAWN = 96
"""Pixels of a side while lines are drawn; shrunk at the end, for smooth edges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSet:
    """What data set `number` is."""

    number: int
    family: str
    classes: int
    train: int
    val: int
    side: int
    noise: float
    """Deviation of what is added to each pixel."""
    jitter: float
    """How much pictures of a class differ, 1 = as the family means it."""
    imbalance: float
    """Images of the largest class over those of the smallest."""
    coloured: bool

    @property
    def name(self) -> str:
        """`07-gratings`."""
        return f"{self.number:02d}-{self.family}"


def picture_set(number: int) -> PictureSet:
    """The data set of that number. Families take turns; all else is drawn."""
    rng = np.random.default_rng([number, 1])
    family = sorted(FAMILIES)[number % len(FAMILIES)]
    classes = int(rng.choice([2, 3, 4, 5, 6, 8, 10]))
    train = max(int(np.exp(rng.uniform(math.log(70), math.log(180)))), 10 * classes)
    return PictureSet(
        number=number, family=family, classes=classes, train=train,
        val=max(45, train // 3), side=int(rng.choice([8, 12, 16, 20, 28])),
        noise=float(rng.choice([0.01, 0.03, 0.08])),
        jitter=float(rng.choice([0.3, 0.6, 1.0])),
        imbalance=float(rng.choice([1, 1, 1, 2, 4])), coloured=bool(rng.random() < 0.25),
    )  # fmt: skip


def write_pictures(what: PictureSet, folder: Path) -> None:
    """Train and val folders of PNGs, one folder a class."""
    rng = np.random.default_rng([what.number, 2])
    make, draw = FAMILIES[what.family]
    theme = make(what.classes, rng)
    tint = rng.uniform(0.35, 1.0, 3)
    for split, count in (("train", what.train), ("val", what.val)):
        for label, images in enumerate(class_sizes(what, count)):
            place = folder / split / f"class-{label:02d}"
            place.mkdir(parents=True, exist_ok=True)
            for i in range(images):
                picture = draw(theme[label], rng, what)
                if what.coloured and picture.ndim == 2:
                    picture = picture[..., None] * np.clip(tint + rng.normal(0, 0.1, 3), 0, 1)
                noisy = picture + rng.normal(0, what.noise, picture.shape)
                pixels = np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i:04d}.png")


def class_sizes(what: PictureSet, count: int) -> list[int]:
    """Images of each class, falling geometrically from the first to the last; at least two."""
    share = np.geomspace(what.imbalance, 1.0, what.classes)
    return [max(2, round(float(part))) for part in count * share / share.sum()]


# --- tools ---------------------------------------------------------------------------------------


def _shrunk(canvas: Image.Image, what: PictureSet) -> Picture:
    small = canvas.resize((what.side, what.side), Image.Resampling.BOX)
    return np.asarray(small, np.float64) / 255


def _grid(what: PictureSet) -> tuple[Picture, Picture]:
    """Coordinates in [-1, 1]."""
    y, x = np.mgrid[-1 : 1 : what.side * 1j, -1 : 1 : what.side * 1j]
    return y, x


def _moved(points: Picture, rng: np.random.Generator, amount: float) -> list[tuple[float, float]]:
    """Points of [-1, 1]² turned, scaled and shifted a little, on the canvas."""
    angle, scale = rng.normal(0, 0.2 * amount), math.exp(rng.normal(0, 0.12 * amount))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = points @ turn * scale * 0.7 + rng.normal(0, 0.08 * amount, 2)
    return [(float(a), float(b)) for a, b in (moved + 1) * DRAWN / 2]


def _field(rng: np.random.Generator, side: int, exponent: float, stretch: float) -> Picture:
    """Noise whose power falls with frequency; `stretch` makes it longer one way. In [0, 1]."""
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    power = np.hypot(fy * stretch, fx / stretch)
    power[0, 0] = np.inf
    waves = np.fft.fft2(rng.normal(size=(side, side))) * power**-exponent
    found = np.real(np.fft.ifft2(waves))
    return np.asarray(0.5 + 0.2 * (found - found.mean()) / (found.std() + 1e-9))


# --- families: (theme of a data set, one picture of a class) -------------------------------------


def _strokes_theme(classes: int, rng: np.random.Generator) -> Theme:
    """Invented signs of two strokes; the numbers are corners of three points each."""
    return rng.uniform(-1, 1, (classes, 12))


def _stroke(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    t = np.linspace(0, 1, 12)[:, None]
    a, b, c = _jittered(row, rng, what).swapaxes(0, 1)[:, :, None]
    return _lines((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c, rng, what)


def _corners(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    """The same signs with straight strokes."""
    return _lines(_jittered(row, rng, what), rng, what)


def _jittered(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    """(2 strokes, 3 points, 2)"""
    return row.reshape(2, 3, 2) + rng.normal(0, 0.12 * what.jitter, (2, 3, 2))


def _lines(strokes: Picture, rng: np.random.Generator, what: PictureSet) -> Picture:
    canvas = Image.new("L", (DRAWN, DRAWN), int(rng.integers(0, 40)))
    ink = {"fill": int(rng.integers(170, 256)), "width": int(rng.integers(6, 13))}
    path = _moved(strokes.reshape(-1, 2), rng, what.jitter)
    for part in (path[: len(path) // 2], path[len(path) // 2 :]):
        ImageDraw.Draw(canvas).line(part, joint="curve", **ink)
    return _shrunk(canvas.filter(ImageFilter.GaussianBlur(2)), what)


def _shapes_theme(classes: int, rng: np.random.Generator) -> Theme:
    """Corners, depth of the notches between them, height over width."""
    order = rng.permutation([(c, d) for c in (3, 4, 5, 6, 8) for d in (1.0, 0.7, 0.4, 0.25)])
    return np.column_stack([order[np.arange(classes) % len(order)], rng.uniform(0.5, 1, classes)])


def _shape(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    corners, depth, aspect = int(row[0]), row[1], row[2]
    angle = np.linspace(0, 2 * np.pi, 2 * corners, endpoint=False) + rng.uniform(0, 2 * np.pi)
    radius = np.where(np.arange(2 * corners) % 2, depth * math.cos(math.pi / corners), 1.0)
    points = np.column_stack([radius * np.cos(angle), aspect * radius * np.sin(angle)])
    canvas = Image.new("L", (DRAWN, DRAWN), int(rng.integers(0, 120)))
    ImageDraw.Draw(canvas).polygon(
        _moved(points, rng, what.jitter), fill=int(rng.integers(150, 256))
    )
    return _shrunk(canvas, what)


def _gratings_theme(classes: int, rng: np.random.Generator) -> Theme:
    """Direction and waves across the picture."""
    angle = rng.uniform(0, np.pi) + np.linspace(0, np.pi, classes, endpoint=False)
    return np.column_stack([angle, rng.uniform(1.5, 5.0, classes)])


def _grating(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    y, x = _grid(what)
    angle = row[0] + rng.normal(0, 0.08 * what.jitter)
    along = x * math.cos(angle) + y * math.sin(angle)
    waves = row[1] * math.exp(rng.normal(0, 0.06 * what.jitter))
    return 0.5 + rng.uniform(0.15, 0.45) * np.sin(np.pi * waves * along + rng.uniform(0, 6.28))


def _textures_theme(classes: int, rng: np.random.Generator) -> Theme:
    """How smooth a texture is, and how stretched."""
    smooth = rng.permutation(np.linspace(0.0, 2.0, classes))
    return np.column_stack([smooth, np.exp(rng.uniform(-0.7, 0.7, classes))])


def _texture(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    smooth = max(0.0, row[0] + rng.normal(0, 0.08 * what.jitter))
    return _field(rng, what.side, smooth, row[1])


def _templates_theme(classes: int, rng: np.random.Generator) -> Theme:
    """A smooth picture of 8 x 8 for each class."""
    return np.array([_field(rng, 8, 1.2, 1.0).ravel() for _ in range(classes)])


def _template(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    field = np.roll(row.reshape(8, 8), rng.integers(-1, 2, 2), axis=(0, 1))
    other = _field(rng, 8, 1.0, 1.0)
    mixed = field + 0.45 * what.jitter * (other - 0.5)
    canvas = Image.fromarray(np.rint(255 * np.clip(mixed, 0, 1)).astype(np.uint8))
    large = canvas.resize((what.side, what.side), Image.Resampling.BICUBIC)
    return np.asarray(large, np.float64) / 255


def _blobs_theme(classes: int, rng: np.random.Generator) -> Theme:
    """Where three spots are, and how wide."""
    places = rng.uniform(-0.8, 0.8, (classes, 6))
    return np.column_stack([places, rng.uniform(0.15, 0.5, classes)])


def _blobs(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    y, x = _grid(what)
    picture = np.full_like(x, rng.uniform(0, 0.3))
    for cy, cx in row[:6].reshape(3, 2) + rng.normal(0, 0.15 * what.jitter, (3, 2)):
        width = row[6] * math.exp(rng.normal(0, 0.2 * what.jitter))
        picture = np.maximum(picture, np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / width**2))
    return picture


def _gaps_theme(classes: int, rng: np.random.Generator) -> Theme:
    """Where a ring is open, as on an optician's chart."""
    start = rng.uniform(0, 360)
    return np.column_stack(
        [start + np.linspace(0, 360, classes, endpoint=False), np.full(classes, 50.0)]
    )


def _gap(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    canvas = Image.new("L", (DRAWN, DRAWN), int(rng.integers(0, 60)))
    middle, radius = DRAWN / 2 + rng.normal(0, 5 * what.jitter, 2), rng.uniform(24, 38)
    box = [(float(v - radius), float(v + radius)) for v in middle]
    angle = row[0] + rng.normal(0, 6 * what.jitter)
    ImageDraw.Draw(canvas).arc(
        (box[0][0], box[1][0], box[0][1], box[1][1]), angle + row[1] / 2, angle - row[1] / 2 + 360,
        fill=int(rng.integers(150, 256)), width=int(rng.integers(8, 15)),
    )  # fmt: skip
    return _shrunk(canvas, what)


def _tiles_theme(classes: int, rng: np.random.Generator) -> Theme:
    """A tile of 3 x 3 that is repeated."""
    return (rng.random((classes, 9)) < 0.5).astype(np.float64)


def _tiles(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    cells = row.reshape(3, 3)
    flips = rng.random((6, 6)) < 0.04 * what.jitter
    plan = np.abs(np.tile(cells, (2, 2)) - flips)
    plan = np.roll(plan, rng.integers(0, 3, 2), axis=(0, 1))
    low, high = rng.uniform(0, 0.3), rng.uniform(0.6, 1)
    canvas = Image.fromarray(np.rint(255 * (low + (high - low) * plan)).astype(np.uint8))
    return np.asarray(canvas.resize((what.side, what.side)), np.float64) / 255


def _hues_theme(classes: int, rng: np.random.Generator) -> Theme:
    """Two colours."""
    return rng.uniform(0, 1, (classes, 6))


def _hues(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    mask = (_field(rng, what.side, 1.2, 1.0) > 0.5)[..., None]
    colours = np.clip(row.reshape(2, 3) + rng.normal(0, 0.12 * what.jitter, (2, 3)), 0, 1)
    return np.where(mask, colours[0], colours[1])


def _grains_theme(classes: int, rng: np.random.Generator) -> Theme:
    """Chance that a grain is on, its size, how much grains differ."""
    return np.column_stack(
        [rng.uniform(0.1, 0.9, classes), rng.integers(1, 4, classes), rng.uniform(0, 1, classes)]
    )


def _grains(row: Theme, rng: np.random.Generator, what: PictureSet) -> Picture:
    size = math.ceil(what.side / row[1])
    share = np.clip(row[0] + rng.normal(0, 0.04 * what.jitter), 0.02, 0.98)
    on = rng.random((size, size)) < share
    shade = 0.75 + 0.25 * row[2] * rng.normal(size=(size, size))
    grains = np.where(on, shade, 0.15)
    whole = grains.repeat(int(row[1]), axis=0).repeat(int(row[1]), axis=1)
    return whole[: what.side, : what.side]


FAMILIES: dict[
    str,
    tuple[
        Callable[[int, np.random.Generator], Theme],
        Callable[[Theme, np.random.Generator, PictureSet], Picture],
    ],
] = {
    "blobs": (_blobs_theme, _blobs),
    "corners": (_strokes_theme, _corners),
    "gaps": (_gaps_theme, _gap),
    "grains": (_grains_theme, _grains),
    "gratings": (_gratings_theme, _grating),
    "hues": (_hues_theme, _hues),
    "shapes": (_shapes_theme, _shape),
    "strokes": (_strokes_theme, _stroke),
    "templates": (_templates_theme, _template),
    "textures": (_textures_theme, _texture),
    "tiles": (_tiles_theme, _tiles),
}

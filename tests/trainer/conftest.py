"""Small image folders for the trainer's tests: digits drawn with Pillow's own font."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

Draw = Callable[..., Image.Image]
MakeFolder = Callable[..., Path]


def _draw_glyph(text: str, rng: np.random.Generator, px: int = 32) -> Image.Image:
    """A bright character of jittered size, place and angle on a dark, smooth background (RGB)."""
    size = float(rng.uniform(0.7, 0.9)) * px
    mask = Image.new("L", (px, px), 0)
    centre = tuple(px / 2 + rng.uniform(-0.06, 0.06, 2) * px)
    ImageDraw.Draw(mask).text(
        centre, text, fill=255, font=ImageFont.load_default(size=size), anchor="mm"
    )
    mask = mask.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR)
    shade = np.linspace(*rng.uniform(10, 70, 2), px)[:, None] * np.ones((1, px))
    paper = Image.fromarray(np.repeat(shade[..., None], 3, 2).astype(np.uint8))
    ink = Image.new("RGB", (px, px), tuple(int(v) for v in rng.integers(190, 256, 3)))
    return Image.composite(ink, paper, mask)


def _make_folder(
    root: Path, splits: Mapping[str, Mapping[str, int]], *, px: int = 32, seed: int = 0
) -> Path:
    """`{"train": {"0": 8}, ...}` as an ImageFolder of PNG files; a class draws its first letter."""
    rng = np.random.default_rng(seed)
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                _draw_glyph(name[0], rng, px).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture(scope="session")
def draw_glyph() -> Draw:
    """`draw_glyph("7", rng, px)` -> an RGB image."""
    return _draw_glyph


@pytest.fixture(scope="session")
def make_folder() -> MakeFolder:
    """`make_folder(root, {"train": {"0": 8}, "val": {"0": 4}}, px=32, seed=0)` -> root."""
    return _make_folder


@pytest.fixture(scope="session")
def glyph_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 8 training and 4 validation images each, 32 px. Shared: never change it."""
    splits = {"train": dict.fromkeys("012", 8), "val": dict.fromkeys("012", 4)}
    return _make_folder(tmp_path_factory.mktemp("glyphs"), splits)

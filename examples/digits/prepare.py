"""Writes the 1,797 scanned digits that ship with scikit-learn as train, val and test folders.

    python examples/digits/prepare.py      # examples/digits/digits/{train,val,test}/{0..9}/*.png

Real scans (UCI Optical Recognition of Handwritten Digits, 8 x 8 pixels), enlarged to 32 x 32. The
split is stratified and seeded; a second call finds the folder complete and leaves it alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIZES = {"train": 1000, "val": 397, "test": 400}
PIXELS, SEED, LEVELS = 32, 0, 16
MARK = ".complete"


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Row numbers of each split; every digit has the same share everywhere."""
    rows = np.arange(len(labels))
    rest, test = train_test_split(rows, test_size=SIZES["test"], stratify=labels, random_state=SEED)
    train, val = train_test_split(
        rest, test_size=SIZES["val"], stratify=labels[rest], random_state=SEED
    )
    return {"train": train, "val": val, "test": test}


def write_tree(target: Path) -> None:
    """Write every split below `target`."""
    digits = load_digits()
    for split, rows in split_indices(digits.target).items():
        for label in range(10):
            (target / split / str(label)).mkdir(parents=True, exist_ok=True)
        for row in rows:
            grey = np.rint(digits.images[row] * (255 / LEVELS)).astype(np.uint8)
            picture = Image.fromarray(grey).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
            picture.save(target / split / str(digits.target[row]) / f"{row:04d}.png")


def prepare(target: Path) -> bool:
    """Make the folder unless it is complete, whole or not at all; True if it was made."""
    if (target / MARK).exists():
        return False
    for stale in target.parent.glob(f".{target.name}.*"):  # of a call that was killed
        shutil.rmtree(stale, ignore_errors=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    write_tree(part)
    (part / MARK).touch()
    shutil.rmtree(target, ignore_errors=True)  # an older layout, or a copy that lost its mark
    part.rename(target)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent / "digits"
    parser.add_argument("--to", type=Path, default=default, help="folder to write (%(default)s)")
    target = parser.parse_args().to
    made = prepare(target)
    counts = ", ".join(f"{count} {split}" for split, count in SIZES.items())
    print(f"{'wrote' if made else 'found'} {target}: {counts} images of 10 digits")


if __name__ == "__main__":
    main()

"""Describes a data set in about thirty numbers that the optimizer conditions on (20-trainer 8).

Last part of `prepare`. Sizes and bytes come from what `verify` saw; pixel statistics from at
most 2000 images. Everything is a pure function of the files: no clock, no randomness, so that two
runs on one data set see the same numbers. Landmarkers are measured in `landmarkers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qtt_trainer.decode import read_image
from qtt_trainer.splits import Assignment
from qtt_trainer.verify import ImageFacts, duplicates

VERSION = 1
MAX_DECODED = 2000
META_ALBUM_SIDE = 128
"""`num_features` of the published meta-data; a constant there, so it is one here."""

Floats = npt.NDArray[np.float64]


def measure(
    assignment: Assignment, images: Mapping[str, ImageFacts], root: Path, *, channels: int = 3
) -> dict[str, float]:
    """Every metafeature but the landmarkers; compat names first, then our own.

    Units: pixels, bytes, shares in [0, 1]; channel statistics of pixels in [0, 1].
    """
    train = [images[path] for path, _ in assignment.splits["train"].samples]
    val = [images[path] for path, _ in assignment.splits["val"].samples]
    labels = [label for _, label in assignment.splits["train"].samples]
    measured = {
        **compat(len(train) + len(val), len(assignment.class_names)),
        "n_train": float(len(train)),
        "n_val": float(len(val)),
        **class_balance(labels, len(assignment.class_names)),
        **geometry(train),
        "duplicate_share": sum(1 for _ in duplicates(train)) / len(train),
        "overlap_share": overlap_share(train, val),
        **pixels([root / train[i].path for i in spread(len(train), MAX_DECODED)], channels),
    }
    return {name: round(value, 6) for name, value in measured.items()}


def compat(num_samples: int, num_classes: int) -> dict[str, float]:
    """The four descriptors of the published meta-data.

    Source: QTT's target extraction. Samples are train + val, the side is Meta-Album's 128 and the
    channels are 3 whatever the images are; tables that were learned from expect just that.
    """
    return {
        "num_samples": float(num_samples),
        "num_classes": float(num_classes),
        "num_features": float(META_ALBUM_SIDE),
        "num_channels": 3.0,
    }


def class_balance(labels: Sequence[int], num_classes: int) -> dict[str, float]:
    """Images per class, and their entropy as a share of its maximum (1 = balanced)."""
    counts = np.bincount(np.asarray(labels), minlength=num_classes).astype(np.float64)
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum() / np.log(num_classes))
    return {
        "class_images_min": float(counts.min()),
        "class_images_median": float(np.median(counts)),
        "class_images_max": float(counts.max()),
        "class_entropy": entropy,
    }


def geometry(images: Sequence[ImageFacts]) -> dict[str, float]:
    """Sizes as displayed, from headers; `jpeg_bytes_mean` is absent where no image is a JPEG."""
    width = np.array([image.width for image in images], np.float64)
    height = np.array([image.height for image in images], np.float64)
    size = np.array([image.size for image in images], np.float64)
    jpeg = np.array([image.format in {"JPEG", "MPO"} for image in images])
    measured = {
        "width_median": float(np.median(width)),
        "height_median": float(np.median(height)),
        "aspect_median": float(np.median(width / height)),
        "share_below_64": float((np.minimum(width, height) < 64).mean()),
        "jpeg_share": float(jpeg.mean()),
        "bytes_per_pixel": float(np.median(size / (width * height))),
    }
    if jpeg.any():
        measured["jpeg_bytes_mean"] = float(size[jpeg].mean())
    return measured


def pixels(paths: Sequence[Path], channels: int = 3) -> dict[str, float]:
    """Channel means and standard deviations over all pixels, each image weighing the same."""
    means, squares, grey = [], [], 0
    for path in paths:
        values = np.asarray(read_image(path, channels=channels), np.float64) / 255.0
        values = values.reshape(-1, channels)
        means.append(values.mean(axis=0))
        squares.append((values**2).mean(axis=0))
        grey += bool((values == values[:, :1]).all())
    mean: Floats = np.mean(means, axis=0)
    std: Floats = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, 0.0))
    names = ("red", "green", "blue") if channels == 3 else ("grey",)
    return {
        "greyscale_share": grey / len(paths),
        **{f"mean_{name}": float(value) for name, value in zip(names, mean, strict=True)},
        **{f"std_{name}": float(value) for name, value in zip(names, std, strict=True)},
    }


def overlap_share(train: Sequence[ImageFacts], val: Sequence[ImageFacts]) -> float:
    """Share of validation images whose bytes are also a training image."""
    seen = {image.content for image in train}
    return sum(image.content in seen for image in val) / len(val)


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` indices, evenly spread over 0 … count-1; all of them when they are few."""
    if count <= limit:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, limit)]

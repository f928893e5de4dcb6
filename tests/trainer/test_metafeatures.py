"""Metafeatures: against values worked out by hand, and the compat names exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from qtt_trainer.landmarkers import nearest_neighbour, ridge_probe
from qtt_trainer.metafeatures import class_balance, compat, geometry, overlap_share, pixels, spread
from qtt_trainer.verify import ImageFacts


def image(width=10, height=10, size=100, kind="PNG", content=b"a") -> ImageFacts:
    return ImageFacts(
        path="p", width=width, height=height, size=size, format=kind, content=content, edges=""
    )


def test_compat_names_are_the_published_constants():
    assert compat(1397, 10) == {
        "num_samples": 1397.0,
        "num_classes": 10.0,
        "num_features": 128.0,
        "num_channels": 3.0,
    }


def test_balanced_classes_have_entropy_one():
    balance = class_balance([0, 0, 1, 1, 2, 2], 3)

    assert balance["class_entropy"] == pytest.approx(1.0)
    assert (balance["class_images_min"], balance["class_images_max"]) == (2, 2)


def test_entropy_of_a_skewed_pair_by_hand():
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)

    assert class_balance([0, 0, 0, 1], 2)["class_entropy"] == pytest.approx(expected)


def test_geometry_by_hand():
    facts = geometry(
        [image(100, 50, 1000, "JPEG"), image(63, 200, 3000, "JPEG"), image(64, 64, 400)]
    )

    assert facts["width_median"] == 64
    assert facts["height_median"] == 64
    assert facts["aspect_median"] == 1.0
    assert facts["share_below_64"] == pytest.approx(2 / 3)
    assert facts["jpeg_share"] == pytest.approx(2 / 3)
    assert facts["jpeg_bytes_mean"] == 2000
    assert facts["bytes_per_pixel"] == pytest.approx(0.2)


def test_jpeg_bytes_are_absent_without_jpegs():
    assert "jpeg_bytes_mean" not in geometry([image()])


def test_channel_statistics_by_hand(tmp_path):
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    half = Image.new("RGB", (2, 2), (51, 51, 51))
    half.putpixel((0, 0), (153, 153, 153))
    paths = []
    for number, picture in enumerate((red, half)):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    values = np.array([[1, 0, 0]] * 4 + [[0.6] * 3] + [[0.2] * 3] * 3)

    facts = pixels(paths)

    assert facts["greyscale_share"] == 0.5
    for channel, name in enumerate(("red", "green", "blue")):
        assert facts[f"mean_{name}"] == pytest.approx(values[:, channel].mean())
        assert facts[f"std_{name}"] == pytest.approx(values[:, channel].std())


def test_overlap_counts_validation_images():
    train = [image(content=b"a"), image(content=b"b")]

    assert overlap_share(train, [image(content=b"a"), image(content=b"a"), image()]) == 1.0
    assert overlap_share(train, [image(content=b"c"), image(content=b"b")]) == 0.5


def test_spread_takes_all_or_evenly():
    assert spread(3, 5) == [0, 1, 2]
    assert spread(10, 4) == [0, 3, 6, 9]
    assert len(set(spread(5000, 2000))) == 2000


def blobs(rng: np.random.Generator, n: int, gap: float):
    labels = rng.integers(0, 3, n)
    centres = gap * np.eye(3, 8, dtype=np.float32)
    return (centres[labels] + rng.normal(0, 1, (n, 8)).astype(np.float32)), labels


@pytest.mark.parametrize("probe", [nearest_neighbour, ridge_probe])
def test_landmarkers_are_near_one_for_separate_classes_and_near_chance_for_equal_ones(probe):
    rng = np.random.default_rng(0)

    apart = probe(*blobs(rng, 300, 12.0), *blobs(rng, 300, 12.0))
    mixed = probe(*blobs(rng, 300, 0.0), *blobs(rng, 300, 0.0))

    assert apart > 0.97
    assert abs(mixed - 1 / 3) < 0.12


def test_landmarkers_equal_scikit_learns():
    pytest.importorskip("sklearn", reason="the trainer's image has none")
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(1)
    (x, y), (x_new, y_new) = blobs(rng, 240, 2.0), blobs(rng, 160, 2.0)
    neighbour = KNeighborsClassifier(1, metric="cosine").fit(x, y).score(x_new, y_new)
    scale = StandardScaler().fit(x.astype(np.float64))
    ridge = RidgeClassifier(alpha=0.01 * len(x)).fit(scale.transform(x), y)

    assert nearest_neighbour(x, y, x_new, y_new) == pytest.approx(neighbour)
    assert ridge_probe(x, y, x_new, y_new) == pytest.approx(
        ridge.score(scale.transform(x_new), y_new), abs=0.01
    )

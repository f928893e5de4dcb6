"""The made-up picture sets, the runs on them, and the table that searches are simulated on."""

import importlib
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesClassifier

from qtt_core.steps import canonical_json


@pytest.fixture(scope="module")
def curves(root):
    """benchmarks/tiny_curves.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "benchmarks")
        yield importlib.import_module("tiny_curves")
        for name in ("tiny_curves", "tiny_prior", "pictures", "measure"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def small(curves):
    """A data set of thirty pictures."""
    return replace(curves.picture_set(4), classes=3, train=24, val=6, side=8)


def test_a_picture_set_is_a_function_of_its_number(curves, small, tmp_path):
    for name in ("once", "again"):
        curves.write_pictures(small, tmp_path / name)
    once, again = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.png")}
        for name in ("once", "again")
    )
    assert once == again
    assert len(once) == 24 + 6


def test_classes_of_every_family_can_be_told_apart(curves):
    """Else a data set of it teaches nothing. Trees guess unseen pictures better than chance."""
    from pictures import FAMILIES

    for family, (make, draw) in FAMILIES.items():
        rng = np.random.default_rng(0)
        what = replace(curves.picture_set(0), family=family, side=16, jitter=0.5)
        theme, labels = make(3, rng), np.arange(180) % 3
        x = np.array([_summary(draw(theme[label], rng, what)) for label in labels])
        trees = ExtraTreesClassifier(60, random_state=0).fit(x[:120], labels[:120])
        assert trees.score(x[120:], labels[120:]) > 0.5, family


def _summary(picture):
    """Pixels, their distribution, the strength of each wave, the mean colour."""
    grey = picture if picture.ndim == 2 else picture.mean(-1)
    waves = np.abs(np.fft.fft2(grey))[:, :9].ravel()
    colour = picture.reshape(grey.size, -1).mean(0)
    return [*grey.ravel(), *np.sort(grey.ravel())[::8], *waves, *np.broadcast_to(colour, 3)]


def test_no_class_of_a_set_is_empty(curves):
    from pictures import class_sizes

    for number in range(20):
        what = curves.picture_set(number)
        for count in (what.train, what.val):
            sizes = class_sizes(what, count)
            assert len(sizes) == what.classes
            assert min(sizes) >= 2


def test_a_stopped_table_goes_on_where_it_was(curves, small, tmp_path):
    space, hub = curves.demo_space(2)
    part = tmp_path / "part.jsonl"
    curves.write_pictures(small, tmp_path / "data")
    curves.train_all(tmp_path / "data", part, space, hub, configs=1, seed=4, keen=True)
    first = part.read_text()
    part.write_text(first + '{"config": {"am')  # killed while it wrote
    curves.train_all(tmp_path / "data", part, space, hub, configs=2, seed=4, keen=True)
    assert part.read_text().startswith(first)
    header, records = curves.read_shard(part)
    assert header["metafeatures"]["num_classes"] == 3
    assert 0 <= header["metafeatures"]["landmarker_1nn"] <= 1
    assert [len(record["scores"]) for record in records] == [2, 2]
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in records)
    assert records[0]["config"] == space.default()


def test_a_failed_run_of_a_table_fails_where_it_did(curves):
    prior = importlib.import_module("tiny_prior")
    header = {"metafeatures": {"num_classes": 2.0}}
    good = {"config": {"lr": 1}, "state": "ok", "scores": [0.5, 0.9, 0.8], "seconds": [1, 1, 4]}
    bad = {"config": {"lr": 2}, "state": "diverged", "scores": [0.6], "seconds": [2.0]}
    unseen = {"config": {"lr": 3}, "state": "diverged", "scores": [], "seconds": []}
    table = prior.table_of(header, [good, bad, unseen], 3)
    assert table.best == 0.9
    assert [c["lr"] for c in table.configs] == [1, 2]
    assert table.curve({"lr": 2}).diverges_at == 2
    assert table.curve({"lr": 2}).seconds == (2.0, 2.0, 2.0)
    assert table.full_training == 6


def test_the_committed_shards_are_whole_small_and_of_the_demos_space(curves):
    """Reading them checks every configuration against the space."""
    paths = sorted(curves.SHARDS.glob("*.jsonl.gz"))
    meta = importlib.import_module("tiny_prior").meta_dataset(paths)
    made = [curves.read_shard(path)[0]["pictures"] for path in paths]
    assert made == [asdict(curves.picture_set(number)) for number in range(len(paths))]
    assert len(meta.configs) == 30 * len(paths)
    assert sum(path.stat().st_size for path in paths) < 3e6
    assert len({canonical_json(config) for config in meta.configs}) > 0.9 * len(meta.configs)

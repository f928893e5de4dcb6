"""The digits example: real scans as a proper image folder, and a manifest that fits it."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

import qtt_core
from qtt_core.hub import load_hub
from qtt_core.space import build_space
from qtt_core.spec import check_spec, parse_manifest


@pytest.fixture(scope="module")
def example(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "prepare_digits", root / "examples/digits/prepare.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tree(example, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("example") / "digits"
    assert example.prepare(target)
    return target


def test_every_scan_is_in_exactly_one_split(tree, example):
    rows = [path.stem for path in tree.rglob("*.png")]

    assert len(rows) == len(set(rows)) == 1797
    for split, size in example.SIZES.items():
        assert len(list((tree / split).rglob("*.png"))) == size


def test_the_job_of_the_cluster_example_fills_its_claim_with_the_same_splits(
    root, tree, tmp_path, monkeypatch
):
    documents = yaml.safe_load_all((root / "examples/digits/cluster.yaml").read_text())
    claim, job, run = documents
    (container,) = job["spec"]["template"]["spec"]["containers"]
    script = container["command"][-1]
    assert '"/data"' in script
    assert container["image"] == f"quicktune-operator:{qtt_core.__version__}"
    assert claim["metadata"]["annotations"]["quicktune.dev/filled-by"] == job["metadata"]["name"]
    assert run["spec"]["dataset"]["claimName"] == claim["metadata"]["name"]

    exec(compile(script.replace('"/data"', repr(str(tmp_path))), "job", "exec"), {})

    def pictures(folder: Path) -> dict[str, np.ndarray]:
        found = sorted(folder.rglob("*.png"))
        return {p.relative_to(folder).as_posix(): np.asarray(Image.open(p)) for p in found}

    mine, theirs = pictures(tmp_path), pictures(tree)
    assert mine.keys() == theirs.keys()
    assert {picture.shape for picture in mine.values()} == {(32, 32)}
    coarse = [np.abs(m[::4, ::4].astype(int) - theirs[n][2::4, 2::4]) for n, m in mine.items()]
    assert np.mean(coarse) < 20  # the same scan, enlarged in another way


def test_splits_are_stratified(tree):
    shares = []
    for split in ("train", "val", "test"):
        counts = Counter(path.parent.name for path in (tree / split).rglob("*.png"))
        shares.append([counts[str(digit)] / counts.total() for digit in range(10)])

    assert np.ptp(np.array(shares), axis=0).max() < 0.005


def test_files_hold_the_scans_under_their_labels(tree):
    digits = load_digits()
    for path in sorted(tree.rglob("*.png"))[::60]:
        row = int(path.stem)
        small = Image.open(path).resize((8, 8), Image.Resampling.BOX)
        seen = np.asarray(small, float).ravel()
        assert path.parent.name == str(digits.target[row])
        assert np.corrcoef(seen, digits.images[row].ravel())[0, 1] > 0.98


def test_a_second_call_changes_nothing(tree, example):
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}

    assert not example.prepare(tree)
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


def test_a_call_that_was_killed_leaves_nothing_that_looks_complete(example, tmp_path, monkeypatch):
    target = tmp_path / "digits"

    def killed(part: Path) -> None:
        part.mkdir()
        (part / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(example, "write_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            example.prepare(target)
    assert not target.exists()

    assert example.prepare(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits"]
    assert not (target / "half").exists()


def test_the_manifest_is_clean_and_leaves_what_matters_to_the_search(root):
    raw = yaml.safe_load((root / "examples/digits/tuningrun.yaml").read_text())

    run = parse_manifest(raw)
    search = run.spec.search
    space = build_space(
        search.space,
        load_hub(search.hub),
        max_fidelity=run.spec.fidelity.max,
        overrides=search.overrides,
    )
    drawn = space.sample(300, np.random.default_rng(0))

    assert check_spec(run) == []
    assert run.spec.budget.max_steps >= 60
    for name in ("model", "lr", "opt", "data_augmentation", "pct_to_freeze", "mixup"):
        assert len({config[name] for config in drawn}) > 1, name
    assert {config["model"] for config in drawn} == {card.name for card in load_hub("tiny").cards}

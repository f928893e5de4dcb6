"""The paper's experiment: its manifests are valid, its ledgers are folded as the paper does."""

import importlib
import sys

import numpy as np
import pytest

from qtt_core.ledger.events import Done, Open, Run
from qtt_core.ledger.file import Ledger
from qtt_core.spec import parse_manifest


@pytest.fixture(scope="module")
def paper(root):
    """(experiment, fold) as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "benchmarks" / "paper")
        yield importlib.import_module("experiment"), importlib.import_module("fold")
        for name in ("experiment", "fold"):
            sys.modules.pop(name, None)


def ledger(name, ends):
    """A run of full trainings, 10 device-seconds an epoch: `ends` has each one's score."""
    events = [
        Run(
            id="1-0", ep=1, name=name, spec_hash="s", seed=0, algorithm="QuickTune", version="0",
            space_hash="p", spec={"fidelity": {"max": 3, "step": 1}},
        )
    ]  # fmt: skip
    for c, score in enumerate(ends):
        epochs = tuple((epoch, score * epoch / 3, 10.0) for epoch in (1, 2, 3))
        events += [
            Open(id=f"{2 * c + 2}-0", ep=1, c=str(c), frm=0, to=3, h=str(c), res=1.0),
            Done(
                id=f"{2 * c + 3}-0", ep=1, c=str(c), to=3, a=0, state="ok", epochs=epochs, dev=30.0
            ),
        ]  # fmt: skip
    return Ledger(
        name=name, uid=name, configs={str(c): {} for c in range(len(ends))}, events=events
    )


@pytest.fixture
def ledgers(tmp_path):
    runs = {
        "paper-digits-quicktune-d1-s0": (0.6, 0.9),
        "paper-digits-quicktune-d1-s1": (0.7, 0.5, 0.99),
        "paper-digits-random-d1-s0": (0.2,),
        "something-else": (1.0,),
    }  # fmt: skip
    for name, ends in runs.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(ledger(name, ends).lines()))
    return tmp_path


def test_every_manifest_is_valid_and_named_once(paper):
    experiment, fold = paper
    made = [
        experiment.manifest(name, algorithm, step, seed)
        for name in experiment.EXPERIMENTS
        for algorithm in experiment.ALGORITHMS
        for step in experiment.STEPS
        for seed in (0, 9)
    ]
    names = [parse_manifest(run).name for run in made]
    assert len(set(names)) == len(names) == 5 * 2 * 2 * 2
    assert all(fold.NAME.fullmatch(name) for name in names)
    assert {key[0] for key in fold.PUBLISHED} == set(experiment.EXPERIMENTS) - {"digits"}


def test_the_table_counts_what_the_budget_paid_for(paper, ledgers):
    """60 device-seconds: the third training of one seed comes too late."""
    _, fold = paper
    found = fold.trajectories(ledgers.iterdir())
    lines = fold.table(found)
    (ours,) = (line for line in lines if line.startswith("| Digits (ours) | 1 | QuickTune"))
    assert ours == "| Digits (ours) | 1 | QuickTune | 2 | 80.0 [-47.1, 207.1] | - |"
    assert "| Digits (ours) | 1 | FreezeThawRandom | 1 | 20.0 | - |" in lines
    assert sum("not run here" in line for line in lines) == 16


def test_the_interval_is_students(paper):
    _, fold = paper
    values = [84.0, 91.0, 88.0, 95.0]
    error = np.std(values, ddof=1) / 2
    assert fold.interval(values) == f"89.5 [{89.5 - 3.182 * error:.1f}, {89.5 + 3.182 * error:.1f}]"
    assert fold.interval([50.0]) == "50.0"


def test_published_trajectories_are_read_and_drawn_beside_ours(paper, ledgers, tmp_path):
    pytest.importorskip("matplotlib")
    _, fold = paper
    folder = tmp_path / "published" / "Digits-(ours)"
    folder.mkdir(parents=True)
    (folder / "QT (step 2).csv").write_text("time,seed0,seed1\n0,0.0,0.0\n60,50.0,70.0\n")
    runs = fold.released(folder.parent, ("digits", "quicktune", 2))
    assert [runs[i].at(59) for i in (0, 1)] == [0.0, 0.0]
    assert [runs[i].at(60) for i in (0, 1)] == [50.0, 70.0]
    file = tmp_path / "figure.png"
    found = fold.trajectories(path for path in ledgers.iterdir() if path.suffix == ".jsonl")
    fold.figure(found, file, folder.parent)
    assert file.read_bytes().startswith(b"\x89PNG")

"""The example of docs/own-trainer.md: a trainer of one's own, without images, under `qtt run`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

DEADLINE = 120.0
EXAMPLE = Path("examples/own_trainer")


@pytest.fixture(scope="module")
def place(root, tmp_path_factory):
    """A copy of the example with its data."""
    folder = tmp_path_factory.mktemp("own") / "own_trainer"
    shutil.copytree(root / EXAMPLE, folder, ignore=shutil.ignore_patterns("patients"))
    subprocess.run([sys.executable, str(folder / "data.py")], check=True, capture_output=True)
    return folder


def qtt(place, *words):
    command = [sys.executable, "-m", "qtt_operator", *words, "--state-dir", str(place / "state")]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE, check=False, cwd=place
    )


def command(place):
    return f"{sys.executable} {place / 'trainer.py'}"


def settings(place, name, **spec):
    """The example's manifest under another name, shorter."""
    raw = yaml.safe_load((place / "tuningrun.yaml").read_text())
    raw["metadata"]["name"] = name
    raw["spec"].update(spec)
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def job(place, uid, to, start=0, attempt=0, model="linear", seed=3):
    return {
        "schema": 1, "run_uid": uid, "attempt": attempt, "nonce": f"n{attempt}", "config_id": 5,
        "config": {"model": model, "lr": 0.01, "shrinkage": 0.001, "batch_size": 32},
        "fidelity_from": start, "fidelity_to": to, "max_fidelity": 20, "seed": seed,
        "task": {"data": str(place / "patients")}, "paths": {"root": str(place / "direct")},
    }  # fmt: skip


def train(place, document, command="step"):
    """One process of the trainer, as a pod would start it; its answer."""
    path = place / "message"
    path.write_text("")
    done = subprocess.run(
        [sys.executable, str(place / "trainer.py"), command],
        env={**os.environ, "QTT_STEP": json.dumps(document), "QTT_TERMINATION_LOG": str(path)},
        capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    text = path.read_text()
    return done.returncode, json.loads(text) if text else None


def test_the_planner_tunes_it_like_any_other_run(place):
    path = settings(place, "short", budget={"maxSteps": 8}, optimizer={"algorithm": "ASHA"})

    done = qtt(place, "run", str(path), "--trainer", command(place), "--plain", "-o", "json")

    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    ledger = qtt(place, "ledger", "export", "short", "-").stdout.splitlines()
    header, *events = map(json.loads, ledger)
    curves = [(event["c"], json.loads(event["epochs"])) for event in events if event["k"] == "done"]
    trained = [(c, epoch) for c, epochs in curves for epoch, _, _ in epochs]
    assert len(trained) == len(set(trained)) == 16, "eight steps of two epochs, none twice"
    assert all(0 <= score <= 1 for _, epochs in curves for _, score, _ in epochs)
    best = max(epochs[-1][1] for _, epochs in curves)  # a checkpoint stands at a step's end
    assert max(row["value"] for row in rows) == pytest.approx(best, abs=1e-6)
    assert best > 0.2, "it learns: the mean would explain nothing"
    assert {config["model"] for config in header["configs"].values()} <= {"linear", "squares"}
    assert all((place / "state/short/runs").glob(f"*/{row['checkpoint']}") for row in rows)
    logs = qtt(place, "logs", "short", str(rows[0]["config_id"])).stdout
    assert "/attempts/f2.a0 (ok) <==" in logs
    scored = qtt(place, "leaderboard", "short", "--test", str(place))
    assert scored.returncode == 65
    assert "a trainer of its own" in scored.stderr


def test_a_trainer_that_is_broken_ends_the_run_with_its_own_words(place):
    path = settings(place, "broken", budget={"maxSteps": 4})
    script = place / "broken.py"
    script.write_text("raise ZeroDivisionError('of my own')\n")

    done = qtt(place, "run", str(path), "--trainer", f"{sys.executable} {script}", "--plain")

    assert done.returncode == 1, done.stderr  # ended, not Complete
    assert "exit code 1" in done.stderr + done.stdout
    assert "ZeroDivisionError: of my own" in qtt(place, "logs", "broken", "prepare").stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("model", ["linear", "squares"])
def test_its_curve_does_not_depend_on_where_its_jobs_were_cut(place, model):
    code, straight = train(place, job(place, f"a-{model}", 6, model=model))
    told = []
    for start, to in [(0, 1), (1, 4), (4, 6)]:
        told += train(place, job(place, f"b-{model}", to, start, model=model))[1]["epochs"]

    assert code == 0
    assert [e[:2] for e in told] == [e[:2] for e in straight["epochs"]]
    ends = [np.load(place / f"direct/runs/{x}-{model}/c5/f6/state.npz")["w"] for x in "ab"]
    assert np.array_equal(*ends)


def test_its_descent_is_the_ridge_regression_of_the_closed_form(place):
    document = job(place, "ridge", 20)
    document["config"].update(lr=0.1, shrinkage=0.05, batch_size=10_000)
    for start in range(0, 200, 20):  # whole batches: gradient descent on a quadratic
        document.update(fidelity_from=start, fidelity_to=start + 20)
        train(place, document)

    table = np.loadtxt(place / "patients/table.csv", delimiter=",")
    cut = 3 * len(table) // 4
    table = (table - table[:cut].mean(0)) / table[:cut].std(0)
    x, y = table[:cut, :-1], table[:cut, -1]
    exact = np.linalg.solve(x.T @ x / cut + 0.05 * np.eye(10), x.T @ y / cut)
    found = np.load(place / "direct/runs/ridge/c5/f200/state.npz")["w"]
    assert np.allclose(found, exact, atol=0.01)


def test_a_committed_step_is_told_again_and_not_trained(place):
    _, first = train(place, job(place, "again", 2))
    before = (place / "direct/runs/again/c5/f2/state.npz").stat().st_mtime_ns

    code, second = train(place, job(place, "again", 2, attempt=1))

    assert code == 0
    assert second["cached"]
    assert (second["nonce"], second["attempt"]) == ("n1", 1)
    assert second["epochs"] == first["epochs"]
    assert (place / "direct/runs/again/c5/f2/state.npz").stat().st_mtime_ns == before


def test_a_command_it_does_not_know_ends_with_64(place):
    assert train(place, job(place, "x", 1), "evaluate") == (64, None)


@pytest.mark.parametrize(
    ("change", "words", "options"),
    [
        ({}, "--trainer COMMAND", []),
        ({}, "no such program", ["--trainer", "no-such-program-here"]),
        ({"trainer": {"custom": False}, "objective": {"metric": "top1"}}, "--trainer",
         ["--trainer", sys.executable]),
    ],
    ids=["no command", "no program", "not custom"],
)  # fmt: skip
def test_manifest_and_command_must_name_one_trainer(place, change, words, options):
    path = settings(place, "wrong", **change)
    if "trainer" in change:
        raw = yaml.safe_load(path.read_text())
        raw["spec"]["search"] = {"hub": "tiny", "space": "native"}
        path.write_text(yaml.safe_dump(raw))

    done = qtt(place, "run", str(path), *options)

    assert done.returncode == 64
    assert words in done.stderr
    assert "Traceback" not in done.stderr

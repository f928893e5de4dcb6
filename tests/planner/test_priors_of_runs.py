"""A prior made of two local runs by `qtt metatrain`, and the run that begins with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

QTT = (sys.executable, "-m", "qtt_operator")
DEADLINE = 300.0


def manifest(folder, name, portfolio, **optimizer):
    (folder / "images" / "test").mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    raw = {
        "apiVersion": "quicktune.dev/v1alpha1",
        "kind": "TuningRun",
        "metadata": {"name": name},
        "spec": {
            "dataset": {"claimName": "images"},
            "search": {"space": "native", "hub": "tiny", "poolSize": 24, "portfolio": portfolio},
            "fidelity": {"max": 3},
            "optimizer": {"seed": 5, **optimizer},
            "budget": {"maxSteps": 24},
        },
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def toy_run(path, state, *options, data):
    script = Path(__file__).with_name("toy_run.py")
    env = {**os.environ, "TOY_SECONDS": "0.01", "TOY_DATA": data, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, script, str(path), str(state), *options],
        env=env, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip


def qtt(*words):
    return subprocess.run([*QTT, *words], capture_output=True, text=True, timeout=DEADLINE)


def test_a_run_begins_with_what_two_earlier_ones_taught(tmp_path):
    state = tmp_path / "state"
    for name, data in (("one", "a" * 16), ("two", "b" * 16)):
        done = toy_run(manifest(tmp_path, name, "None", algorithm="Random"), state, data=data)
        assert done.returncode == 0, done.stderr

    elsewhere = tmp_path / "elsewhere"  # another machine, to which the ledgers come as files
    for name in ("one", "two"):
        file = str(tmp_path / f"{name}.jsonl")
        qtt("ledger", "export", name, file, "--state-dir", str(state))
        moved = qtt("ledger", "import", file, "--state-dir", str(elsewhere))
        assert moved.returncode == 0, moved.stderr
    shutil.rmtree(state)

    learned = qtt("metatrain", "one", "two", "--name", "ours", "--state-dir", str(elsewhere))
    assert learned.returncode == 0, learned.stderr
    assert "of 2 data sets" in learned.stdout
    assert "spec.search.portfolio: ours" in learned.stdout
    assert "100 %" in learned.stderr
    path = manifest(tmp_path, "three", "ours")
    third = toy_run(path, state, f"--priors={elsewhere / 'priors'}", data="c" * 16)

    assert third.returncode == 0, third.stderr
    exported = qtt("ledger", "export", "three", "-", "--state-dir", str(state)).stdout.splitlines()
    (begun,) = (e for e in map(json.loads, exported[1:]) if e["k"] == "run")
    assert "own/ours@" in json.dumps(begun)
    assert "prior ours" in third.stdout + third.stderr


def test_a_prior_of_one_data_set_is_refused_with_what_is_missing(tmp_path):
    state = tmp_path / "state"
    toy_run(manifest(tmp_path, "one", "None", algorithm="Random"), state, data="a" * 16)

    learned = qtt("metatrain", "one", "--name", "ours", "--state-dir", str(state))

    assert learned.returncode == 64
    assert "bring at least two" in learned.stderr
    assert not (state / "priors" / "ours").exists()

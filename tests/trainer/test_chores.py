"""The commands `garbage` and `recovery`: real processes on a run folder that real steps wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qtt_core.results import MESSAGE_BYTES, State, StepResult
from qtt_trainer import garbage, layout, recovery, volume


def chore(command: str, job: Any, tmp_path: Path) -> tuple[int, StepResult]:
    """Run a cold process with torch out of reach."""
    poison = tmp_path / "poison" / "torch"
    poison.mkdir(parents=True, exist_ok=True)
    (poison / "__init__.py").write_text("raise SystemExit('torch was imported')")
    said = tmp_path / "message"
    ended = subprocess.run(
        [sys.executable, "-m", "qtt_trainer", command, "--job", "-"],
        input=json.dumps(job), text=True, capture_output=True, check=False, timeout=120,
        env={**os.environ, "QTT_TERMINATION_LOG": str(said), "PYTHONPATH": str(poison.parent)},
    )  # fmt: skip
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, StepResult.parse(said.read_text(), nonce="n0", attempt=0)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_garbage_deletes_what_is_listed_and_nothing_else(jobs: Any, tmp_path: Path) -> None:
    for path in ("c1/f1", "c1/f2", "c1/attempts/f1.a0", "c2/f1", "c20/f1"):
        (jobs.run / path).mkdir(parents=True)
        (jobs.run / path / "state.pt").write_text("x")
    before = set(everything(jobs.run))

    code, message = chore("garbage", jobs.base(gc=["c1/f1", "c2", "c9/f9"]), tmp_path)

    assert (code, message.state) == (0, State.OK)
    gone = before - set(everything(jobs.run))
    assert gone == {"c1/f1", "c1/f1/state.pt", "c2", "c2/f1", "c2/f1/state.pt"}
    assert set(everything(jobs.run)) <= before  # no log, no result: the volume may be full


def test_a_whole_run_goes_with_its_folder(jobs: Any, tmp_path: Path) -> None:
    other = jobs.root / "runs" / "run-2"
    other.mkdir()

    code, _ = chore("garbage", jobs.base(gc=["."]), tmp_path)

    assert code == 0
    assert not jobs.run.exists()
    assert other.is_dir()


def test_garbage_that_cannot_be_deleted_is_said(jobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtt_core.jobs import parse_job

    (jobs.run / "c1" / "f1").mkdir(parents=True)
    monkeypatch.setattr(volume, "remove_tree", lambda path: None)  # as on a read-only volume

    ended = garbage.run(parse_job(jobs.base(gc=["c1/f1"]), command="garbage"))

    assert (ended.exit_code, ended.message.state) == (75, State.INFRA_STORAGE)
    assert "c1/f1" in ended.message.reason


def test_recovery_tells_the_curve_that_the_steps_wrote(
    jobs: Any, run_inline: Any, tmp_path: Path
) -> None:
    told = [run_inline(jobs.step(to, start=to - 1)).message for to in (1, 2, 3)]
    shutil.rmtree(jobs.run / "c1" / "f1")  # collected: its epochs are in the newest result

    code, message = chore("recovery", jobs.base(known={}), tmp_path)

    assert (code, message.more) == (0, 0)
    (entry,) = message.recovered
    epochs = [[e.epoch, e.value] for part in told for e in part.epochs]
    assert [row[:2] for row in entry["epochs"]] == epochs
    assert (entry["c"], entry["to"], entry["state"]) == (1, 3, "ok")
    assert entry["ck"] == told[-1].checkpoint_sha256
    assert entry["config"]["model"] == "mini_resnet"
    assert entry["held"] > sum(row[2] for row in entry["epochs"])


def test_recovery_tells_only_what_the_ledger_lacks(
    jobs: Any, run_inline: Any, tmp_path: Path
) -> None:
    for to in (1, 2):
        run_inline(jobs.step(to, start=to - 1))

    _, behind = chore("recovery", jobs.base(known={"1": 1}), tmp_path)
    _, level = chore("recovery", jobs.base(known={"1": 2}), tmp_path)

    assert [row[0] for row in behind.recovered[0]["epochs"]] == [2]
    assert "config" not in behind.recovered[0]
    assert level.recovered == ()


@pytest.mark.parametrize("damage", ["truncated state", "other result", "no manifest"])
def test_a_damaged_checkpoint_is_not_told(jobs: Any, run_inline: Any, damage: str) -> None:
    from qtt_core.jobs import parse_job

    for to in (1, 2):
        run_inline(jobs.step(to, start=to - 1))
    folder = jobs.run / "c1" / "f2"
    if damage == "truncated state":
        (folder / layout.STATE).write_bytes((folder / layout.STATE).read_bytes()[:-1])
    elif damage == "other result":
        text = (folder / layout.RESULT).read_text()
        (folder / layout.RESULT).write_text(text.replace("0", "1", 1))
    else:
        (folder / layout.MANIFEST).unlink()

    message = recovery.run(parse_job(jobs.base(), command="recovery")).message

    assert [entry["to"] for entry in message.recovered] == [1]


def result(run: Path, config_id: int, epochs: int, state: str = "ok") -> None:
    """A committed step of a long run, as the trainer leaves it."""
    folder = run / f"c{config_id}" / f"f{epochs}"
    folder.mkdir(parents=True)
    rows = [
        {"epoch": e, "top1": (1 + config_id) / 7 + e / 1e5, "seconds": 321.123456}
        for e in range(1, epochs + 1)
    ]
    raw = {
        "state": state, "reason": "", "metric": "top1", "curve": rows,
        "config": {f"hyperparameter_{i}": 0.123456789 for i in range(20)},
        "checkpoint": {"sha256": "a" * 64, "bytes": 10**9},
    }  # fmt: skip
    written = volume.write_json(folder / layout.RESULT, raw)
    volume.write_json(folder / layout.MANIFEST, {"files": [written.to_json()]})


def test_many_long_curves_come_page_by_page_and_none_is_lost(tmp_path: Path) -> None:
    from qtt_core.jobs import JobDocument, Paths, Task

    run = layout.run_folder(str(tmp_path), "r")
    lengths = {c: (300 if c % 5 == 0 else 20) for c in range(12)}
    for c, epochs in lengths.items():
        result(run, c, epochs)
    told: dict[int, list[int]] = {}
    for _ in range(60):
        known = {str(c): max(epochs) for c, epochs in told.items()}
        job = JobDocument(
            run_uid="r", attempt=0, nonce="n0", task=Task(data="/d"),
            paths=Paths(root=str(tmp_path)), step_epochs=7, known=known,
        )  # fmt: skip
        message = recovery.run(job).message
        assert len(message.encode().encode()) <= MESSAGE_BYTES
        for entry in message.recovered:
            told.setdefault(entry["c"], []).extend(row[0] for row in entry["epochs"])
        if not message.more:
            break

    assert told == {c: list(range(1, epochs + 1)) for c, epochs in lengths.items()}

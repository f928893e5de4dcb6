"""The process contract: exit code, message, result and log of real processes, for every end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qtt_core.results import EXIT_CODES, State, StepResult
from qtt_trainer.process import locate


def start(command: str, *arguments: str, message: Path, **environment: str) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "qtt_trainer", command, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "QTT_TERMINATION_LOG": str(message), **environment},
    )


def run_cold(command: str, job: Any, message: Path, **environment: str) -> tuple[int, str, str]:
    process = start(command, "--job", "-", message=message, **environment)
    out, err = process.communicate(job if isinstance(job, str) else json.dumps(job), timeout=120)
    return process.returncode, out, err


@pytest.fixture
def message(tmp_path: Path) -> Path:
    return tmp_path / "message"


def test_a_cold_step_leaves_result_message_log_and_progress_that_agree(
    jobs: Any, message: Path
) -> None:
    code, out, err = run_cold("step", jobs.step(2), message)

    assert code == 0, err
    told = StepResult.parse(message.read_text(), nonce="n0", attempt=0)
    folder = jobs.run / "c1" / "f2"
    attempt = jobs.run / "c1" / "attempts" / "f2.a0"
    committed = json.loads((folder / "result.json").read_text())
    left = json.loads((attempt / "result.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    state = next(f for f in manifest["files"] if f["name"] == "state.pt")
    assert told.state is State.OK
    assert [e.epoch for e in told.epochs] == [1, 2]
    assert told.checkpoint_sha256 == state["sha256"] == committed["checkpoint"]["sha256"]
    assert told.checkpoint_bytes == state["bytes"] == (folder / "state.pt").stat().st_size
    assert committed["checkpoint"]["dir"] == "c1/f2"
    assert committed["curve"] == left["curve"]
    assert left["exit_code"] == 0
    assert committed["score"] == told.epochs[-1].value
    assert committed["cost"] == pytest.approx(sum(row["seconds"] for row in committed["curve"]))
    assert [json.loads(line)["epoch"] for line in out.splitlines()][-1] == 2
    assert "epoch 2 of 2" in err
    assert "epoch 2 of 2" in (attempt / "log.txt").read_text()
    assert json.loads((jobs.run / "c1" / "progress.json").read_text())["epochs"] == 2
    timing = left["timing"]
    assert timing["startup"] > timing["eval"] > 0
    parts = ("startup", "data", "train", "eval", "checkpoint")
    assert timing["total"] >= 0.9 * sum(timing[name] for name in parts), "counted twice"


BAD_JOBS = {
    "unknown key": ({"bogus": 1}, State.INVALID_CONFIG, "job.bogus"),
    "wrong type": ({"attempt": "one"}, State.INVALID_CONFIG, "job.attempt"),
    "illegal value": ({"lr": 7}, State.INVALID_CONFIG, "lr"),
    "unknown name": ({"learning": 1}, State.INVALID_CONFIG, "learning"),
    "unknown space": ({"space_id": "moon"}, State.INVALID_CONFIG, "moon"),
    "epochs out of order": ({"fidelity_from": 3}, State.INVALID_CONFIG, "fidelity_to"),
    "path out of the run": ({"gc": ["../x"]}, State.INVALID_CONFIG, "job.gc"),
}


@pytest.mark.parametrize("name", list(BAD_JOBS))
def test_a_bad_job_ends_with_64_and_names_the_field_before_torch_is_loaded(
    jobs: Any, message: Path, name: str
) -> None:
    change, state, field = BAD_JOBS[name]
    job = jobs.step(1)
    target = job["config"] if name in {"illegal value", "unknown name"} else job
    target.update(change)
    poison = message.parent / "poison" / "torch"
    poison.mkdir(parents=True)
    (poison / "__init__.py").write_text("raise SystemExit('torch was imported')")

    code, _, err = run_cold("step", job, message, PYTHONPATH=str(poison.parent))

    assert code == 64, err
    assert "torch was imported" not in err
    assert "Traceback" not in err
    raw = json.loads(message.read_text())
    assert raw["state"] == state.value
    assert field in raw["reason"]
    assert raw["nonce"] == "n0"
    folder = jobs.run / "c1" / "attempts"
    results = list(folder.glob("f1.a*/result.json"))
    assert json.loads(results[0].read_text())["exit_code"] == 64
    assert field in (results[0].parent / "log.txt").read_text()


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"x"', "null"])
def test_what_is_no_job_at_all_ends_with_64(message: Path, text: str) -> None:
    code, _, err = run_cold("step", text, message)

    assert code == 64, err
    assert "Traceback" not in err
    assert json.loads(message.read_text())["state"] == "invalid_config"


def test_the_job_comes_from_a_file_or_the_environment(jobs: Any, message: Path) -> None:
    job = json.dumps(jobs.base() | {"run_uid": "run-2"})
    file = message.parent / "job.json"
    file.write_text(job)

    by_file = start("prepare", "--job", str(file), message=message)
    by_file.communicate(timeout=120)
    by_variable = start("prepare", message=message, QTT_STEP=job)
    by_variable.communicate(timeout=120)
    absent = start("prepare", "--job", str(file) + ".no", message=message)
    _, err = absent.communicate(timeout=120)

    assert (by_file.returncode, by_variable.returncode, absent.returncode) == (0, 0, 64)
    assert "job.json.no" in err
    assert (jobs.root / "runs" / "run-2" / "dataset.json").exists()


def test_data_faults_end_with_65(jobs: Any, message: Path, run_inline: Any) -> None:
    gone = jobs.step(1, task={"data": str(message.parent / "nowhere")})
    unlike = jobs.step(1, task={"fingerprint": "f" * 64})

    for job in (gone, unlike):
        ended = run_inline(job)
        assert (ended.code, ended.message.state) == (65, State.DATASET_CHANGED)
        assert ended.message.reason
    code, _, err = run_cold("prepare", jobs.base(task={"data": "/nowhere"}), message)
    assert code == 65
    assert "/nowhere" in json.loads(message.read_text())["reason"]
    assert "Traceback" not in err


def test_a_bug_ends_with_70_and_the_tail_of_its_traceback(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtt_trainer import step

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(step, "build_session", broken)
    ended = run_inline(jobs.step(1))

    assert (ended.code, ended.message.state) == (70, State.INTERNAL)
    assert ended.message.reason.endswith("ZeroDivisionError: a fault of ours")
    assert "test_process" in ended.message.reason


def test_the_wall_limit_ends_with_75_and_keeps_the_work(jobs: Any, served: Any) -> None:
    job = jobs.step(150, horizon=150, limits={"wall_s": 2})

    ended = served.run("step", job)

    assert ended["exit"] == 75
    assert json.loads(ended["message"])["state"] == "timeout"
    assert len(list((jobs.run / "c1" / "f150.part").iterdir())) == 1


def test_work_of_any_age_is_saved_at_the_wall_limit_and_told_as_progress(
    jobs: Any, run_inline: Any
) -> None:
    """A limit below the age at which work is worth saving would otherwise never be passed."""
    preempted = run_inline(jobs.step(2), stop_after=3)
    assert (preempted.code, preempted.message.timing.get("progress")) == (75, None)
    assert not (jobs.run / "c1" / "f2.part").exists()

    first = run_inline(jobs.step(2), stop_after=3, why=State.TIMEOUT)
    second = run_inline(jobs.step(2, attempt=1), stop_after=3, why=State.TIMEOUT)
    stuck = run_inline(jobs.step(2, attempt=2), stop_after=0, why=State.TIMEOUT)

    assert [e.message.state for e in (first, second, stuck)] == [State.TIMEOUT] * 3
    assert first.message.timing["progress"] > 0
    assert second.message.timing["progress"] > 0
    assert "progress" not in stuck.message.timing
    assert run_inline(jobs.step(2, attempt=3)).code == 0


def test_prepare_leaves_at_the_first_signal(
    jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has nothing to save, and reading a large data set outlasts every grace period."""
    from qtt_trainer import prepare
    from qtt_trainer.context import Context
    from qtt_trainer.process import run_job
    from qtt_trainer.stopping import Stop

    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    stop, texts = Stop(), list[str]()
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(prepare, "prepare", lambda job: stop._on_signal(signal.SIGTERM, None))
    job = jobs.base()

    with pytest.raises(Left, match="75"):
        run_job(locate("prepare", job), job, Context(stop=stop, born=0.0), texts.append)

    assert json.loads(texts[0])["state"] == "preempted"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_a_bad_job(
    jobs: Any, run_inline: Any, value: float
) -> None:
    job = jobs.step(1)
    job["config"]["lr"] = value

    ended = run_inline(job)

    assert (ended.code, ended.message.state) == (64, State.INVALID_CONFIG)
    assert "lr" in ended.message.reason


def test_a_damaged_checkpoint_falls_back_and_without_any_left_says_so(
    jobs: Any, run_inline: Any
) -> None:
    for to in (1, 2):
        assert run_inline(jobs.step(to, start=to - 1)).code == 0
    state = jobs.run / "c1" / "f2" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])

    third = run_inline(jobs.step(3, start=2))

    assert third.code == 0
    assert [e.epoch for e in third.message.epochs] == [3]
    assert [row["epoch"] for row in third.result["curve"]] == [1, 2, 3]
    assert any("f2/state.pt" in text for text in third.message.warnings)
    for to in (1, 3):
        (jobs.run / "c1" / f"f{to}" / "manifest.json").write_text("{}")
    fourth = run_inline(jobs.step(4, start=3))
    assert (fourth.code, fourth.message.state) == (75, State.CHECKPOINT_CORRUPT)
    restarted = run_inline(
        jobs.step(4, start=3, attempt=1, nonce="n1", flags={"allow_restart": True})
    )
    assert restarted.code == 0
    assert len(restarted.result["curve"]) == 4


def test_the_gap_after_a_lost_checkpoint_is_told_again(jobs: Any, run_inline: Any) -> None:
    assert run_inline(jobs.step(1)).code == 0

    ended = run_inline(jobs.step(4, start=3))

    assert ended.code == 0
    assert ended.result["cost"] == pytest.approx(
        sum(row["seconds"] for row in ended.result["curve"] if row["epoch"] > 1)
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed"),
        ({"max_fidelity": 9}, "max_fidelity"),
        ({"task": {"img_size": 48}}, "image_size"),
    ],
)
def test_a_checkpoint_of_another_identity_is_refused(
    jobs: Any, run_inline: Any, change: dict[str, Any], field: str
) -> None:
    assert run_inline(jobs.step(1)).code == 0

    ended = run_inline(jobs.step(2, start=1, **change))

    assert (ended.code, ended.message.state) == (64, State.IDENTITY_MISMATCH)
    assert field in ended.message.reason


def test_a_committed_step_is_told_again_to_its_new_attempt(jobs: Any, run_inline: Any) -> None:
    first = run_inline(jobs.step(2))
    before = (jobs.run / "c1" / "f2" / "manifest.json").read_bytes()

    again = run_inline(jobs.step(2, start=1, attempt=1, nonce="n1"))

    assert again.code == 0
    assert again.message.cached
    assert again.message.epochs == first.message.epochs[1:]
    assert again.result["cost"] == 0
    assert (jobs.run / "c1" / "f2" / "manifest.json").read_bytes() == before


def test_the_disk_is_checked_before_training_begins(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def nearly_full(path: Any) -> Any:
        fields = list(real(path))
        fields[4] = 3  # f_bavail
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    ended = run_inline(jobs.step(1))

    assert (ended.code, ended.message.state) == (75, State.DISK_FULL)
    assert not list((jobs.run / "c1").glob("f1*"))


def test_garbage_is_deleted_and_the_own_folder_kept(jobs: Any, run_inline: Any) -> None:
    assert run_inline(jobs.step(1)).code == 0
    other = jobs.run / "c9" / "f4"
    other.mkdir(parents=True)

    ended = run_inline(jobs.step(2, start=1, gc=["c9/f4", "c1/f1", "c1/f2", "missing/x"]))

    assert ended.code == 0
    assert not other.exists()
    assert not (jobs.run / "c1" / "f1").exists()
    assert (jobs.run / "c1" / "f2" / "manifest.json").exists()
    assert [w for w in ended.result["warnings"] if "c1/f2" in w]


def test_evaluate_scores_checkpoints_on_a_split_the_search_never_saw(
    jobs: Any, run_inline: Any, make_folder: Any, tmp_path: Path
) -> None:
    data = make_folder(
        tmp_path / "data",
        {
            "train": dict.fromkeys("012", 8),
            "val": dict.fromkeys("012", 4),
            "test": {"2": 5, "0": 3},
        },
    )
    jobs.data = data
    assert run_inline(jobs.base(), command="prepare").code == 0
    for to in (1, 2):
        assert run_inline(jobs.step(to, start=to - 1)).code == 0
    job = jobs.base(checkpoints=["c1/f1", "c1/f2"], task={"split": "test"})

    ended = run_inline(job, command="evaluate")

    assert ended.code == 0, ended.message.reason
    assert [(s["config_id"], s["fidelity"], s["n"]) for s in ended.message.scores] == [
        (1, 1, 8),
        (1, 2, 8),
    ]
    stored = json.loads((jobs.run / "attempts" / "evaluate.a0" / "evaluation.json").read_text())
    assert stored["split"] == "test"
    assert stored["scores"][1]["top1"] == pytest.approx(ended.message.scores[1]["top1"], abs=1e-6)
    on_val = run_inline(jobs.base(checkpoints=["c1/f2"], task={"split": "val"}), command="evaluate")
    searched = json.loads((jobs.run / "c1" / "f2" / "result.json").read_text())["curve"][-1]
    assert on_val.message.scores[0]["top1"] == pytest.approx(searched["top1"], abs=1e-6)
    assert on_val.message.scores[0]["log_loss"] == pytest.approx(searched["log_loss"], abs=1e-5)


def test_evaluate_tells_its_scores_where_the_volume_is_read_only(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtt_trainer import volume

    assert run_inline(jobs.step(1)).code == 0
    real = volume.replace_json

    def read_only(path: Path, value: Any, *, durable: bool = False) -> None:
        if path.name == "evaluation.json":
            raise OSError(errno.EROFS, "read-only file system")
        real(path, value, durable=durable)

    monkeypatch.setattr(volume, "replace_json", read_only)
    job = jobs.base(checkpoints=["c1/f1"], task={"split": "val"})

    ended = run_inline(job, command="evaluate")

    assert ended.code == 0, ended.message.reason
    assert ended.message.scores[0]["n"] == 12


@pytest.mark.parametrize(
    ("checkpoints", "split", "code", "word"),
    [
        (["c1/f9"], "val", 75, "c1/f9"),
        (["c1/f1"], "nothere", 65, "nothere"),
        (["c1/f1"], "", 64, "job.task.split"),
        ([], "val", 64, "checkpoints"),
    ],
)
def test_evaluate_says_what_it_cannot_score(
    jobs: Any, run_inline: Any, checkpoints: list[str], split: str, code: int, word: str
) -> None:
    assert run_inline(jobs.step(1)).code == 0
    job = jobs.base(checkpoints=checkpoints, task={"split": split})

    ended = run_inline(job, command="evaluate")

    assert ended.code == code
    assert word in ended.message.reason


def test_fifty_evaluations_fit_into_the_message() -> None:
    from qtt_core.jobs import parse_job
    from qtt_trainer.evaluate import _message

    base = {
        "run_uid": "r", "attempt": 0, "nonce": "f" * 16, "task": {"data": "/d", "split": "test"},
        "paths": {"root": "/s"}, "checkpoints": [f"c{i}/f50" for i in range(50)],
    }  # fmt: skip
    scores = [
        {"config_id": 100 + i, "fidelity": 50, "n": 10000, "top1": 1 / 3, "top5": 1 / 3,
         "balanced_accuracy": 1 / 3, "macro_f1": 1 / 3, "log_loss": 10 / 3}
        for i in range(50)
    ]  # fmt: skip

    message = _message(parse_job(base, command="evaluate"), scores)

    assert len(message.encode().encode()) <= 4096
    assert len(message.scores) == 50
    assert message.scores[0]["top1"] == pytest.approx(1 / 3, abs=1e-6)


def test_a_second_signal_leaves_at_once_with_a_message(jobs: Any, message: Path) -> None:
    process = start("step", "--job", "-", message=message, QTT_MIN_UNSAVED_SECONDS="0")
    process.stdin.write(json.dumps(jobs.step(150, horizon=150)))
    process.stdin.close()
    # The handlers are there before anything else: both signals count, whenever they come.
    deadline = time.monotonic() + 60
    while not (jobs.run / "c1" / "attempts" / "f150.a0" / "log.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    process.stderr.read()
    code = process.wait(timeout=60)
    process.stdout.close()
    process.stderr.close()

    assert code == 75
    assert json.loads(message.read_text())["state"] == "preempted"


@pytest.mark.parametrize("raw", [None, [], {}, {"paths": 3, "run_uid": 7, "attempt": "x"}, "text"])
def test_an_attempt_is_located_in_any_document_without_raising(raw: object) -> None:
    attempt = locate("step", raw)

    assert attempt.folder is None


@pytest.mark.parametrize(("root", "uid"), [("/s", "../../etc"), ("/s\0", "run")])
def test_an_attempts_folder_never_leaves_the_run(root: str, uid: str) -> None:
    attempt = locate("step", {"paths": {"root": root}, "run_uid": uid, "config_id": 1})

    assert attempt.folder is None


def test_every_state_has_the_exit_code_that_the_contract_names() -> None:
    assert EXIT_CODES.keys() == set(State)

"""The local back end against a small program that speaks the trainer parent's protocol."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtt_core.jobs import JobDocument, Paths, Task
from qtt_core.plan import CreateJob, JobPhase
from qtt_core.steps import METRICS
from qtt_operator.devices import make_slots
from qtt_operator.local_backend import LocalBackend
from qtt_operator.processes import is_same, start_ticks
from qtt_operator.recovery import Orphan

FAKE = (sys.executable, str(Path(__file__).with_name("fake_serve.py")))
DEADLINE = 20.0


def document(config_id=1, to=1, attempt=0, **config):
    return JobDocument(
        run_uid="u1",
        attempt=attempt,
        nonce="n" * 16,
        task=Task(data="/data"),
        paths=Paths(root="/root"),
        step=f"c{config_id}-f{to}",
        config_id=config_id,
        config=config or {"act": "ok"},
        fidelity_from=to - 1,
        fidelity_to=to,
        max_fidelity=9,
    )


async def create(back, name, doc):
    """Start a step, as a turn does."""
    order = CreateJob(
        kind="step", c=str(doc.config_id), frm=doc.fidelity_from, to=doc.fidelity_to,
        attempt=doc.attempt, decision="h", timeout_seconds=900.0,
    )  # fmt: skip
    await back.create(order, name, doc)


async def until(back, condition):
    """Wait on the back end's wake-up until `condition(jobs by name)` holds; return the jobs."""
    async with asyncio.timeout(DEADLINE):
        while True:
            jobs = {job.name: job for job in (await back.observe()).jobs}
            if condition(jobs):
                return jobs
            back.changed.clear()
            await back.changed.wait()


async def progress_of(back):
    """The progress of the one running job, once it has said something."""
    async with asyncio.timeout(DEADLINE):
        while not (back.running() and back.running()[0].progress):
            await asyncio.sleep(0.01)
    return back.running()[0].progress


def ended(name):
    return lambda jobs: jobs[name].phase is JobPhase.ENDED


def running(name):
    return lambda jobs: jobs[name].phase is JobPhase.RUNNING


def drive(tmp_path, scenario, devices=("cpu",), **options):
    """Run `scenario(back end)` in a loop of its own; the back end is closed whatever happens."""

    async def main():
        back = LocalBackend(make_slots(devices, 4), state_dir=tmp_path, command=FAKE, **options)
        try:
            await scenario(back)
        finally:
            await back.close()

    asyncio.run(main())


def test_a_job_runs_on_its_slot_and_stays_listed_until_forgotten(tmp_path):
    async def scenario(back):
        await create(back, "r-c1-f1-a0", document())

        job = (await until(back, ended("r-c1-f1-a0")))["r-c1-f1-a0"]

        told = json.loads(job.end.message)
        assert (job.c, job.to, job.attempt, job.end.exit_code) == ("1", 1, 0, 0)
        assert told == {"device": "cpu", "attempt": 0, "nonce": "n" * 16, "threads": 4}
        assert job.end.device_seconds > 0
        await back.forget("r-c1-f1-a0")
        assert (await back.observe()).jobs == ()

    drive(tmp_path, scenario)


def test_creating_a_job_again_adopts_the_one_that_exists(tmp_path):
    async def scenario(back):
        await create(back, "j", document(seconds=0))
        await create(back, "j", document(act="crash"))

        jobs = await until(back, ended("j"))

        assert len(jobs) == 1
        assert jobs["j"].end.exit_code == 0

    drive(tmp_path, scenario)


def test_jobs_beyond_the_slots_wait_in_order(tmp_path):
    async def scenario(back):
        for n in (1, 2, 3):
            await create(back, f"j{n}", document(n, act="sleep"))

        jobs = await until(back, lambda js: running("j1")(js) and running("j2")(js))

        assert jobs["j3"].phase is JobPhase.QUEUED
        assert {step.name for step in back.running()} == {"j1", "j2"}
        await back.kill("j1", "Stopped")
        await until(back, lambda js: ended("j1")(js) and running("j3")(js))

    drive(tmp_path, scenario, devices=("cpu", "cpu"))


@pytest.mark.parametrize(
    ("act", "code", "number"),
    [("polite", 75, None), ("sleep", None, signal.SIGTERM), ("stubborn", None, signal.SIGKILL)],
)
def test_a_killed_job_ends_with_the_given_reason_whatever_it_does(tmp_path, act, code, number):
    async def scenario(back):
        await create(back, "j", document(act=act))
        await progress_of(back)

        await back.kill("j", "DeadlineExceeded")
        job = (await until(back, ended("j")))["j"]

        assert (job.end.reason, job.end.exit_code, job.end.signal) == (
            "DeadlineExceeded",
            code,
            number,
        )
        await create(back, "next", document())
        assert (await until(back, ended("next")))["next"].end.exit_code == 0

    drive(tmp_path, scenario, grace_seconds=0.3)


def test_a_queued_job_can_be_killed_before_it_begins(tmp_path):
    async def scenario(back):
        await create(back, "j1", document(act="sleep"))
        await until(back, running("j1"))
        await create(back, "j2", document(2))

        await back.kill("j2", "Stopped")

        jobs = await until(back, ended("j2"))
        assert (jobs["j2"].end.reason, jobs["j2"].end.device_seconds) == ("Stopped", 0.0)

    drive(tmp_path, scenario)


def test_a_dead_parent_ends_its_job_and_the_next_job_gets_a_new_parent(tmp_path):
    async def scenario(back):
        await create(back, "j1", document(act="kill-parent"))
        job = (await until(back, running("j1")))["j1"]
        pid = json.loads((tmp_path / "processes.json").read_text())[-1]

        job = (await until(back, ended("j1")))["j1"]

        assert (job.end.exit_code, job.end.reason) == (None, "ServeDied")
        assert not is_same(*pid), "the job's own process outlived its parent"
        await create(back, "j2", document(2))
        assert (await until(back, ended("j2")))["j2"].end.exit_code == 0

    drive(tmp_path, scenario)


def test_a_parent_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SERVE_BROKEN", "1")

    async def scenario(back):
        await create(back, "j", document())

        end = (await until(back, ended("j")))["j"].end

        assert "No module named qtt_trainer" in end.reason
        assert "serve-0.log" in end.reason

    drive(tmp_path, scenario)


def test_a_job_killed_by_the_kernel_keeps_its_signal(tmp_path):
    async def scenario(back):
        await create(back, "j", document(act="crash"))

        end = (await until(back, ended("j")))["j"].end

        assert (end.exit_code, end.signal) == (None, signal.SIGKILL)

    drive(tmp_path, scenario)


def orphan(**changes):
    facts = {
        "name": "r-c1-f2-a0", "kind": "step", "c": "1", "frm": 1, "to": 2, "attempt": 0,
        "nonce": "n" * 16, "since": time.time() - 30, "metric": METRICS["top1"],
    }  # fmt: skip
    return Orphan(**{**facts, **changes})


def write_result(run_dir, folder, **changes):
    raw = {
        "attempt": 0, "nonce": "n" * 16, "state": "ok", "reason": "",
        "curve": [
            {"epoch": 1, "top1": 0.4, "top5": 0.9, "seconds": 1.0},
            {"epoch": 2, "top1": 0.5, "top5": 0.9, "seconds": 1.5},
        ],
        "checkpoint": {"dir": "c1/f2", "sha256": "ab", "bytes": 7}, "timing": {"total": 4.5},
    }  # fmt: skip
    path = run_dir / folder / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**raw, **changes}))


@pytest.mark.parametrize("folder", ["c1/attempts/f2.a0", "c1/f2"])
def test_a_result_left_by_the_earlier_runner_is_that_attempts_end(tmp_path, folder):
    write_result(tmp_path / "run", folder)

    async def scenario(back):
        assert back.adopt([orphan()], tmp_path / "run") == 1

        (job,) = (await back.observe()).jobs

        message = json.loads(job.end.message)
        assert (job.phase, job.end.exit_code, job.end.device_seconds) == (JobPhase.ENDED, 0, 4.5)
        assert message["epochs"] == [[2, 0.5, 1.5]], "epochs of earlier steps are not this one's"
        assert (message["ckpt"], message["nonce"]) == ("ab", "n" * 16)

    drive(tmp_path, scenario)


def test_a_stale_result_of_another_attempt_is_not_taken_for_this_one(tmp_path):
    write_result(tmp_path / "run", "c1/f2", nonce="f" * 16)

    async def scenario(back):
        assert back.adopt([orphan()], tmp_path / "run") == 0
        assert (await back.observe()).jobs == ()

    drive(tmp_path, scenario)


def test_a_log_alone_means_the_trainer_died_with_its_runner(tmp_path):
    folder = tmp_path / "run" / "c1/attempts/f2.a0"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("epoch 2 …")
    since = time.time() - 30
    os.utime(folder / "log.txt", (since + 12, since + 12))

    async def scenario(back):
        back.adopt([orphan(since=since)], tmp_path / "run")

        (job,) = (await back.observe()).jobs

        assert (job.end.exit_code, job.end.reason) == (None, "RunnerLost")
        assert job.end.device_seconds == pytest.approx(12, abs=0.01)

    drive(tmp_path, scenario)


def test_processes_of_an_earlier_runner_are_ended_before_anything_is_adopted(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    ) as old:
        ticks = start_ticks(old.pid)
        stranger = os.getpid()
        (tmp_path / "processes.json").write_text(json.dumps([[old.pid, ticks], [stranger, 1]]))

        async def scenario(back):
            back.adopt([], tmp_path)

        drive(tmp_path, scenario)

        assert old.wait(timeout=5) == -signal.SIGKILL

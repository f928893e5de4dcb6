"""The warm parent: one fork per job, and no child's end is the parent's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_job_is_told_from_start_to_end_with_its_message(jobs: Any, served: Any) -> None:
    number = served.send("step", jobs.step(2))

    started = served.until("started")
    events = []
    while not events or events[-1]["event"] != "ended":
        events.append(served.event())

    assert started["id"] == number
    assert started["log"] == str(jobs.run / "c1" / "attempts" / "f2.a0" / "log.txt")
    assert {e["id"] for e in events} == {number}
    last = events[-2]
    assert (last["epoch"], last["epochs"], last["update"], last["updates"]) == (2, 2, 3, 3)
    assert 0 <= last["value"] <= 1
    ended = events[-1]
    assert (ended["exit"], ended["signal"]) == (0, None)
    assert [e[0] for e in json.loads(ended["message"])["epochs"]] == [1, 2]
    assert ended["seconds"] > 0
    assert "epoch 2 of 2" in Path(started["log"]).read_text()


def test_the_parent_stays_single_threaded_and_forks_after_training_children(
    jobs: Any, served: Any
) -> None:
    """A thread pool in the parent would deadlock its children."""
    threads = psutil.Process(served.process.pid).num_threads()

    for config_id in range(2):
        job = jobs.step(1, config_id=config_id, limits={"threads": 2})
        assert served.run("step", job)["exit"] == 0

    assert psutil.Process(served.process.pid).num_threads() == threads == 1


def test_prepare_and_evaluate_are_served_too(jobs: Any, served: Any) -> None:
    assert served.run("prepare", jobs.base())["exit"] == 0
    assert served.run("step", jobs.step(1))["exit"] == 0

    ended = served.run("evaluate", jobs.base(checkpoints=["c1/f1"], task={"split": "val"}))

    assert ended["exit"] == 0
    assert json.loads(ended["message"])["scores"][0]["n"] == 12


def test_a_killed_child_costs_one_job_and_leaves_no_process(jobs: Any, served: Any) -> None:
    served.send("step", jobs.step(150, horizon=150, limits={"workers": 1}))
    pid = served.until("started")["pid"]
    served.until("progress")
    group = [pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))]

    assert os.getpgid(pid) == pid
    os.kill(pid, signal.SIGKILL)
    ended = served.until("ended")

    assert (ended["exit"], ended["signal"], ended["message"]) == (None, signal.SIGKILL, "")
    assert len(group) > 1
    wait_until(lambda: not any(psutil.pid_exists(p) for p in group))
    assert served.run("step", jobs.step(1, config_id=2))["exit"] == 0


def test_a_hung_child_is_killed_by_its_group(jobs: Any, served: Any) -> None:
    served.send("step", jobs.step(150, horizon=150))
    pid = served.until("started")["pid"]
    served.until("progress")
    os.kill(pid, signal.SIGSTOP)

    os.killpg(pid, signal.SIGKILL)

    assert served.until("ended")["signal"] == signal.SIGKILL


def test_two_jobs_run_side_by_side(jobs: Any, served: Any) -> None:
    first = served.send("step", jobs.step(2, config_id=1))
    second = served.send("step", jobs.step(2, config_id=2))

    ends = {served.until("ended")["id"] for _ in range(2)}

    assert ends == {first, second}


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"id": 1}', '{"command": "step", "job": {}}', '{"id": 1, "command": "rm"}'],
)
def test_a_line_that_is_no_job_is_refused_and_the_service_goes_on(
    served: Any, line: str, jobs: Any
) -> None:
    served.process.stdin.write(line + "\n")
    served.process.stdin.flush()

    assert served.event()["event"] == "refused"


@pytest.mark.parametrize("job", [None, 3, {}, {"schema": 99}])
def test_a_bad_document_ends_its_job_with_64(served: Any, job: Any) -> None:
    ended = served.run("step", job)

    assert ended["exit"] == 64
    assert json.loads(ended["message"])["state"] == "invalid_config"


def test_the_end_of_stdin_stops_the_running_child_orderly(jobs: Any, start_serve: Any) -> None:
    server = start_serve(QTT_MIN_UNSAVED_SECONDS="0")
    server.send("step", jobs.step(150, horizon=150))
    server.until("progress")

    server.process.stdin.close()
    ended = server.until("ended")

    assert ended["exit"] == 75
    assert server.process.wait(timeout=60) == 0
    server.process.stdout.close()
    assert len(list((jobs.run / "c1" / "f150.part").iterdir())) == 1


def test_parent_and_children_die_with_the_process_that_started_them(
    jobs: Any, tmp_path: Path
) -> None:
    job = json.dumps({"id": 1, "command": "step", "job": jobs.step(150, horizon=150)})
    runner = textwrap.dedent(
        """
        import subprocess, sys
        serve = subprocess.Popen(
            [sys.executable, "-m", "qtt_trainer", "serve", "--die-with-parent"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        serve.stdin.write(sys.argv[1] + "\\n"); serve.stdin.flush()
        for line in serve.stdout:
            print(line, end="", flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", runner, job], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = (json.loads(line) for line in process.stdout)
    parent = next(e for e in lines if e["event"] == "ready")["pid"]
    child = next(e for e in lines if e["event"] == "started")["pid"]
    next(e for e in lines if e["event"] == "progress")

    process.kill()
    process.stdout.close()
    process.wait()

    wait_until(lambda: not psutil.pid_exists(parent) and not psutil.pid_exists(child))


def test_children_die_with_a_parent_that_was_killed(jobs: Any, start_serve: Any) -> None:
    server = start_serve()
    server.send("step", jobs.step(150, horizon=150))
    pid = server.until("started")["pid"]
    server.until("progress")

    server.process.kill()
    server.process.wait()
    server.process.stdout.close()
    server.process.stdin.close()

    wait_until(lambda: not psutil.pid_exists(pid) or gone(pid))


def gone(pid: int) -> bool:
    """A zombie that nobody reaps here is as dead as one that is not listed."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

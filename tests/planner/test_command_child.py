"""A trainer command under the local back end: real processes that keep, or break, the contract."""

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qtt_core.jobs import JobDocument, Paths, Task
from qtt_core.plan import CreateJob, JobPhase
from qtt_operator.command_child import CommandChild
from qtt_operator.devices import make_slots
from qtt_operator.local_backend import LocalBackend
from qtt_operator.processes import is_same, start_ticks

DEADLINE = 20.0
ANSWER = """
import json, os, sys
print("on the log")
print("and what went wrong", file=sys.stderr)
job = json.loads(os.environ["QTT_STEP"])
told = {"v": 1, "nonce": job["nonce"], "attempt": job["attempt"], "state": "ok",
        "argv": sys.argv[1:], "to": job["fidelity_to"], "device": job["device"],
        "threads": os.environ["OMP_NUM_THREADS"],
        "safe": os.environ.get("PYTHONSAFEPATH"), "tty": sys.stdin.read()}
open(os.environ["QTT_TERMINATION_LOG"], "w").write(json.dumps(told))
"""


def document(root, **fields):
    return JobDocument(
        **{
            "run_uid": "u1", "attempt": 0, "nonce": "n" * 16, "task": Task(data="/data"),
            "paths": Paths(root=str(root)), "config_id": 3, "config": {"act": "ok"},
            "fidelity_from": 1, "fidelity_to": 2, "max_fidelity": 9, **fields,
        }
    )  # fmt: skip


@pytest.fixture
def drive(tmp_path):
    """`drive(program, scenario)`: a back end whose trainer runs the program; closed at the end."""

    def run(program, scenario, command=None, **options):
        async def main():
            back = LocalBackend(
                make_slots(("cpu",), 2), state_dir=tmp_path / "state",
                command=command or (sys.executable, "-c", program), child=CommandChild, **options,
            )  # fmt: skip
            try:
                async with asyncio.timeout(DEADLINE):
                    return await scenario(back)
            finally:
                await back.close()

        return asyncio.run(main())

    return run


async def create(back, doc, kind="step"):
    c = str(doc.config_id) if kind == "step" else kind
    order = CreateJob(
        kind=kind, c=c, frm=doc.fidelity_from, to=doc.fidelity_to, attempt=doc.attempt,
        decision="h", timeout_seconds=900.0,
    )  # fmt: skip
    await back.create(order, "job", doc)


async def end_of(back):
    while True:
        back.changed.clear()
        (job,) = (await back.observe()).jobs
        if job.phase is JobPhase.ENDED:
            return job.end
        await back.changed.wait()


async def start_of(back):
    while not back.running():
        back.changed.clear()
        await back.changed.wait()


def test_a_job_is_a_process_with_the_command_as_its_argument_and_the_document_around_it(
    drive, tmp_path
):
    async def scenario(back):
        await create(back, document(tmp_path))
        return await end_of(back)

    end = drive(ANSWER, scenario)

    told = json.loads(end.message)
    assert (end.exit_code, end.signal) == (0, None)
    assert end.device_seconds > 0
    assert told["argv"] == ["step"]
    assert (told["to"], told["device"], told["threads"]) == (2, "cpu", "2")
    assert told["tty"] == "", "it reads no terminal"
    assert told["safe"] == os.environ.get("PYTHONSAFEPATH"), "our precaution is not the user's"
    folder = tmp_path / "runs/u1/c3/attempts/f2.a0"
    assert (folder / "log.txt").read_text() == "on the log\nand what went wrong\n"
    kept = json.loads((folder / "result.json").read_text())
    assert (kept["nonce"], kept["state"], kept["message"]) == ("n" * 16, "ok", told)


def test_prepare_has_its_folder_beside_the_configurations(drive, tmp_path):
    async def scenario(back):
        await create(back, document(tmp_path, config_id=-1), kind="prepare")
        return await end_of(back)

    end = drive(ANSWER, scenario)

    assert json.loads(end.message)["argv"] == ["prepare"]
    assert (tmp_path / "runs/u1/attempts/prepare.a0/log.txt").exists()


def test_a_result_that_the_trainer_wrote_itself_stays(drive, tmp_path):
    folder = tmp_path / "runs/u1/c3/attempts/f2.a0"
    program = f"open({str(folder / 'result.json')!r}, 'w').write('mine')\n{ANSWER}"

    async def scenario(back):
        await create(back, document(tmp_path))
        return await end_of(back)

    drive(program, scenario)

    assert (folder / "result.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("program", "code", "number", "message"),
    [
        ("raise SystemExit(75)", 75, None, ""),
        ("import os; os.kill(os.getpid(), 9)", None, 9, ""),
        ("import os; open(os.environ['QTT_TERMINATION_LOG'], 'w').write('x' * 9000)", 0, None,
         "x" * 4096),
        ("import os; os.unlink(os.environ['QTT_TERMINATION_LOG'])", 0, None, ""),
    ],
    ids=["exit code", "signal", "long answer", "no answer"],
)  # fmt: skip
def test_ends_arrive_as_they_are(drive, tmp_path, program, code, number, message):
    async def scenario(back):
        await create(back, document(tmp_path))
        return await end_of(back)

    end = drive(program, scenario)

    assert (end.exit_code, end.signal, end.message) == (code, number, message)


def test_an_answer_belongs_to_its_own_job(drive, tmp_path):
    """What the last process wrote must not be read as the next one's answer."""
    program = f"import os\nif '\"attempt\":0' in os.environ['QTT_STEP']:\n exec({ANSWER!r})"

    async def scenario(back):
        await create(back, document(tmp_path))
        first = await end_of(back)
        await back.forget("job")
        await create(back, document(tmp_path, attempt=1))
        return first, await end_of(back)

    first, second = drive(program, scenario)

    assert json.loads(first.message)["attempt"] == 0
    assert second.message == ""


def test_a_program_that_is_not_there_ends_the_job_with_its_name(drive, tmp_path):
    async def scenario(back):
        await create(back, document(tmp_path))
        return await end_of(back)

    end = drive("", scenario, command=(str(tmp_path / "nothing"),))

    assert "refused: cannot start" in end.reason
    assert "nothing: No such file" in end.reason


def test_a_kill_asks_first_and_then_ends_the_whole_group(drive, tmp_path):
    """A trainer that ignores SIGTERM, with a helper process that does so as well."""
    program = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "helper = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'helper')!r} + '.part', 'w').write(str(helper.pid))\n"
        f"os.rename({str(tmp_path / 'helper')!r} + '.part', {str(tmp_path / 'helper')!r})\n"
        "time.sleep(60)\n"
    )

    async def scenario(back):
        await create(back, document(tmp_path))
        await start_of(back)
        while not (tmp_path / "helper").exists():
            await asyncio.sleep(0.01)
        helper = int((tmp_path / "helper").read_text())
        ticks = start_ticks(helper)
        await back.kill("job", "DeadlineExceeded")
        return await end_of(back), helper, ticks

    end, helper, ticks = drive(program, scenario, grace_seconds=0.2)

    assert (end.exit_code, end.signal, end.reason) == (None, signal.SIGKILL, "DeadlineExceeded")
    deadline = time.monotonic() + DEADLINE
    while is_same(helper, ticks):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_polite_trainer_ends_by_its_own_exit_code(drive, tmp_path):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )

    async def scenario(back):
        await create(back, document(tmp_path))
        while not (tmp_path / "ready").exists():
            await asyncio.sleep(0.01)
        await back.kill("job", "Stopped")
        return await end_of(back)

    end = drive(program, scenario)

    assert (end.exit_code, end.reason) == (75, "Stopped")


def test_closing_ends_what_runs(drive, tmp_path):
    async def scenario(back):
        await create(back, replace(document(tmp_path)))
        await start_of(back)
        return back.running()[0]

    drive(f"open({str(tmp_path / 'up')!r}, 'w').close(); import time; time.sleep(60)", scenario)

    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if _ours(path, tmp_path)]


def _ours(path, folder):
    try:
        return str(folder / "up").encode() in path.read_bytes()
    except OSError:
        return False

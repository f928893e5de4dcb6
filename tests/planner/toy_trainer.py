"""A trainer parent without torch: the real protocol, layout and commit order, made-up scores.

One fork per job, in its own process group, dying with its parent. A step commits by a rename and
answers again from what it committed, as the real one does.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from qtt_core.jobs import parse_job
from qtt_core.results import EXIT_CODES, Epoch, State, StepResult
from qtt_core.testing.simulation import toy_score

SECONDS_PER_EPOCH = float(os.environ.get("TOY_SECONDS", "0.02"))
TROUBLE = os.environ.get("TOY_TROUBLE", "")
"""The state in which every step ends at once; empty: they train."""


def say(**event):
    os.write(1, json.dumps(event).encode() + b"\n")


def message(job, **facts):
    return StepResult(attempt=job.attempt, nonce=job.nonce, **{"state": State.OK, **facts})


def attempt_folder(run, command, job):
    if command == "step":
        return run / f"c{job.config_id}" / "attempts" / f"f{job.fidelity_to}.a{job.attempt}"
    return run / "attempts" / f"{command}.a{job.attempt}"


def prepare(job, run):
    run.mkdir(parents=True, exist_ok=True)
    data = os.environ.get("TOY_DATA", "f")
    facts = {"fingerprint": data, "n_train": 90, "n_val": 30, "classes": 3, "metafeatures": {}}
    return message(job, prepared=facts)


def step(job, run):
    if TROUBLE:
        return message(job, state=State(TROUBLE), reason="the trainer's own words")
    folder = run / f"c{job.config_id}" / f"f{job.fidelity_to}"
    if not (folder / "manifest.json").exists():
        if (
            job.fidelity_from
            and not (folder.parent / f"f{job.fidelity_from}" / "manifest.json").exists()
        ):
            sys.exit("no checkpoint to go on from")
        epochs = []
        for epoch in range(job.fidelity_from + 1, job.fidelity_to + 1):
            time.sleep(SECONDS_PER_EPOCH)
            epochs.append([epoch, toy_score(job, epoch), SECONDS_PER_EPOCH])
        with (run / "trained.txt").open("a") as file:  # what really ran, for the tests
            file.write(f"c{job.config_id} {epochs[0][0]}-{epochs[-1][0]}\n")
        draft = folder.with_name(f".{folder.name}.{os.getpid()}")
        draft.mkdir(parents=True)
        (draft / "result.json").write_text(json.dumps({"curve": epochs, "nonce": job.nonce}))
        (draft / "manifest.json").write_text("{}")
        draft.rename(folder)
        cached = False
    else:
        epochs = json.loads((folder / "result.json").read_text())["curve"]
        cached = True
    return message(
        job,
        epochs=tuple(Epoch(epoch=e, value=v, seconds=s) for e, v, s in epochs),
        checkpoint_sha256="0" * 64,
        checkpoint_bytes=1,
        cached=cached,
    )


def evaluate(job, run):
    found = []
    for name in job.checkpoints:
        config, epoch = (int(part[1:]) for part in name.split("/"))
        assert (run / name / "manifest.json").exists(), name
        found.append({"config_id": config, "fidelity": epoch, "n": 30, "top1": 0.75})
    return message(job, scores=tuple(found))


def work(request):
    command = request["command"]
    job = parse_job(request["job"], command=command)
    run = Path(job.paths.root) / "runs" / job.run_uid
    folder = attempt_folder(run, command, job)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text(f"toy {command}\n")
    result = {"prepare": prepare, "step": step, "evaluate": evaluate}[command](job, run)
    text = result.encode()
    draft = folder / ".result.json"
    draft.write_text(json.dumps({"message": json.loads(text), **json.loads(text)}))
    draft.rename(folder / "result.json")
    return text, EXIT_CODES[result.state]


def main():
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL)
    say(event="ready")
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            libc.prctl(1, signal.SIGKILL)
            text, code = work(request)
            os.write(writing, text.encode())
            os._exit(code)
        os.close(writing)
        say(id=request["id"], event="started", pid=pid)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        say(
            id=request["id"],
            event="ended",
            exit=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            message=text,
            seconds=time.monotonic() - began,
        )


main()

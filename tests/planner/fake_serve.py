"""Speaks the trainer parent's protocol with real forks; `job.config.act` says what each does."""

import contextlib
import json
import os
import signal
import sys
import time


def say(**event):
    os.write(1, json.dumps(event).encode() + b"\n")


def work(request):
    job = request["job"]
    config = job["config"]
    act = config.get("act", "ok")
    if act == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif act == "polite":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    say(
        id=request["id"],
        event="progress",
        epoch=1,
        epochs=2,
        update=3,
        updates=9,
        value=0.5,
        train_loss=1.0,
    )
    if act in ("sleep", "stubborn", "polite", "kill-parent"):
        if act == "kill-parent":
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if act == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(config.get("seconds", 0)))
    os._exit(int(config.get("exit", 0)))


def main():
    sys.stderr.write("importing things\n")
    if os.environ.get("FAKE_SERVE_BROKEN"):
        sys.exit("No module named qtt_trainer")
    os.write(1, b"a library greets on stdout\n")
    say(event="ready")
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            work(request)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        say(id=request["id"], event="started", pid=pid)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        job = request["job"]
        message = {k: job[k] for k in ("device", "attempt", "nonce")} | {
            "threads": job["limits"]["threads"]
        }
        say(
            id=request["id"],
            event="ended",
            exit=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            message=json.dumps(message),
            seconds=time.monotonic() - started,
        )


main()

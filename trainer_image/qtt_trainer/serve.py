"""The command `serve`: a warm parent that forks once per job (20-trainer 1, 9).

It imports torch and timm, then only forks, reads lines and passes them on: no tensor operation, no
thread pool and no CUDA context may exist before a fork. Jobs come as JSON lines on stdin,

    {"id": …, "command": "step" | "prepare" | "evaluate", "job": {…}}

events leave as JSON lines on stdout: ready, started, progress, ended, refused. Each child is the
leader of its own process group, so that a hung or killed one costs one job.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from qtt_core.errors import Fault, SpecError
from qtt_core.results import EXIT_BUG
from qtt_trainer import logs
from qtt_trainer.context import Context
from qtt_trainer.process import COMMANDS, Attempt, locate, run_job
from qtt_trainer.stopping import Stop

GRACE_SECONDS = 30.0
"""For children after SIGTERM, before their groups are killed."""
PROGRESS_NAMES = ("epoch", "epochs", "update", "updates", "value", "train_loss")

_PR_SET_PDEATHSIG = 1


@dataclass(slots=True, kw_only=True)
class _Child:
    """A running job: its pipe carries progress and the termination message."""

    id: Any
    pid: int
    pipe: int
    started: float
    buffer: bytes = b""
    message: str = ""


@dataclass(slots=True)
class _Server:
    """The parent's state: running children, and whether it must end."""

    selector: selectors.BaseSelector
    children: dict[int, _Child] = field(default_factory=dict)
    closing_at: float | None = None
    buffer: bytes = b""


def serve(*, die_with_parent: bool = False) -> int:
    """Serve jobs until stdin ends or SIGTERM comes; children then get SIGTERM and their grace."""
    parent = os.getppid()
    if die_with_parent:
        signal_on_parent_death(signal.SIGTERM)
        if os.getppid() != parent:
            return 0
    # numpy's BLAS starts its threads at import, and a thread does not survive a fork.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    wakeup = _install_signals()
    _warm_up()
    server = _Server(selectors.DefaultSelector())
    server.selector.register(0, selectors.EVENT_READ, "jobs")
    server.selector.register(wakeup, selectors.EVENT_READ, "signals")
    _emit({"event": "ready", "pid": os.getpid()})
    while server.closing_at is None or server.children:
        _turn(server)
    gc.unfreeze()  # the interpreter's end finds objects by collecting
    return 0


def signal_on_parent_death(number: int) -> None:
    """Ask Linux to signal this process when the thread that started it ends; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


_terminated = False


def _install_signals() -> int:
    """Signals wake the selector through a pipe; returns its reading end."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_terminate)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    return reading


def _on_terminate(number: int, frame: FrameType | None) -> None:
    global _terminated
    _terminated = True


def _warm_up() -> None:
    """Import everything a job needs; afterwards collect nothing that the children would copy."""
    from huggingface_hub import try_to_load_from_cache  # noqa: F401  # loads lazily on first use

    from qtt_core import space  # noqa: F401
    from qtt_trainer import evaluate, prepare, step  # noqa: F401

    gc.collect()
    gc.freeze()


def _turn(server: _Server) -> None:
    """Wait for one thing to happen and handle all that has."""
    for key, _ in server.selector.select(timeout=1.0 if server.closing_at else None):
        if key.data == "jobs":
            _read_jobs(server)
        elif key.data == "signals":
            _drain(key.fd)
        else:
            _read_child(server.children[key.data])
    _reap(server)
    if _terminated and server.closing_at is None:
        _close(server)
    if server.closing_at is not None and time.monotonic() > server.closing_at + GRACE_SECONDS:
        for child in server.children.values():
            _kill_group(child.pid, signal.SIGKILL)


def _drain(descriptor: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, 1 << 16)
    return b""


def _read_jobs(server: _Server) -> None:
    chunk = os.read(0, 1 << 16)
    if not chunk:
        _close(server)
        return
    server.buffer += chunk
    *lines, server.buffer = server.buffer.split(b"\n")
    for line in lines:
        if line.strip():
            _accept(server, line)


def _close(server: _Server) -> None:
    """No more jobs: ask the running ones to save and end."""
    if server.closing_at is not None:
        return
    server.closing_at = time.monotonic()
    with contextlib.suppress(KeyError):
        server.selector.unregister(0)
    for child in server.children.values():
        _kill_group(child.pid, signal.SIGTERM)


def _accept(server: _Server, line: bytes) -> None:
    """Start the job of a line, or say what is wrong with it."""
    try:
        request = json.loads(line)
    except ValueError as error:
        _emit({"id": None, "event": "refused", "message": f"not JSON: {error}"})
        return
    known = isinstance(request, dict) and request.get("command") in COMMANDS
    if not known or "id" not in request:
        identity = request.get("id") if isinstance(request, dict) else None
        expected = f"send id, command ({', '.join(COMMANDS)}) and job"
        _emit({"id": identity, "event": "refused", "message": expected})
        return
    _start(server, request)


def _start(server: _Server, request: Mapping[str, Any]) -> None:
    attempt = locate(str(request["command"]), request.get("job"))
    parent = os.getpid()
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child_main(attempt, request, writing, parent)
    os.close(writing)
    os.set_blocking(reading, False)
    child = _Child(id=request["id"], pid=pid, pipe=reading, started=time.monotonic())
    server.children[pid] = child
    server.selector.register(reading, selectors.EVENT_READ, pid)
    path = attempt.log_path
    _emit({"id": child.id, "event": "started", "pid": pid, "log": str(path) if path else None})


def _child_main(attempt: Attempt, request: Mapping[str, Any], pipe: int, parent: int) -> None:
    """The forked process; never returns."""
    code = EXIT_BUG
    try:
        born = time.monotonic()
        _leave_parent(attempt, pipe)
        if os.getppid() != parent:  # it died before the end with it was arranged
            return
        stop = Stop()
        stop.install()

        def send(line: Mapping[str, Any]) -> None:
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe, (json.dumps(line) + "\n").encode())

        def progress(facts: Mapping[str, Any]) -> None:
            send({"progress": {name: facts.get(name) for name in PROGRESS_NAMES}})

        context = Context(stop=stop, born=born, channel=progress)
        path = attempt.log_path
        if path is not None:
            context.housekeep = lambda: logs.cap_log(path)
        raw: object = request.get("job")
        if raw is None:
            raw = SpecError([Fault("job", raw, "is required")])
        code = run_job(attempt, raw, context, lambda text: send({"message": text}))
        context.housekeep()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Whatever happened: the parent's atexit handlers and buffers are not ours.
        os._exit(code)


def _leave_parent(attempt: Attempt, pipe: int) -> None:
    """Own group and session, no parent's files, and an end with the parent."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal_on_parent_death(signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    logs.redirect_to_log(attempt.log_path)
    os.set_inheritable(pipe, False)


def _read_child(child: _Child) -> None:
    """Pass on what a child has sent."""
    child.buffer += _drain(child.pipe)
    *lines, child.buffer = child.buffer.split(b"\n")
    for line in lines:
        sent = json.loads(line)
        if "message" in sent:
            child.message = sent["message"]
        else:
            _emit({"id": child.id, "event": "progress", **sent["progress"]})


def _reap(server: _Server) -> None:
    """Report every child that has ended, and kill what it left of its group."""
    for pid in list(server.children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            continue
        child = server.children.pop(pid)
        _read_child(child)
        server.selector.unregister(child.pipe)
        os.close(child.pipe)
        _kill_group(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(status)
        _emit(
            {
                "id": child.id,
                "event": "ended",
                "exit": code if code >= 0 else None,
                "signal": -code if code < 0 else None,
                "message": child.message,
                "seconds": round(time.monotonic() - child.started, 4),
            }
        )


def _kill_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _emit(event: Mapping[str, Any]) -> None:
    """One line on stdout; a reader that went away is the end of the service."""
    try:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        global _terminated
        _terminated = True

"""A trainer of the user's own on this machine: one process per job, started as its pod would be.

Stands where `serve_child.ServeChild` stands for our trainer and speaks to the local back end by the
same events; the wire to the trainer is the step contract (docs/own-trainer.md): the command's name
as the only argument, the job document in QTT_STEP, the answer in the file that QTT_TERMINATION_LOG
names, an exit code. Nothing is kept warm, and the trainer need not be written in Python.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qtt_core.results import MESSAGE_BYTES
from qtt_operator.devices import Slot
from qtt_operator.names import attempt_folder
from qtt_operator.processes import signal_group
from qtt_operator.serve_child import ServeEvent, ServeFailedError, environment_of


class CommandChild:
    """The trainer command of one slot: `send` starts a process, its end arrives as an event."""

    def __init__(
        self,
        slot: Slot,
        command: Sequence[str],
        *,
        log_path: Path,
        on_event: Callable[[ServeEvent], None],
        on_exit: Callable[[str], None],
    ) -> None:
        self.slot = slot
        # No process stands between the runner and its jobs: there is none to remember or to lose.
        self.pid = self.ticks = 0
        self._command = tuple(command)
        self._message = log_path.with_suffix(".message")
        self._on_event = on_event
        self._job: asyncio.Task[None] | None = None
        self._job_pid = 0
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether jobs can be sent."""
        return not self._closed

    async def start(self) -> None:
        """Make the folder of the answers."""
        self._message.parent.mkdir(parents=True, exist_ok=True)

    async def wait_ready(self) -> None:
        """Nothing to wait for: a command starts when it is needed."""

    def send(self, request: Mapping[str, Any]) -> None:
        """Start the job's process. Raises: ServeFailedError after `close`."""
        if self._closed:
            raise ServeFailedError("the trainer command was closed")
        self._job = asyncio.create_task(self._run(request), name=f"trainer-{self.slot.index}")

    async def close(self, grace_seconds: float) -> None:
        """End a job that still runs, its whole group, after the grace."""
        self._closed = True
        if self._job is None or self._job.done():
            return
        done, _ = await asyncio.wait([self._job], timeout=grace_seconds)
        if not done:
            signal_group(self._job_pid, signal.SIGKILL)
            await self._job

    async def _run(self, request: Mapping[str, Any]) -> None:
        """One process from its start to its answer."""
        kind, job = str(request["command"]), request["job"]
        folder = _attempt_folder(kind, job)
        folder.mkdir(parents=True, exist_ok=True)
        self._message.write_bytes(b"")  # there and empty, as a kubelet gives it
        began = time.monotonic()
        try:
            with (folder / "log.txt").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    kind,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    env=self._environment(job),
                    start_new_session=True,  # a group of its own: a kill costs one job
                )
        except OSError as error:
            reason = f"cannot start {self._command[0]}: {error.strerror}"
            self._on_event({"id": request["id"], "event": "refused", "message": reason})
            return
        self._job_pid = process.pid
        self._on_event({"id": request["id"], "event": "started", "pid": process.pid})
        code = await process.wait()
        signal_group(process.pid, signal.SIGKILL)  # what it left of its group
        message = self._read_message()
        _leave_result(folder, message)
        self._on_event(
            {
                "id": request["id"],
                "event": "ended",
                "exit": code if code >= 0 else None,
                "signal": -code if code < 0 else None,
                "message": message,
                "seconds": round(time.monotonic() - began, 4),
            }
        )

    def _environment(self, job: Mapping[str, Any]) -> dict[str, str]:
        document = json.dumps(job, separators=(",", ":"), allow_nan=False)
        settings = environment_of(self.slot)
        if "PYTHONSAFEPATH" not in os.environ:
            # Our own precaution: a user's script imports what lies beside it.
            del settings["PYTHONSAFEPATH"]
        return {**settings, "QTT_STEP": document, "QTT_TERMINATION_LOG": str(self._message)}

    def _read_message(self) -> str:
        """As much as a kubelet would hand on; more than that is no answer."""
        try:
            with self._message.open("rb") as file:
                return file.read(MESSAGE_BYTES).decode(errors="replace").strip()
        except OSError:
            return ""


def _attempt_folder(kind: str, job: Mapping[str, Any]) -> Path:
    """Where `qtt logs` looks for this attempt, and a runner that was killed for its result."""
    c = str(job["config_id"]) if kind == "step" else kind
    run = Path(str(job["paths"]["root"])) / "runs" / str(job["run_uid"])
    return run / attempt_folder(c, job["fidelity_to"], job["attempt"])


def _leave_result(folder: Path, message: str) -> None:
    """Keep the answer beside its log, unless the trainer left a result of its own."""
    path = folder / "result.json"
    try:
        answer = json.loads(message)
    except ValueError:
        return
    if isinstance(answer, dict) and not path.exists():
        draft = path.with_name(f".{path.name}")
        draft.write_text(json.dumps({**answer, "message": answer}))
        draft.replace(path)

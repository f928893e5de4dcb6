"""One warm trainer parent: started once per device, fed one JSON line per job, read line by line.

The parent has imported torch and timm and never touched CUDA; it forks once per job, so that a kill
or a hang costs one job. This module knows the wire only: what a job is and when to kill it is the
local back end's matter.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qtt_operator.devices import Slot
from qtt_operator.processes import signal_group, start_ticks

log = logging.getLogger(__name__)

LINE_BYTES = 1 << 20
READY_SECONDS = 300.0
"""Importing torch from a cold, busy disk takes a minute; five mean that it never will."""

LAST_WORDS_SECONDS = 0.1
"""After its end: how long to go on reading what it said before."""

ServeEvent = Mapping[str, Any]


class ServeFailedError(Exception):
    """The parent did not get ready, or is gone; `args[0]` says why."""


class _Wire(asyncio.SubprocessProtocol):
    """Splits the parent's output into lines and notices its end.

    A protocol, not streams: the pipe may outlive the parent in a fork, and `Process.wait` of
    Python 3.11 then waits for the pipe.
    """

    def __init__(self, on_line: Callable[[bytes], None], on_exit: Callable[[], None]) -> None:
        self._on_line = on_line
        self._on_exit = on_exit
        self._pending = b""

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Hand complete lines on; a line without end is not ours and is dropped."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > LINE_BYTES:
            self._pending = b""
        for line in lines:
            self._on_line(line)

    def process_exited(self) -> None:
        """The parent has been reaped."""
        self._on_exit()


class ServeChild:
    """The trainer parent of one slot. `start`, then `send`; events arrive through the callback."""

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
        self.pid = 0
        self.ticks = 0
        self._command = command
        self._log_path = log_path
        self._on_event = on_event
        self._on_exit = on_exit
        self._transport: asyncio.SubprocessTransport | None = None
        self._dying = False
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()

    @property
    def alive(self) -> bool:
        """Whether jobs can be sent."""
        return self._transport is not None and not self._dying

    async def start(self) -> None:
        """Start the parent; `wait_ready` says when it has imported what it needs.

        Raises: ServeFailedError if it cannot be started at all.
        """
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._log_path.open("ab") as errors:
                self._transport, _ = await asyncio.get_running_loop().subprocess_exec(
                    lambda: _Wire(self._heard, self._exited),
                    *self._command,
                    stderr=errors,
                    env=environment_of(self.slot),
                    start_new_session=True,  # Ctrl-C in the terminal is ours to handle
                )
        except OSError as error:
            raise ServeFailedError(f"cannot start {self._command[0]}: {error}") from error
        self.pid = self._transport.get_pid()
        self.ticks = start_ticks(self.pid) or 0

    async def wait_ready(self) -> None:
        """Wait for `ready`. Raises: ServeFailedError with its last words if it ends before."""
        waits = [asyncio.create_task(event.wait()) for event in (self._ready, self._gone)]
        done, pending = await asyncio.wait(
            waits, timeout=READY_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        for wait in pending:
            wait.cancel()
        if not done:
            await self.close(0.0)
            raise ServeFailedError(f"trainer parent not ready within {READY_SECONDS:.0f} s")
        if not self.alive:
            raise ServeFailedError(self._last_words())

    def send(self, request: Mapping[str, Any]) -> None:
        """Send one request. Raises: ServeFailedError if the parent is gone."""
        if self._transport is None or not self.alive:
            raise ServeFailedError(self._last_words())
        pipe = self._transport.get_pipe_transport(0)
        assert isinstance(pipe, asyncio.WriteTransport)  # stdin
        pipe.write(json.dumps(request, allow_nan=False).encode() + b"\n")

    async def close(self, grace_seconds: float) -> None:
        """Close its input (it ends when idle), then kill its group after the grace."""
        if self._transport is None:
            return
        pipe = self._transport.get_pipe_transport(0)
        if pipe is not None:
            pipe.close()
        try:
            async with asyncio.timeout(grace_seconds):
                await self._gone.wait()
        except TimeoutError:
            signal_group(self.pid, signal.SIGKILL)
            await self._gone.wait()

    def _heard(self, line: bytes) -> None:
        event = _parse(line)
        if event is None:
            log.debug("slot %d said %r", self.slot.index, line[:200])
        elif event["event"] == "ready":
            self._ready.set()
        else:
            self._on_event(event)

    def _exited(self) -> None:
        self._dying = True
        asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._settle)

    def _settle(self) -> None:
        assert self._transport is not None  # it has exited, so it was started
        code = self._transport.get_returncode()
        self._transport.close()
        self._gone.set()
        self._on_exit(f"trainer parent ended with {_ending(code)}")

    def _last_words(self) -> str:
        code = self._transport.get_returncode() if self._transport else None
        try:
            tail = self._log_path.read_bytes()[-2000:].decode(errors="replace").strip()
        except OSError:
            tail = ""
        last = tail.splitlines()[-1] if tail else "no output"
        return f"trainer parent ended with {_ending(code)}: {last} (log: {self._log_path})"


def _parse(line: bytes) -> ServeEvent | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _ending(code: int | None) -> str:
    if code is None:
        return "no exit code"
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def environment_of(slot: Slot) -> dict[str, str]:
    """Our environment, with the slot's threads: numeric libraries read them at import only."""
    threads = {"OMP_NUM_THREADS": str(slot.threads), "MKL_NUM_THREADS": str(slot.threads)}
    return {**os.environ, **threads, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}

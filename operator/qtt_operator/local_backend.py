"""The local back end of a turn: jobs are forks of warm trainer parents, one parent per device slot,
or processes of a trainer of the user's own.

Implements `turn.Backend` for one machine. A job waits in a queue until a slot is free, runs in its
own process group, and stays listed after its end until the ledger has recorded it (`forget`). This
module decides nothing: what an end means, and what follows, is the planner's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtt_core.jobs import JobDocument
from qtt_core.plan import CreateJob, JobEnd, JobPhase, Observed, ObservedJob
from qtt_operator.command_child import CommandChild
from qtt_operator.devices import Slot
from qtt_operator.processes import end_groups, oom_kills, signal_group, start_ticks
from qtt_operator.recovery import Orphan, recovered_end
from qtt_operator.serve_child import ServeChild, ServeEvent, ServeFailedError

log = logging.getLogger(__name__)

SERVE = (sys.executable, "-m", "qtt_trainer", "serve", "--die-with-parent")
GRACE_SECONDS = 20.0
"""From SIGTERM to SIGKILL: a trainer saves a checkpoint in between."""

Trace = Callable[[str, Mapping[str, Any]], None]


@dataclass(slots=True)
class _Job:
    """A job as this process knows it."""

    name: str
    kind: str
    c: str
    to: int
    attempt: int
    created_at: float
    document: JobDocument | None = None
    started_at: float | None = None
    pid: int = 0
    oom_before: int = 0
    sent: bool = False
    killed: str = ""
    end: JobEnd | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def phase(self) -> JobPhase:
        if self.end is not None:
            return JobPhase.ENDED
        return JobPhase.QUEUED if self.started_at is None else JobPhase.RUNNING


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningStep:
    """A job that holds a device now, for the live view."""

    name: str
    kind: str
    c: str
    to: int
    device: str
    started_at: float
    progress: Mapping[str, Any]


class LocalBackend:
    """Runs jobs on the slots of this machine. `changed` is set whenever a job starts or ends."""

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        state_dir: Path,
        command: Sequence[str] = SERVE,
        child: Callable[..., ServeChild | CommandChild] = ServeChild,
        grace_seconds: float = GRACE_SECONDS,
        now: Callable[[], float] = time.time,
        trace: Trace | None = None,
    ) -> None:
        self.slots = tuple(slots)
        self.changed = asyncio.Event()
        self._state_dir = state_dir
        self._command = tuple(command)
        self._make_child = child
        self._grace = grace_seconds
        self._now = now
        self._trace = trace or (lambda _event, _facts: None)
        self._jobs: dict[str, _Job] = {}
        self._queue: asyncio.Queue[_Job] = asyncio.Queue()
        self._children: dict[int, ServeChild | CommandChild] = {}
        self._current: dict[int, _Job] = {}
        self._workers: list[asyncio.Task[None]] = []
        self._timers: list[asyncio.TimerHandle] = []

    # --- turn.Backend ------------------------------------------------------------------------

    async def observe(self) -> Observed:
        """Every job since the start of this process, plus those adopted from an earlier one."""
        jobs = tuple(
            ObservedJob(
                name=job.name, kind=job.kind, c=job.c, to=job.to, attempt=job.attempt,
                phase=job.phase, created_at=job.created_at, started_at=job.started_at, end=job.end,
            )
            for job in self._jobs.values()
        )  # fmt: skip
        return Observed(jobs=jobs, synced_at=self._now(), devices=len(self.slots))

    async def create(self, job: CreateJob, name: str, document: JobDocument) -> None:
        """Queue a job; one of this name that exists already is adopted as it is."""
        if name in self._jobs:
            return
        record = _Job(
            name=name, kind=job.kind, c=job.c, to=job.to, attempt=job.attempt,
            created_at=self._now(), document=document,
        )  # fmt: skip
        self._jobs[name] = record
        self._trace("created", {"job": name})
        self._queue.put_nowait(record)
        while len(self._workers) < len(self.slots):
            slot = self.slots[len(self._workers)]
            self._workers.append(asyncio.create_task(self._work(slot), name=f"slot-{slot.index}"))

    async def kill(self, job: str, reason: str) -> None:
        """SIGTERM to the job's group now, SIGKILL after the grace; it ends with this reason."""
        record = self._jobs.get(job)
        if record is None or record.end is not None or record.killed:
            return
        record.killed = reason
        if record not in self._current.values():
            self._finish(record, JobEnd(exit_code=None, reason=reason))
        elif record.pid:
            self._terminate(record)

    async def suspend(self, job: str) -> None:
        """A process cannot be put aside: it ends, and its attempt is made again."""
        await self.kill(job, "Stopped")

    async def resume(self, job: str) -> None:
        """Nothing is put aside here."""

    async def forget(self, job: str) -> None:
        """The ledger has the end of this job: drop it from the list."""
        record = self._jobs.get(job)
        if record is not None and record.end is not None:
            del self._jobs[job]

    # --- for the runner ----------------------------------------------------------------------

    def warm(self) -> None:
        """Start the first slot's trainer parent now, while the run is still being set up."""
        if self.slots and not self._workers:
            self._workers.append(asyncio.create_task(self._work(self.slots[0]), name="slot-0"))
            self._workers[0].add_done_callback(_log_failure)

    def adopt(self, orphans: Iterable[Orphan], run_dir: Path) -> int:
        """List the attempts of an earlier runner that left a trace on disk as ended jobs.

        Processes of that runner are ended first, so that none of them can still write; hence
        before `warm` and before the first job.
        Returns: how many were adopted; the planner creates the others anew.
        """
        self._end_leftovers()
        adopted = 0
        for orphan in orphans:
            end = recovered_end(run_dir, orphan)
            if end is None or orphan.name in self._jobs:
                continue
            self._jobs[orphan.name] = _Job(
                name=orphan.name, kind=orphan.kind, c=orphan.c, to=orphan.to,
                attempt=orphan.attempt, created_at=orphan.since, started_at=orphan.since, end=end,
            )  # fmt: skip
            adopted += 1
            log.info("%s: found again, %s", orphan.name, end.reason or f"exit {end.exit_code}")
        return adopted

    def running(self) -> tuple[RunningStep, ...]:
        """What every busy slot does now."""
        return tuple(
            RunningStep(
                name=job.name, kind=job.kind, c=job.c, to=job.to, device=self.slots[slot].device,
                started_at=job.started_at, progress=job.progress,
            )
            for slot, job in sorted(self._current.items())
            if job.started_at is not None and job.end is None
        )  # fmt: skip

    async def close(self) -> None:
        """End everything: running jobs as `Stopped`, then the trainer parents."""
        for job in list(self._jobs.values()):
            await self.kill(job.name, "Stopped")
        waiting = [asyncio.create_task(job.ended.wait()) for job in self._current.values()]
        if waiting:
            await asyncio.wait(waiting, timeout=self._grace + 5)
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await asyncio.gather(*(child.close(1.0) for child in self._children.values()))
        for timer in self._timers:
            timer.cancel()
        self._pid_file.unlink(missing_ok=True)

    # --- one slot ----------------------------------------------------------------------------

    async def _work(self, slot: Slot) -> None:
        """Serve the queue with one slot, for ever; its parent starts before the first job comes."""
        with contextlib.suppress(ServeFailedError):  # said again, with a job to blame, below
            await self._child(slot)
        while True:
            job = await self._queue.get()
            if job.end is not None:
                continue
            self._current[slot.index] = job
            try:
                await self._run(slot, job)
            except ServeFailedError as error:
                # never got ready: a broken installation, not bad luck; the reason is the message
                self._finish(job, JobEnd(exit_code=None, reason=str(error)))
                log.warning("%s: %s", job.name, error)
            finally:
                self._current.pop(slot.index, None)

    async def _run(self, slot: Slot, job: _Job) -> None:
        """Send one job and wait for its end."""
        child = await self._child(slot)
        await child.wait_ready()
        if job.killed:
            self._finish(job, JobEnd(exit_code=None, reason=job.killed))
            return
        assert job.document is not None  # only adopted jobs lack one
        document = replace(
            job.document,
            device=slot.device,
            limits=replace(
                job.document.limits, threads=job.document.limits.threads or slot.threads
            ),
        )
        job.oom_before = oom_kills()
        job.sent = True
        self._trace("sent", {"job": job.name, "slot": slot.index})
        child.send({"id": job.name, "command": job.kind, "job": document.to_json()})
        await job.ended.wait()

    async def _child(self, slot: Slot) -> ServeChild | CommandChild:
        """The slot's living parent, started if need be."""
        child = self._children.get(slot.index)
        if child is None or not child.alive:
            child = self._make_child(
                slot, self._command,
                log_path=self._state_dir / "logs" / f"serve-{slot.index}.log",
                on_event=lambda event: self._heard(slot, event),
                on_exit=lambda why: self._lost(slot, why),
            )  # fmt: skip
            self._children[slot.index] = child
            await child.start()
            self._remember()
        return child

    def _heard(self, slot: Slot, event: ServeEvent) -> None:
        """One event of a parent; those of a job that is not current are stale."""
        job = self._current.get(slot.index)
        if job is None or event.get("id") != job.name or job.end is not None:
            return
        if event["event"] == "started":
            job.pid, job.started_at = int(event["pid"]), self._now()
            self._trace("started", {"job": job.name, "slot": slot.index})
            self._remember()
            if job.killed:
                self._terminate(job)
            self.changed.set()
        elif event["event"] == "progress":
            job.progress = event
        elif event["event"] == "ended":
            self._ended(job, event)
        elif event["event"] == "refused":
            self._finish(job, JobEnd(exit_code=None, reason=f"refused: {event.get('message')}"))

    def _ended(self, job: _Job, event: ServeEvent) -> None:
        number = event.get("signal")
        reason = job.killed
        if number == signal.SIGKILL and not reason and oom_kills() > job.oom_before:
            reason = "OOMKilled"
        self._finish(
            job,
            JobEnd(
                exit_code=event.get("exit"), signal=number, reason=reason,
                message=str(event.get("message") or ""),
                device_seconds=float(event.get("seconds") or 0.0),
            ),
        )  # fmt: skip

    def _lost(self, slot: Slot, why: str) -> None:
        """A parent died: its job with it, before anything else may write to that configuration."""
        job = self._current.get(slot.index)
        if job is None or not job.sent or job.end is not None:
            return
        if job.pid:
            end_groups([(job.pid, start_ticks(job.pid) or 0)])
        seconds = 0.0 if job.started_at is None else max(0.0, self._now() - job.started_at)
        oom = job.started_at is not None and oom_kills() > job.oom_before
        reason = job.killed or ("OOMKilled" if oom else "ServeDied")
        log.warning("%s: %s", job.name, why)
        self._finish(
            job, JobEnd(exit_code=None, reason=reason, message=why, device_seconds=seconds)
        )

    def _finish(self, job: _Job, end: JobEnd) -> None:
        if job.end is None:
            queued = max(0.0, (job.started_at or self._now()) - job.created_at)
            job.end = replace(end, queue_seconds=queued)
            self._trace("ended", {"job": job.name, "seconds": end.device_seconds})
            job.ended.set()
            self.changed.set()

    def _terminate(self, job: _Job) -> None:
        signal_group(job.pid, signal.SIGTERM)
        timer = asyncio.get_running_loop().call_later(self._grace, self._kill_hard, job)
        self._timers.append(timer)

    def _kill_hard(self, job: _Job) -> None:
        if job.end is None:
            log.warning("%s ignored SIGTERM for %.0f s", job.name, self._grace)
            signal_group(job.pid, signal.SIGKILL)

    # --- processes of an earlier runner ------------------------------------------------------

    @property
    def _pid_file(self) -> Path:
        return self._state_dir / "processes.json"

    def _remember(self) -> None:
        """Write down every group we lead, for the runner that comes after a `kill -9`."""
        groups = [(child.pid, child.ticks) for child in self._children.values() if child.alive]
        for job in self._current.values():
            ticks = start_ticks(job.pid) if job.pid else None
            if ticks is not None:
                groups.append((job.pid, ticks))
        draft = self._pid_file.with_suffix(".part")
        draft.write_text(json.dumps(groups))
        os.replace(draft, self._pid_file)  # noqa: PTH105  # atomic, also over an existing file

    def _end_leftovers(self) -> None:
        """Parent-death signals have ended them already; this makes sure."""
        try:
            groups = [
                (int(pid), int(ticks)) for pid, ticks in json.loads(self._pid_file.read_text())
            ]
        except (OSError, ValueError, TypeError):
            return
        ended = end_groups(groups)
        if ended:
            log.warning("ended %d trainer processes of an earlier runner", ended)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("slot stopped: %s", task.exception())

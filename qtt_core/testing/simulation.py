"""A back end without processes: jobs end by themselves in virtual time, scores are a pure function.

It keeps the trainer's contract (job document in, termination message out, a committed step answers
again at once) and the back end's (`create` adopts, `observe` shows ended jobs until `forget`), so
that the real planner and turn run thousands of schedules a minute against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from qtt_core.jobs import JobDocument
from qtt_core.plan import CreateJob, JobEnd, JobPhase, Observed, ObservedJob
from qtt_core.results import Epoch, State, StepResult
from qtt_core.steps import digest


@dataclass(slots=True, kw_only=True)
class VirtualClock:
    """Seconds since 1970 that move only when told."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        """The present second."""
        return self.now


def toy_score(document: JobDocument, epoch: int) -> float:
    """A rising, saturating curve whose height depends on the configuration alone."""
    unit = int(digest(dict(document.config))[:8], 16) / 0xFFFFFFFF
    return round((0.2 + 0.7 * unit) * (1 - math.exp(-epoch / (1 + 3 * unit))), 6)


@dataclass(slots=True, kw_only=True)
class SimulatedBackend:
    """Jobs in virtual time; `lose` makes the next attempts vanish the way a killed process does."""

    clock: VirtualClock
    seconds_per_epoch: float = 2.0
    overhead_seconds: float = 1.0
    devices: int = 512
    jobs: dict[str, ObservedJob] = field(default_factory=dict)
    documents: dict[str, JobDocument] = field(default_factory=dict)
    volume: dict[tuple[int, int], float] = field(default_factory=dict)
    """(config id, epoch) -> score of every committed checkpoint."""
    started: list[str] = field(default_factory=list)

    async def observe(self) -> Observed:
        """Every job known, its end included once its time has come."""
        for name, job in self.jobs.items():
            if job.phase is JobPhase.RUNNING and self._ends_at(name) <= self.clock.now:
                self.jobs[name] = self._ended(name, job)
        jobs = tuple(self.jobs[name] for name in sorted(self.jobs))
        return Observed(jobs=jobs, synced_at=self.clock.now, devices=self.devices)

    async def create(self, job: CreateJob, name: str, document: JobDocument) -> None:
        """Start a job; one of that name is adopted."""
        if name in self.jobs:
            return
        self.documents[name] = document
        self.started.append(name)
        self.jobs[name] = ObservedJob(
            name=name, kind=job.kind, c=job.c, to=job.to, attempt=job.attempt,
            phase=JobPhase.RUNNING, created_at=self.clock.now, started_at=self.clock.now,
        )  # fmt: skip

    async def kill(self, job: str, reason: str) -> None:
        """End a job now."""
        found = self.jobs.get(job)
        if found is not None and found.phase is not JobPhase.ENDED:
            held = self.clock.now - (found.started_at or self.clock.now)
            end = JobEnd(exit_code=None, signal=9, reason=reason, device_seconds=held)
            self.jobs[job] = replace(found, phase=JobPhase.ENDED, end=end)

    async def suspend(self, job: str) -> None:
        """Put a job aside: it starts over when it is resumed."""
        self.jobs[job] = replace(self.jobs[job], phase=JobPhase.QUEUED, put_aside=True)

    async def resume(self, job: str) -> None:
        """Start a job again."""
        self.jobs[job] = replace(
            self.jobs[job], phase=JobPhase.RUNNING, put_aside=False, started_at=self.clock.now
        )

    async def forget(self, job: str) -> None:
        """Its end is recorded."""
        self.jobs.pop(job, None)

    def forget_everything(self) -> None:
        """What the death of a local runner does: processes are gone, the volume stays."""
        self.jobs.clear()

    def next_end(self) -> float | None:
        """When the next running job ends."""
        ends = [self._ends_at(n) for n, job in self.jobs.items() if job.phase is JobPhase.RUNNING]
        return min(ends, default=None)

    def _ends_at(self, name: str) -> float:
        document = self.documents[name]
        epochs = [e for e in self._epochs(document) if (document.config_id, e) not in self.volume]
        started = self.jobs[name].started_at or 0.0
        return started + self.overhead_seconds + self.seconds_per_epoch * len(epochs)

    @staticmethod
    def _epochs(document: JobDocument) -> range:
        return range(document.fidelity_from + 1, document.fidelity_to + 1)

    def _ended(self, name: str, job: ObservedJob) -> ObservedJob:
        document = self.documents[name]
        held = self._ends_at(name) - (job.started_at or 0.0)
        result = StepResult(attempt=document.attempt, nonce=document.nonce, state=State.OK)
        if job.kind == "prepare":
            facts = {
                "fingerprint": "f",
                "n_train": 100,
                "n_val": 50,
                "classes": 5,
                "metafeatures": {},
            }
            result = replace(result, prepared=facts)
        else:
            epochs = []
            for e in self._epochs(document):
                score = self.volume.setdefault((document.config_id, e), toy_score(document, e))
                epochs.append(Epoch(epoch=e, value=score, seconds=self.seconds_per_epoch))
            result = replace(result, epochs=tuple(epochs), checkpoint_sha256="0" * 64)
        end = JobEnd(exit_code=0, message=result.encode(), device_seconds=held)
        return replace(job, phase=JobPhase.ENDED, end=end)

"""Which live jobs are ended, put aside or let go again, and when their time is up. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qtt_core.ledger.events import is_evaluation
from qtt_core.ledger.fold import OpenEntry
from qtt_core.limits import end_reason, entry_of, is_lost, step_timeout
from qtt_core.plan import (
    Action,
    Cause,
    JobPhase,
    Kill,
    ObservedJob,
    PlannerInput,
    ResumeJob,
    SuspendJob,
)


def steer(i: PlannerInput) -> Iterator[Action]:
    """End jobs nobody waits for, that outlive their limit, or that the user stopped.

    The trainer's own limit comes a grace period earlier than ours.
    """
    idle = i.spec.suspend or end_reason(i) is not None
    for job in i.observed.jobs:
        if job.phase is JobPhase.ENDED:
            continue
        entry = entry_of(i, job)
        if entry is not None:
            yield from _steered(i, entry, job, idle=idle)
        elif not is_lost(i, job):
            yield Kill(job=job.name, reason=Cause.STOPPED)


def _steered(
    i: PlannerInput, entry: OpenEntry, job: ObservedJob, *, idle: bool
) -> Iterator[Action]:
    """What has not started when a run ends or is suspended does not: a queue may last for days.

    An evaluation may outlive its run. Eviction puts jobs aside; not those of a queue, which would
    let them run again at once.
    """
    running = job.phase is JobPhase.RUNNING
    if not is_evaluation(entry.c) or i.spec.suspend:
        evict = i.spec.suspend and i.spec.suspend_policy == "Evict"
        if i.spec.stop or (evict and i.spec.queue_name):
            yield Kill(job=job.name, reason=Cause.STOPPED)
            return
        if evict and (job.put_aside or job.phase is not JobPhase.QUEUED):
            if not job.put_aside:
                yield SuspendJob(job=job.name)
            return
        if idle and not running:
            yield Kill(job=job.name, reason=Cause.STOPPED)
            return
    if job.put_aside:
        yield ResumeJob(job=job.name)
    elif i.now > due(i, entry, job):
        yield Kill(job=job.name, reason=Cause.DEADLINE if running else Cause.PENDING)


def due(i: PlannerInput, entry: OpenEntry, job: ObservedJob) -> float:
    """When a job has run, or failed to start, for too long. A queue has no limit."""
    if job.phase is JobPhase.RUNNING and job.started_at is not None:
        return job.started_at + step_timeout(i, entry.c, entry.reserved)
    if job.phase is JobPhase.PENDING and job.pending_since is not None:
        return job.pending_since + i.spec.failure_policy.pending_timeout
    return math.inf

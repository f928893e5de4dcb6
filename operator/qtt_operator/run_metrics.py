"""What the events, Jobs and budget of active runs add to the metrics.

Fed after every turn. An event is counted once, by the leader that wrote it: it carries its writer's
epoch, so that a new leader which reads the whole stream counts none of it again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from qtt_core.ledger.events import Cancel, Done, Event, Fail, Open, Prepared, Retry, is_pseudo
from qtt_core.ledger.fold import APP_REASONS, position, step_epochs
from qtt_core.plan import Cause, Commit, JobEnd, JobPhase, ObservedJob, Plan
from qtt_core.settle import retry_delay
from qtt_operator.metrics import Metrics
from qtt_operator.progress import Progress
from qtt_operator.turn import RunContext

PRODUCTS = 32
"""Names of devices that get a series of their own; a trainer may claim any name."""

ORPHAN_SECONDS = 30.0
"""A decision without its Job for so long is no longer one that is just being started."""

MESSAGE_PARTS = ("startup", "load", "train", "eval", "save")
"""Phases that the trainer measures itself, by their names in its message."""


@dataclass(slots=True)
class _Seen:
    """How far one run was read, and what its last failure was."""

    context: RunContext | None = None
    count: int = 0
    last: tuple[int, int] = (0, 0)
    expected: dict[str, float] = field(default_factory=dict)
    failure: Retry | Cancel | Fail | None = None
    orphans: Counter[str] = field(default_factory=Counter)


class RunMetrics:
    """All runs of one process; `epoch` is the one it writes with."""

    def __init__(self, metrics: Metrics, epoch: int) -> None:
        self._metrics, self._epoch = metrics, epoch
        self._seen: dict[str, _Seen] = {}
        self._products: set[str] = set()

    def take(self, context: RunContext, namespace: str) -> None:
        """Count what is new in a run's ledger."""
        seen = self._seen.setdefault(context.run.identity.uid, _Seen())
        if seen.context is not context:  # dropped and read anew, or a new leader
            seen.context, seen.count = context, 0
        devices, step = context.run.spec.charged_devices, step_epochs(context.state.run)
        for event in context.events[seen.count :]:
            fresh = event.ep == self._epoch and position(event.id) > seen.last
            if isinstance(event, Open):
                seen.expected[event.c] = event.res / devices
            elif isinstance(event, Retry | Cancel | Fail) and word(event) != Cause.STOPPED:
                seen.failure = event
            if fresh:
                self._count(namespace, event, step, devices, seen.expected)
                seen.last = position(event.id)
        seen.count = len(context.events)

    def ended(self, context: RunContext, plan: Plan) -> None:
        """Record the phases of the attempts whose ends a turn has written down."""
        jobs = {(job.c, job.to): job for job in context.observed.jobs if job.end is not None}
        for action in plan.actions:
            if isinstance(action, Commit) and (action.event.c, action.event.to) in jobs:
                job = jobs[action.event.c, action.event.to]
                for phase, seconds in phases(job, context.clock()):
                    self._metrics.observe("step_phase_seconds", seconds, phase)
                for name, value in measures(job):
                    self._metrics.observe(name, value)

    def describe(
        self, context: RunContext, namespace: str, *, so_far: Progress, saved: int
    ) -> None:
        """Set the gauges of an active run; `saved`: bytes of its checkpoints."""
        metrics, spec = self._metrics, context.run.spec
        labels = (namespace, context.run.identity.name)
        metrics.set("run_info", 1, *labels, spec.optimizer.algorithm, spec.search.portfolio)
        if context.recommendation is not None:
            metrics.set("run_best_score", context.recommendation.score, *labels)
        jobs = Counter(job.phase for job in context.observed.jobs)
        for phase in (JobPhase.QUEUED, JobPhase.PENDING, JobPhase.RUNNING):
            metrics.set("run_open_jobs", jobs[phase], *labels, phase.value)
        for kind, share in so_far.shares.items():
            metrics.set("run_budget_consumed_ratio", share, *labels, kind)
        metrics.set("run_progress_ratio", so_far.ratio, *labels)
        if so_far.seconds_left is not None:
            metrics.set("run_eta_seconds", so_far.seconds_left, *labels)
        metrics.set("checkpoint_bytes", saved, *labels)
        self._seen.setdefault(context.run.identity.uid, _Seen()).orphans = orphans(context)

    def failure(self, uid: str) -> Retry | Cancel | Fail | None:
        """The newest end without a result of a run."""
        return self._seen[uid].failure if uid in self._seen else None

    def orphans(self) -> Counter[str]:
        """Decisions without a Job and Jobs without a decision, over all runs."""
        return sum((seen.orphans for seen in self._seen.values()), Counter[str]())

    def deleted(self, uid: str) -> None:
        """A TuningRun is gone for good."""
        self._seen.pop(uid, None)

    def forget(self, namespace: str, context: RunContext) -> None:
        """A run is active no more: its series end; what was counted stays counted."""
        self._metrics.forget_run(namespace, context.run.identity.name)
        seen = self._seen.get(context.run.identity.uid)
        if seen is not None:
            seen.context, seen.orphans = None, Counter()

    def _count(
        self, namespace: str, event: Event, step: int, devices: float, expected: dict[str, float]
    ) -> None:
        add = self._metrics.add
        if isinstance(event, Done):
            overhead = min(event.dev, event.ov * devices)
            self._charge(namespace, event.gpu, "overhead", overhead)
            self._charge(namespace, event.gpu, "train", event.dev - overhead)
            add("steps", namespace, event.state, amount=max(1, -(-len(event.epochs) // step)))
            measured, predicted = sum(e[2] for e in event.epochs), expected.get(event.c, 0.0)
            if measured > 0 and predicted > 0:
                self._metrics.observe("cost_prediction_ratio", measured / predicted)
        elif isinstance(event, Fail | Retry | Cancel):
            self._charge(namespace, getattr(event, "gpu", ""), "wasted", event.dev)
            add("step_failures", namespace, word(event).lower())
            if not is_pseudo(event.c):
                add("steps", namespace, _outcome(event))
        elif isinstance(event, Prepared):
            self._charge(namespace, "", "overhead", event.dev)

    def _charge(self, namespace: str, product: str, kind: str, seconds: float) -> None:
        if product not in self._products and len(self._products) >= PRODUCTS:
            product = "other"
        self._products.add(product)
        self._metrics.add("step_cost_gpu_seconds", namespace, product, kind, amount=seconds)


def word(event: Fail | Retry | Cancel) -> str:
    """Why an attempt has no result, in one word."""
    return event.state if isinstance(event, Fail) else event.reason


def phases(job: ObservedJob, now: float) -> Iterable[tuple[str, float]]:
    """(phase, seconds) of an attempt that ended: waits as the cluster, parts as the trainer saw."""
    end = job.end or JobEnd(exit_code=None)
    yield from end.waits.items()
    result = job.verdict.result if job.verdict is not None else None
    timing = dict(result.timing) if result is not None else {}
    if result is not None and "train" not in timing and result.epochs:
        timing["train"] = sum(epoch.seconds for epoch in result.epochs)
    measured = {part: timing[part] for part in MESSAGE_PARTS if timing.get(part, -1.0) >= 0.0}
    if measured and "startup" not in measured:
        measured["startup"] = max(0.0, end.device_seconds - sum(measured.values()))
    yield from measured.items()
    if end.ended_at is not None:
        yield "collect", max(0.0, now - end.ended_at)


def measures(job: ObservedJob) -> Iterable[tuple[str, float]]:
    """(metric, value) of what the trainer saw of itself; it may say any number."""
    result = job.verdict.result if job.verdict is not None else None
    if result is None or result.cached or not result.epochs:
        return
    if 0.0 < result.images_per_second < math.inf:
        yield "step_images_per_second", result.images_per_second
    trained, waited = result.timing.get("train", 0.0), result.timing.get("wait", 0.0)
    if 0.0 <= waited <= trained < math.inf and trained > 0.0:
        yield "step_data_wait_ratio", waited / trained
    if result.memory_mb > 0:
        yield "step_peak_memory_bytes", result.memory_mb * 1e6


def orphans(context: RunContext) -> Counter[str]:
    """Open decisions that lack their Job, and living Jobs that nobody decided."""
    state, now = context.state, context.clock()
    jobs = [job for job in context.observed.jobs if job.phase is not JobPhase.ENDED]
    present = {(job.c, job.to, job.attempt) for job in context.observed.jobs}
    known = {(entry.c, entry.to, entry.attempt) for entry in state.open.values()}
    late = [
        entry
        for entry in state.open.values()
        if (entry.c, entry.to, entry.attempt) not in present
        and now > entry.since + retry_delay(entry) + ORPHAN_SECONDS
    ]
    lost = [job for job in jobs if (job.c, job.to, job.attempt) not in known]
    return Counter({"open_without_job": len(late), "job_without_open": len(lost)})


def _outcome(event: Fail | Retry | Cancel) -> str:
    if isinstance(event, Cancel):
        return "cancelled"
    failed = isinstance(event, Fail) or event.reason in APP_REASONS
    return "failed" if failed else "infra"

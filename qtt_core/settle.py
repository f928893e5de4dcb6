"""What the end of an attempt means for the ledger: a result, a retry, or the end of the decision.

One pure function from (open entry, verdict, limits) to one event; the table of 30-kubernetes 5.3.
Only facts about the configuration become `done` or `fail`; everything else is retried, charged and
never told, until its own limit is reached.
"""

from __future__ import annotations

from dataclasses import replace

from qtt_core.ledger.events import WEIGHTS, Cancel, Done, Fail, Retry, is_pseudo
from qtt_core.ledger.fold import APP_REASONS, OpenEntry
from qtt_core.plan import Cause, Ending, JobEnd, Verdict
from qtt_core.results import State
from qtt_core.spec import RunSpec

MOVED = "timeout_progressed"
"""A time-out of an attempt that trained: the next one begins further on."""

UNCOUNTED = frozenset(
    {
        Cause.RUNNER_LOST.value,
        Cause.NODE_LOST.value,
        Cause.EVICTED.value,
        Cause.STOPPED.value,
        State.PREEMPTED.value,
        State.OOM.value,
        MOVED,
    }
)
"""Ends that say nothing about the step, or have a limit of their own: retried at once."""

TIMEOUTS = (State.TIMEOUT.value, Cause.DEADLINE.value)
STUCK_AFTER = 2
"""Time-outs without progress before a configuration counts as infeasible."""

GROWTH = 1.5
"""More memory with every attempt that lacked some."""

OOM_KILLS = 2
"""Host out-of-memory kills that are retried before the configuration counts as too large."""

FETCHES = 3
"""Attempts at fetching weights before a person is asked."""

MESSAGE, MODELS_MESSAGE = 300, 900
"""Characters of a trainer's words that are kept; those of `weights` name models."""

CORRUPT_LIMIT = 3
"""Unreadable checkpoints: retry, then restart from zero, then give the configuration up."""


def charged_seconds(end: JobEnd, spec: RunSpec) -> float:
    """Device-seconds an attempt is charged: time held × devices × share (30-kubernetes 2.3)."""
    return end.device_seconds * spec.charged_devices


def settle(
    entry: OpenEntry, verdict: Verdict, end: JobEnd, spec: RunSpec
) -> Done | Fail | Retry | Cancel:
    """The one event that records how an attempt ended."""
    if verdict.kind is Ending.RESULT:
        return _result(entry, verdict, end, spec)
    if verdict.kind is Ending.BAD_JOB:
        return _cancel(entry, verdict, end, spec, retire=True)
    if verdict.kind is Ending.BAD_DATA:
        return _cancel(entry, verdict, end, spec, retire=False)
    if verdict.kind is Ending.BUG:
        if _count(entry, *APP_REASONS) < spec.failure_policy.max_app_failures_per_config:
            return _retry(entry, verdict, end, spec)
        return _cancel(entry, verdict, end, spec, retire=True)
    return _infra(entry, verdict, end, spec)


def retry_delay(entry: OpenEntry) -> float:
    """Seconds before the present attempt starts: 0 for a first or an uncounted one, then 1 … 60."""
    counted = [reason for reason in entry.retries if reason not in UNCOUNTED]
    if not counted or entry.retries[-1] in UNCOUNTED:
        return 0.0
    return float(min(60, 2 ** (len(counted) - 1)))


def may_restart(entry: OpenEntry) -> bool:
    """Whether the next attempt may begin at epoch 0: its checkpoint was unreadable twice."""
    return _count(entry, State.CHECKPOINT_CORRUPT.value) >= CORRUPT_LIMIT - 1


def oom_kills(entry: OpenEntry) -> int:
    """How often the decision was killed for host memory."""
    return _count(entry, Cause.OOM_KILLED.value)


def memory_factor(entry: OpenEntry) -> float:
    """How much more memory than the manifest says the present attempt is given."""
    return GROWTH ** _count(entry, Cause.OOM_KILLED.value, State.OOM.value)


def _infra(entry: OpenEntry, verdict: Verdict, end: JobEnd, spec: RunSpec) -> Fail | Retry | Cancel:
    reason = verdict.reason
    if reason in UNCOUNTED:
        return _retry(entry, verdict, end, spec)
    if reason == Cause.PENDING:
        return _cancel(entry, verdict, end, spec, retire=False)
    if reason == Cause.OOM_KILLED and oom_kills(entry) >= OOM_KILLS:
        if _may_grow(entry, spec):
            return _retry(entry, replace(verdict, reason=State.OOM.value), end, spec)
        return _give_up(entry, State.OOM, end, spec, "killed for memory again and again")
    if reason in TIMEOUTS and _progressed(verdict):
        return _retry(entry, replace(verdict, reason=MOVED), end, spec)
    if reason in TIMEOUTS and _count(entry, *TIMEOUTS) + 1 >= STUCK_AFTER:
        return _give_up(entry, State.INFEASIBLE, end, spec, "ran out of time twice")
    if reason == State.CHECKPOINT_CORRUPT.value and _count(entry, reason) + 1 >= CORRUPT_LIMIT:
        return _cancel(entry, verdict, end, spec, retire=True)
    if reason == State.WEIGHTS_CORRUPT.value and _count(entry, reason) >= 1:
        return _cancel(entry, verdict, end, spec, retire=True)
    counted = sum(1 for past in entry.retries if past not in UNCOUNTED)
    policy = spec.failure_policy.max_infra_retries_per_step
    if counted >= (FETCHES - 1 if entry.c == WEIGHTS else policy):
        return _cancel(entry, verdict, end, spec, retire=False)
    return _retry(entry, verdict, end, spec)


def _may_grow(entry: OpenEntry, spec: RunSpec) -> bool:
    """Whether a decision that did not fit is tried once more, with more memory."""
    larger = spec.failure_policy.on_oom == "RetryLarger" and not is_pseudo(entry.c)
    return larger and not _count(entry, State.OOM.value)


def _result(entry: OpenEntry, verdict: Verdict, end: JobEnd, spec: RunSpec) -> Done | Fail | Retry:
    result = verdict.result
    assert result is not None  # by construction of RESULT
    assert verdict.state is not None
    charged = charged_seconds(end, spec)
    if verdict.state is State.OOM and _may_grow(entry, spec):
        return _retry(entry, verdict, end, spec)
    if verdict.state in {State.OOM, State.INFEASIBLE}:
        return Fail(
            c=entry.c, to=entry.to, a=entry.attempt, state=verdict.state.value, dev=charged,
            q=end.queue_seconds, mem=result.memory_mb, gpu=result.gpu, msg=result.reason[-300:],
        )  # fmt: skip
    trained = sum(seconds for _, _, seconds in verdict.scores)
    return Done(
        c=entry.c, to=entry.to, a=entry.attempt, state=verdict.state.value, epochs=verdict.scores,
        dev=charged, ov=max(0.0, end.device_seconds - trained), q=end.queue_seconds,
        mem=result.memory_mb, gpu=result.gpu, inert=result.inert, eb=result.effective_batch,
        ck=result.checkpoint_sha256, bytes=result.checkpoint_bytes, msg=result.reason[-300:],
    )  # fmt: skip


def _give_up(entry: OpenEntry, state: State, end: JobEnd, spec: RunSpec, why: str) -> Fail | Cancel:
    """A fact about a configuration; `prepare` has none, and must stay free to be opened again."""
    if not entry.c.isdigit():
        verdict = Verdict(kind=Ending.INFRA, reason=state.value, message=why)
        return _cancel(entry, verdict, end, spec, retire=False)
    return Fail(
        c=entry.c, to=entry.to, a=entry.attempt, state=state.value, msg=why,
        dev=charged_seconds(end, spec), q=end.queue_seconds,
    )  # fmt: skip


def _retry(entry: OpenEntry, verdict: Verdict, end: JobEnd, spec: RunSpec) -> Retry:
    return Retry(
        c=entry.c, to=entry.to, a=entry.attempt + 1, reason=verdict.reason,
        dev=charged_seconds(end, spec), q=end.queue_seconds, node=end.node,
        msg=verdict.message[-300:],
    )  # fmt: skip


def _cancel(
    entry: OpenEntry, verdict: Verdict, end: JobEnd, spec: RunSpec, *, retire: bool
) -> Cancel:
    kept = MODELS_MESSAGE if entry.c == WEIGHTS else MESSAGE
    return Cancel(
        c=entry.c, to=entry.to, a=entry.attempt, reason=verdict.reason, retire=retire,
        dev=charged_seconds(end, spec), q=end.queue_seconds, msg=verdict.message[-kept:],
    )  # fmt: skip


def _progressed(verdict: Verdict) -> bool:
    """Whether a timed-out attempt saved updates: there the next one begins."""
    return verdict.result is not None and verdict.result.timing.get("progress", 0.0) > 0


def _count(entry: OpenEntry, *reasons: str) -> int:
    return sum(1 for past in entry.retries if past in reasons)

"""Recording how jobs ended: results, retries, what prepare measured, scores of evaluations. Pure.

A policy of `planner`: every end is recorded once, then its job may be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator

from qtt_core.ledger.events import (
    EVALUATION,
    PREPARE,
    Cancel,
    Close,
    Done,
    Fail,
    Note,
    Prepared,
    Retry,
    WeightsFetched,
    done_key,
    is_evaluation,
    is_pseudo,
)
from qtt_core.ledger.fold import OpenEntry
from qtt_core.limits import budget_limits, entry_of, is_lost
from qtt_core.plan import (
    Action,
    Commit,
    EmitEvent,
    Ending,
    Forget,
    JobEnd,
    JobPhase,
    ObservedJob,
    PlannerInput,
    RecordNote,
    Verdict,
)
from qtt_core.settle import charged_seconds, settle
from qtt_core.steps import canonical_json

COMMITS_A_TURN = 50
"""So that a run with a long backlog cannot starve the others."""


def collect(i: PlannerInput) -> Iterator[Action]:
    """Record every end; drop ended jobs the ledger no longer waits for."""
    ended = [job for job in i.observed.jobs if job.phase is JobPhase.ENDED]
    for job in ended[:COMMITS_A_TURN]:
        entry = entry_of(i, job)
        if entry is not None:
            yield from _commit(i, entry, job)
        elif not is_lost(i, job):
            yield Forget(job=job.name)


def _commit(i: PlannerInput, entry: OpenEntry, job: ObservedJob) -> Iterator[Action]:
    assert job.verdict is not None  # filled by gather for ended jobs
    assert job.end is not None
    if job.verdict.kind is Ending.PREPARED:
        key = done_key(PREPARE, entry.to)
        yield RecordNote(event=_prepared(i, entry, job.verdict, job.end), key=key)
    elif job.verdict.kind is Ending.FETCHED:
        fetched = WeightsFetched(
            to=entry.to, a=entry.attempt, claim=i.supply.claim, models=i.supply.models
        )
        yield RecordNote(event=fetched, key=done_key(entry.c, entry.to))
    elif job.verdict.kind is Ending.EVALUATED:
        yield RecordNote(event=_evaluated(entry, job.verdict), key=done_key(entry.c, entry.to))
    else:
        event = settle(entry, job.verdict, job.end, i.spec)
        yield Commit(event=event)
        yield from _said(event, job.verdict)
        given_up = entry.c == PREPARE and isinstance(event, Cancel)
        if given_up or (job.verdict.reason == "bad_data" and not is_evaluation(entry.c)):
            reason = "BadData" if job.verdict.kind is Ending.BAD_DATA else "TooManyFailedConfigs"
            yield closing(i, reason, job.verdict.message)
    yield Forget(job=job.name)


def _evaluated(entry: OpenEntry, verdict: Verdict) -> Note:
    assert verdict.result is not None
    scores = canonical_json([dict(score) for score in verdict.result.scores])
    return Note(what=EVALUATION, new=scores, c=entry.c, to=entry.to, a=entry.attempt)


def _said(event: Done | Fail | Retry | Cancel, verdict: Verdict) -> Iterator[Action]:
    """Ends that a person should hear of: faults of the trainer, evaluations that were given up."""
    words = {Ending.BAD_JOB: "JobRefused", Ending.BUG: "TrainerFailed"}
    reason = words.get(verdict.kind)
    if is_evaluation(event.c) and isinstance(event, Cancel | Fail):
        reason = "EvaluationFailed"
    if reason is not None:
        name = event.c if is_pseudo(event.c) else f"configuration {event.c}"
        message = f"{name} -> {event.to}: {verdict.reason}: {verdict.message[-300:]}"
        yield EmitEvent(reason=reason, message=message, warning=True)


def closing(i: PlannerInput, reason: str, message: str) -> RecordNote:
    """The end of the run, once per state of the ledger."""
    event = Close(reason=reason, msg=message, budget=budget_limits(i.spec.budget))
    return RecordNote(event=event, key=f"close-{i.ledger.last_id}")


def _prepared(i: PlannerInput, entry: OpenEntry, verdict: Verdict, end: JobEnd) -> Prepared:
    assert verdict.result is not None
    assert verdict.result.prepared is not None
    facts = verdict.result.prepared
    return Prepared(
        to=entry.to, a=entry.attempt, fingerprint=facts["fingerprint"],
        n_train=facts["n_train"], n_val=facts["n_val"], classes=facts["classes"],
        metafeatures={**facts["metafeatures"], **i.spec.dataset.metafeatures},
        excluded=facts.get("excluded", {}), missing_weights=tuple(facts.get("missing_weights", ())),
        digest=facts.get("digest", ""), warnings=verdict.result.warnings,
        dev=charged_seconds(end, i.spec),
    )  # fmt: skip

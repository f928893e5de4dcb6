"""`decide`: from what is known to what to do next. Pure: no clock, no I/O, no torch.

A turn gathers (`PlannerInput`), asks here, and acts. Each policy below is one small function of the
input; `decide` tries them in a fixed order and returns the first plan that has work, so that a turn
changes one kind of thing and the next turn sees its effect. Results are recorded before anything
new is opened; a decision is in the ledger before its job exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from qtt_core.ledger.events import PREPARE, Cancel, Close, Open, Prepared, Reopen, Run
from qtt_core.ledger.fold import OpenEntry
from qtt_core.plan import (
    Abandon,
    Action,
    Ask,
    Commit,
    CreateJob,
    Ending,
    Forget,
    Identity,
    JobEnd,
    JobPhase,
    Kill,
    LoadOptimizer,
    Observed,
    ObservedJob,
    OpenStep,
    OptimizerView,
    Phase,
    Plan,
    PlannerInput,
    RecordNote,
    Requeue,
    Tell,
    Verdict,
)
from qtt_core.settle import charged_seconds, may_restart, retry_delay, settle
from qtt_core.steps import BudgetView, Proposal, decision_hash, digest

__all__ = [
    "Identity",
    "JobEnd",
    "JobPhase",
    "Observed",
    "ObservedJob",
    "OptimizerView",
    "Plan",
    "PlannerInput",
    "Verdict",
    "budget_view",
    "decide",
    "end_reason",
    "step_timeout",
]

COMMITS_A_TURN, CREATIONS_A_TURN = 50, 10
"""So that a run with a long backlog cannot starve the others."""

PREPARE_SECONDS = 60.0
"""Reservation of `prepare`, recorded with its decision."""

PREPARE_TIMEOUT = 4 * 3600.0
BUGS_IN_A_ROW, INVALID_IN_A_ROW, INFRA_IN_A_ROW = 5, 3, 3
"""Configurations lost one after the other, no result between, before a person must look."""

COMPLETE = {
    "goal": "GoalReached",
    "gain": "GainExhausted",
    "exhausted": "SpaceExhausted",
    "budget": "BudgetExhausted",
}
"""The optimizer's word for an end -> the reason of the condition Complete."""


def decide(i: PlannerInput) -> Plan:
    """The next plan of a run. The same input gives the same plan."""
    kills: tuple[Action, ...] = tuple(_kill(i))
    work: tuple[Action, ...] = ()
    for policy in (_start, _collect, _reopen, _close, _recreate, _prepare, _open, _ask):
        work = tuple(policy(i))
        if work:
            break
    rest = work or (Requeue(after=_next_deadline(i)),)
    return Plan(actions=(*kills, *rest), phase=_phase(i), held=_held(i))


# --- facts read off the input -----------------------------------------------------------------


def _steps_of(frm: int, to: int, delta: int) -> int:
    return math.ceil((to - frm) / delta)


def _tuning(i: PlannerInput) -> list[OpenEntry]:
    """Open entries of real configurations, in id order."""
    entries = [entry for c, entry in i.ledger.open.items() if c.isdigit()]
    return sorted(entries, key=lambda entry: int(entry.c))


def _reserved_seconds(i: PlannerInput) -> float:
    return sum(entry.reserved for entry in _tuning(i))


def _open_steps(i: PlannerInput) -> int:
    return sum(_steps_of(entry.frm, entry.to, i.spec.fidelity.step) for entry in _tuning(i))


def _steps_left(i: PlannerInput) -> float:
    limit = i.spec.budget.max_steps
    return math.inf if limit is None else limit - i.ledger.steps - _open_steps(i)


def _seconds_left(i: PlannerInput) -> float:
    limit = i.spec.budget.max_gpu_seconds
    return math.inf if limit is None else limit - i.ledger.charged_seconds - _reserved_seconds(i)


def _wallclock_left(i: PlannerInput) -> float:
    limit = i.spec.budget.max_wallclock
    started = i.ledger.first_time or i.now
    return math.inf if limit is None else limit - (i.now - started)


def budget_view(i: PlannerInput) -> BudgetView:
    """Limits and what ended jobs have used; the optimizer itself counts what it has pending.

    Wall clock counts as device-seconds of all workers.
    """
    spent = i.ledger.charged_seconds
    totals = []
    if i.spec.budget.max_gpu_seconds is not None:
        totals.append(i.spec.budget.max_gpu_seconds)
    if i.spec.budget.max_wallclock is not None:
        totals.append(spent + max(0.0, _wallclock_left(i)) * _slots(i))
    return BudgetView(
        total_seconds=min(totals) if totals else None,
        spent_seconds=spent,
        total_steps=i.spec.budget.max_steps,
        spent_steps=i.ledger.steps,
        workers=max(1, _slots(i)),
    )


def _slots(i: PlannerInput) -> int:
    return min(i.spec.parallelism, i.observed.devices)


def step_timeout(i: PlannerInput, entry_c: str, reserved: float) -> float:
    """Seconds an attempt may run: the manifest's, else max(15 min, 10 × expected + 5 min)."""
    if i.spec.failure_policy.step_timeout is not None:
        return i.spec.failure_policy.step_timeout
    if not entry_c.isdigit():
        return PREPARE_TIMEOUT
    per_device = reserved / (i.spec.trainer.devices * i.spec.gpu_share)
    return max(900.0, 10 * per_device + 300.0)


def end_reason(i: PlannerInput) -> tuple[str, str] | None:
    """Why no further step may be opened: (reason of Complete or Failed, message), or None."""
    ledger, spec = i.ledger, i.spec
    if spec.stop:
        return "Stopped", "spec.stop is set"
    if _failed_configs(i) >= spec.max_failed_configs:
        return "TooManyFailedConfigs", f"{_failed_configs(i)} configurations failed"
    if ledger.invalid_in_a_row >= INVALID_IN_A_ROW:
        return (
            "TooManyFailedConfigs",
            f"the trainer refused {ledger.invalid_in_a_row} jobs in a row",
        )
    if ledger.bugs_in_a_row >= BUGS_IN_A_ROW:
        return (
            "TooManyFailedConfigs",
            f"the trainer broke on {ledger.bugs_in_a_row} configurations in a row",
        )
    if ledger.steps >= (spec.budget.max_steps or math.inf):
        return "BudgetExhausted", f"{ledger.steps} of {spec.budget.max_steps} steps used"
    if ledger.charged_seconds >= (spec.budget.max_gpu_seconds or math.inf):
        total = spec.budget.max_gpu_seconds
        return "BudgetExhausted", f"{ledger.charged_seconds:.0f} of {total:.0f} device-seconds used"
    if _wallclock_left(i) <= 0:
        return "BudgetExhausted", f"{spec.budget.max_wallclock:.0f} seconds of wall clock used"
    return _optimizer_end(i)


def _optimizer_end(i: PlannerInput) -> tuple[str, str] | None:
    """The optimizer's own end, if its answer takes every recorded result into account."""
    view = i.optimizer
    if not view.answered or view.told != i.ledger.last_id:
        return None
    if view.finished is not None and (view.finished == "goal" or not _tuning(i)):
        return COMPLETE[view.finished], f"the optimizer finished: {view.finished}"
    if not view.proposals and not _tuning(i):
        return "SpaceExhausted", "the optimizer proposes nothing more"
    return None


def _failed_configs(i: PlannerInput) -> int:
    return sum(1 for reason in i.ledger.failed.values() if reason != "diverged")


def _held(i: PlannerInput) -> tuple[str, str] | None:
    """Why nothing new is opened although the run is not over, or None."""
    if i.ledger.cancelled_in_a_row >= INFRA_IN_A_ROW:
        return (
            "InfraRetriesExhausted",
            f"{i.ledger.cancelled_in_a_row} steps in a row used up their retries; see the logs",
        )
    for job in i.observed.jobs:
        if job.verdict is not None and job.verdict.reason == "disk_full":
            return "DiskFull", job.verdict.message or "no space left on the checkpoint volume"
        if job.verdict is not None and job.verdict.reason == "dataset_changed":
            return "DatasetChanged", job.verdict.message
    if i.optimizer.error:
        return "OptimizerUnhealthy", i.optimizer.error
    return None


def _phase(i: PlannerInput) -> Phase:
    if i.ledger.closed is not None:
        done = i.ledger.closed.reason in {*COMPLETE.values(), "Stopped"}
        return Phase.COMPLETED if done else Phase.FAILED
    if i.ledger.run is None:
        return Phase.PENDING
    if i.spec.suspend:
        running = any(job.phase is not JobPhase.ENDED for job in i.observed.jobs)
        return Phase.DRAINING if running else Phase.SUSPENDED
    if i.ledger.prepared is None:
        return Phase.PREPARING
    return Phase.FINISHING if end_reason(i) else Phase.RUNNING


# --- policies, in the order they are tried ----------------------------------------------------


def _start(i: PlannerInput) -> Iterator[Action]:
    """The first event of every run."""
    if i.ledger.run is None:
        event = Run(
            name=i.identity.name, spec_hash=i.identity.spec_hash, seed=i.identity.seed,
            algorithm=i.spec.optimizer.algorithm, version=i.identity.version,
            space_hash=i.identity.space_sha, spec=i.identity.raw_spec, files=i.identity.files,
        )  # fmt: skip
        yield RecordNote(event=event, key="run")


def _entry_of(i: PlannerInput, job: ObservedJob) -> OpenEntry | None:
    """The open entry whose present attempt this job is; None: the ledger waits for it no longer."""
    entry = i.ledger.open.get(job.c)
    if entry is None or (entry.to, entry.attempt) != (job.to, job.attempt):
        return None
    return entry


def _collect(i: PlannerInput) -> Iterator[Action]:
    """Record every end; drop ended jobs the ledger no longer waits for."""
    ended = [job for job in i.observed.jobs if job.phase is JobPhase.ENDED]
    for job in ended[:COMMITS_A_TURN]:
        entry = _entry_of(i, job)
        if entry is None:
            yield Forget(job=job.name)
        else:
            yield from _commit(i, entry, job)


def _commit(i: PlannerInput, entry: OpenEntry, job: ObservedJob) -> Iterator[Action]:
    assert job.verdict is not None  # filled by gather for ended jobs
    assert job.end is not None
    if job.verdict.kind is Ending.PREPARED:
        yield RecordNote(
            event=_prepared(i, entry, job.verdict, job.end), key=f"prepare-f{entry.to}"
        )
    else:
        event = settle(entry, job.verdict, job.end, i.spec)
        yield Commit(event=event)
        if job.verdict.reason == "bad_data" or (entry.c == PREPARE and isinstance(event, Cancel)):
            reason = "BadData" if job.verdict.kind is Ending.BAD_DATA else "TooManyFailedConfigs"
            if job.verdict.reason != "dataset_changed":
                close = Close(reason=reason, msg=job.verdict.message)
                yield RecordNote(event=close, key=f"close-{i.ledger.last_id}")
    yield Forget(job=job.name)


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


def _kill(i: PlannerInput) -> Iterator[Action]:
    """End jobs nobody waits for, that outlive their limit, or that the user stopped or evicted.

    The trainer's own limit comes a grace period earlier than ours.
    """
    stop = i.spec.stop or (i.spec.suspend and i.spec.suspend_policy == "Evict")
    for job in i.observed.jobs:
        if job.phase is JobPhase.ENDED:
            continue
        entry = _entry_of(i, job)
        if entry is None or stop:
            yield Kill(job=job.name, reason="Stopped")
        elif job.phase is JobPhase.RUNNING and job.started_at is not None:
            overdue = i.now - job.started_at > step_timeout(i, entry.c, entry.reserved)
            if overdue:
                yield Kill(job=job.name, reason="DeadlineExceeded")


def _reopen(i: PlannerInput) -> Iterator[Action]:
    """A raised budget reopens a run that ended by budget."""
    closed = i.ledger.closed
    if closed is not None and closed.reason == "BudgetExhausted" and end_reason(i) is None:
        yield RecordNote(event=Reopen(reason="BudgetRaised"), key=f"reopen-{closed.id}")


def _close(i: PlannerInput) -> Iterator[Action]:
    """End the run once nothing is open."""
    reason = end_reason(i)
    if i.ledger.closed is not None or reason is None:
        return
    if i.spec.stop:
        running = {job.c for job in i.observed.jobs}
        for entry in i.ledger.open.values():
            if entry.c not in running:
                cancel = Cancel(c=entry.c, to=entry.to, a=entry.attempt, reason="Stopped")
                yield Commit(event=cancel)
    if not i.ledger.open:
        event = Close(reason=reason[0], msg=reason[1])
        yield RecordNote(event=event, key=f"close-{i.ledger.last_id}")


def _recreate(i: PlannerInput) -> Iterator[Action]:
    """Start the present attempt of every open entry without a job (30-kubernetes 3.3, absence)."""
    if i.ledger.closed is not None or (i.spec.suspend or i.spec.stop):
        return
    present = {(job.c, job.to, job.attempt) for job in i.observed.jobs}
    created = 0
    for entry in [*(e for e in i.ledger.open.values() if not e.c.isdigit()), *_tuning(i)]:
        due = entry.since + retry_delay(entry)
        absent = (entry.c, entry.to, entry.attempt) not in present
        if absent and i.observed.synced_at >= entry.since and i.now >= due:
            created += 1
            if created > CREATIONS_A_TURN:
                return
            yield CreateJob(
                kind="step" if entry.c.isdigit() else entry.c.split("-")[0],
                c=entry.c, frm=entry.frm, to=entry.to, attempt=entry.attempt,
                decision=entry.decision, allow_restart=may_restart(entry),
                timeout_seconds=step_timeout(i, entry.c, entry.reserved),
            )  # fmt: skip


def _prepare(i: PlannerInput) -> Iterator[Action]:
    """Read the data set once, before anything is asked; then build the optimizer."""
    if not _may_open(i):
        return
    if i.ledger.prepared is None and PREPARE not in i.ledger.open:
        decision = decision_hash(
            uid=i.identity.uid, config=PREPARE, fidelity_from=0, fidelity_to=1, config_digest="",
            space_sha=i.identity.space_sha, seed=i.identity.seed, position=i.ledger.last_id,
        )  # fmt: skip
        event = Open(
            c=PREPARE, frm=0, to=1, h=decision, res=PREPARE_SECONDS, ver=i.identity.version
        )
        yield OpenStep(event=event, config=None)
    if i.ledger.prepared is not None and not (i.optimizer.loaded or i.optimizer.busy):
        yield LoadOptimizer()


def _open(i: PlannerInput) -> Iterator[Action]:
    """Record the optimizer's proposals that the budget still admits; give the others back."""
    steps, seconds = _steps_left(i), _seconds_left(i)
    free = _slots(i) - len(_tuning(i))
    for proposal in i.optimizer.proposals:
        admitted = _may_open(i) and free > 0 and steps >= 1 and seconds > 0
        if not admitted or str(proposal.config_id) in i.ledger.open or _held(i):
            yield Abandon(config_id=proposal.config_id)
            continue
        event = _opened(i, proposal, steps)
        yield OpenStep(event=event, config=proposal.config)
        free -= 1
        steps -= _steps_of(event.frm, event.to, i.spec.fidelity.step)
        seconds -= event.res


def _opened(i: PlannerInput, proposal: Proposal, steps_left: float) -> Open:
    """The decision, its span cut to the steps that are left (`maxSteps` is never overshot)."""
    delta = i.spec.fidelity.step
    frm, to = proposal.fidelity_from, proposal.fidelity_to
    if _steps_of(frm, to, delta) > steps_left:
        to = frm + int(steps_left) * delta
    share = (to - frm) / (proposal.fidelity_to - frm)
    decision = decision_hash(
        uid=i.identity.uid, config=proposal.config_id, fidelity_from=frm, fidelity_to=to,
        config_digest=digest(dict(proposal.config)), space_sha=i.identity.space_sha,
        seed=i.identity.seed, position=i.optimizer.told,
    )  # fmt: skip
    return Open(
        c=str(proposal.config_id), frm=frm, to=to, h=decision, why=proposal.why.to_json(),
        res=proposal.expected_seconds * share * i.spec.trainer.devices * i.spec.gpu_share,
        ver=i.identity.version,
    )  # fmt: skip


def _ask(i: PlannerInput) -> Iterator[Action]:
    """Feed the optimizer what happened, then ask for as many configurations as slots are free."""
    if not i.optimizer.loaded or i.optimizer.busy or i.ledger.closed is not None:
        return
    if i.optimizer.told != i.ledger.last_id:
        yield Tell()
    free = _slots(i) - len(_tuning(i))
    if free <= 0 or not _may_open(i) or _held(i) or end_reason(i) is not None:
        return
    if _steps_left(i) < 1 or _seconds_left(i) <= 0:
        return
    if i.optimizer.answered and i.optimizer.told == i.ledger.last_id:
        return  # it has nothing to propose until a pending result arrives
    yield Ask(n=free, budget=budget_view(i))


def _may_open(i: PlannerInput) -> bool:
    return i.ledger.closed is None and not i.spec.suspend and end_reason(i) is None


def _next_deadline(i: PlannerInput) -> float:
    """Seconds until a time-out or a delayed retry is due."""
    waits = [300.0]
    for entry in i.ledger.open.values():
        waits.append(entry.since + retry_delay(entry) - i.now)
    for job in i.observed.jobs:
        waited = _entry_of(i, job)
        if waited is not None and job.started_at is not None and job.phase is JobPhase.RUNNING:
            limit = step_timeout(i, waited.c, waited.reserved)
            waits.append(job.started_at + limit - i.now + 0.5)
    if i.spec.budget.max_wallclock is not None:
        waits.append(_wallclock_left(i))
    return max(0.05, min(wait for wait in waits if wait > 0))

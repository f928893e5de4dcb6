"""`decide`: from what is known to what to do next. Pure: no clock, no I/O, no torch.

A turn gathers (`PlannerInput`), asks here, and acts. Each policy below is one small function of the
input; `decide` tries them in a fixed order and returns the first plan that has work, so that a turn
changes one kind of thing and the next turn sees its effect. Results are recorded before anything
new is opened; a decision is in the ledger before its job exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qtt_core.collecting import closing, collect
from qtt_core.ledger.events import (
    PREPARE,
    WEIGHTS,
    Cancel,
    Note,
    Open,
    Reopen,
    Run,
    is_evaluation,
    is_pseudo,
)
from qtt_core.ledger.fold import RETRY_NOTE
from qtt_core.limits import (
    PREPARE_TIMEOUT,
    awaits_weights,
    budget_view,
    end_reason,
    entry_of,
    head_of,
    held,
    is_lost,
    is_resting,
    lacks_volume,
    lost_steps,
    may_open,
    may_reopen,
    next_attempt,
    phase,
    seconds_left,
    slots,
    step_timeout,
    steps_left,
    steps_of,
    template_hash,
    tuning,
    volumes_taken,
    waits_for_volume,
    wallclock_left,
)
from qtt_core.plan import (
    Abandon,
    Action,
    Ask,
    Cause,
    Commit,
    CreateJob,
    Evaluation,
    Identity,
    JobEnd,
    JobPhase,
    LoadOptimizer,
    Observed,
    ObservedJob,
    OpenStep,
    OptimizerView,
    Plan,
    PlannerInput,
    RecordNote,
    Requeue,
    Tell,
    Verdict,
)
from qtt_core.retention import was_swept
from qtt_core.settle import (
    may_restart,
    memory_factor,
    oom_kills,
    retry_delay,
)
from qtt_core.steering import due, steer
from qtt_core.steps import Proposal, decision_hash, digest
from qtt_core.wishes import evaluate, finetune, is_new, note_key

__all__ = [
    "PREPARE_TIMEOUT",
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

CREATIONS_A_TURN = 10
"""So that a run with a long backlog cannot starve the others."""

PREPARE_SECONDS = 60.0
"""Reservation of `prepare`, recorded with its decision."""

AVOID_SECONDS = 3600.0
"""How long a node whose device failed is avoided."""


def decide(i: PlannerInput) -> Plan:
    """The next plan of a run. The same input gives the same plan."""
    steering: tuple[Action, ...] = tuple(steer(i))
    work: tuple[Action, ...] = ()
    for policy in _POLICIES:
        work = tuple(policy(i))
        if work:
            break
    rest = work or (Requeue(after=_next_deadline(i)),)
    return Plan(actions=(*steering, *rest), phase=phase(i), held=held(i) or waits_for_volume(i))


# --- policies, in the order they are tried ----------------------------------------------------


def _start(i: PlannerInput) -> Iterator[Action]:
    """The first event of every run."""
    if i.ledger.run is None:
        event = Run(
            name=i.identity.name, spec_hash=i.identity.spec_hash, seed=i.identity.seed,
            algorithm=i.spec.optimizer.algorithm, version=i.identity.version,
            space_hash=i.identity.space_sha, spec=i.identity.raw_spec, files=i.identity.files,
            prior=i.identity.prior,
        )  # fmt: skip
        yield RecordNote(event=event, key="run")


def _retry(i: PlannerInput) -> Iterator[Action]:
    """Note a person's wish to try again, once per token; `old` = the loss it accepts, if any."""
    if is_new(i.ledger, RETRY_NOTE, i.wishes.retry):
        accepted = str(i.counted_steps) if lost_steps(i) else ""
        event = Note(what=RETRY_NOTE, new=i.wishes.retry, old=accepted)
        yield RecordNote(event=event, key=note_key(RETRY_NOTE, i.wishes.retry))


def _readopt(i: PlannerInput) -> Iterator[Action]:
    """Record again, from the jobs themselves, decisions that the store has lost."""
    for job in i.observed.jobs:
        if job.opening is not None and is_lost(i, job) and job.c not in i.ledger.open:
            event = replace(job.opening.event, id="", ep=0, a=job.attempt)
            if event.frm == head_of(i, job.c):
                yield replace(job.opening, event=event)


def _reopen(i: PlannerInput) -> Iterator[Action]:
    """Go on with a closed run: its budget was raised, or a person asked to try again."""
    reason = may_reopen(i)
    if reason and i.ledger.closed is not None:
        yield RecordNote(event=Reopen(reason=reason), key=f"reopen-{i.ledger.closed.id}")


def _close(i: PlannerInput) -> Iterator[Action]:
    """End the run once nothing is open; what has no job is not started any more.

    Data that cannot be read end it at once: what is open then is cancelled when its job has ended.
    """
    reason = end_reason(i)
    closed = i.ledger.closed is not None
    if not closed and (reason is None or (lost_steps(i) and not i.spec.stop)):
        return
    present = {job.c for job in i.observed.jobs}
    waiting = [entry for entry in i.ledger.open.values() if not is_evaluation(entry.c)]
    for entry in waiting:
        if entry.c not in present and i.observed.synced_at >= entry.since:
            cancel = Cancel(c=entry.c, to=entry.to, a=entry.attempt, reason=Cause.STOPPED)
            yield Commit(event=cancel)
    if reason is not None and not (closed or waiting):
        yield closing(i, *reason)


def _recreate(i: PlannerInput) -> Iterator[Action]:
    """Start the present attempt of every open entry without a job (30-kubernetes 3.3, absence)."""
    if i.spec.suspend or lost_steps(i):
        return
    present = {(job.c, job.to, job.attempt) for job in i.observed.jobs}
    created = 0
    pseudo = [entry for entry in i.ledger.open.values() if is_pseudo(entry.c)]
    for entry in [*pseudo, *tuning(i)]:
        if not is_evaluation(entry.c) and (i.ledger.closed is not None or i.spec.stop):
            continue
        due = entry.since + retry_delay(entry)
        absent = (entry.c, entry.to, entry.attempt) not in present
        if absent and i.observed.synced_at >= entry.since and i.now >= due:
            created += 1
            if created > CREATIONS_A_TURN:
                return
            yield CreateJob(
                kind=_kind(entry.c),
                c=entry.c, frm=entry.frm, to=entry.to, attempt=entry.attempt,
                decision=entry.decision,
                allow_restart=may_restart(entry) or was_swept(i.ledger.notes, entry.c, entry.frm),
                timeout_seconds=step_timeout(i, entry.c, entry.reserved),
                oom_kills=oom_kills(entry), memory_factor=memory_factor(entry),
                avoid_nodes=_avoided(i),
                evaluation=Evaluation.from_json(entry.why) if is_evaluation(entry.c) else None,
            )  # fmt: skip


def _kind(c: str) -> str:
    if not is_pseudo(c):
        return "step"
    return "evaluate" if is_evaluation(c) else c


def _avoided(i: PlannerInput) -> tuple[str, ...]:
    bad = i.ledger.bad_nodes.items()
    return tuple(sorted(node for node, since in bad if i.now - since < AVOID_SECONDS))


def _weights(i: PlannerInput) -> Iterator[Action]:
    """Fetch what the run's claim lacks, before anything else mounts it."""
    asked = WEIGHTS in i.ledger.open or i.ledger.weights_missing
    if may_open(i) and awaits_weights(i) and not asked:
        yield _opened_alone(i, WEIGHTS, 0, reserved=0.0)


def _prepare(i: PlannerInput) -> Iterator[Action]:
    """Read the data set before anything is asked; then build the optimizer.

    Data that changed are read again when a person asks for it; the trainer compares.
    """
    if not may_open(i) or awaits_weights(i):
        return
    before = i.ledger.prepared
    if (before is None or i.ledger.recheck) and PREPARE not in i.ledger.open:
        frm = 0 if before is None else before.to
        yield _opened_alone(i, PREPARE, frm, reserved=PREPARE_SECONDS)
    idle = not (i.optimizer.loaded or i.optimizer.busy or is_resting(i))
    if i.ledger.prepared is not None and idle:
        yield LoadOptimizer()


def _opened_alone(i: PlannerInput, c: str, frm: int, *, reserved: float) -> OpenStep:
    """The decision to run a pseudo-configuration."""
    decision = decision_hash(
        uid=i.identity.uid, config=c, fidelity_from=frm, fidelity_to=frm + 1,
        config_digest="", space_sha=i.identity.space_sha, seed=i.identity.seed,
        position=i.ledger.last_id,
    )  # fmt: skip
    event = Open(
        c=c, frm=frm, to=frm + 1, a=next_attempt(i, c, frm + 1), h=decision,
        res=reserved, ver=i.identity.version, tpl=template_hash(i.spec),
    )  # fmt: skip
    return OpenStep(event=event, config=None)


def _open(i: PlannerInput) -> Iterator[Action]:
    """Record the optimizer's proposals that the budget still admits; give the others back."""
    steps, seconds = steps_left(i), seconds_left(i)
    free, taken = slots(i) - len(tuning(i)), volumes_taken(i)
    for proposal in i.optimizer.proposals:
        admitted = may_open(i) and free > 0 and steps >= 1 and seconds > 0
        if not admitted or str(proposal.config_id) in i.ledger.open or held(i):
            yield Abandon(config_id=proposal.config_id)
            continue
        if lacks_volume(i, proposal.config_id, taken):
            continue  # it waits; the next answer of the optimizer takes its place
        taken.add(str(proposal.config_id))
        event = _opened(i, proposal, steps)
        yield OpenStep(event=event, config=proposal.config)
        free -= 1
        steps -= steps_of(event.frm, event.to, i.spec.fidelity.step)
        seconds -= event.res


def _opened(i: PlannerInput, proposal: Proposal, steps_left: float) -> Open:
    """The decision, its span cut to the steps that are left (`maxSteps` is never overshot)."""
    delta = i.spec.fidelity.step
    frm, to = proposal.fidelity_from, proposal.fidelity_to
    if steps_of(frm, to, delta) > steps_left:
        to = frm + int(steps_left) * delta
    share = (to - frm) / (proposal.fidelity_to - frm)
    decision = decision_hash(
        uid=i.identity.uid, config=proposal.config_id, fidelity_from=frm, fidelity_to=to,
        config_digest=digest(dict(proposal.config)), space_sha=i.identity.space_sha,
        seed=i.identity.seed, position=i.optimizer.told,
    )  # fmt: skip
    return Open(
        c=str(proposal.config_id), frm=frm, to=to, a=next_attempt(i, str(proposal.config_id), to),
        h=decision, why=proposal.why.to_json(),
        res=proposal.expected_seconds * share * i.spec.charged_devices,
        ver=i.identity.version, tpl=template_hash(i.spec),
    )  # fmt: skip


def _ask(i: PlannerInput) -> Iterator[Action]:
    """Feed the optimizer what happened, then ask for as many configurations as slots are free."""
    view = i.optimizer
    if not view.loaded or view.busy or is_resting(i) or i.ledger.closed is not None:
        return
    if i.optimizer.told != i.ledger.last_id:
        yield Tell()
    free = slots(i) - len(tuning(i))
    if free <= 0 or not may_open(i) or held(i) or end_reason(i) is not None:
        return
    if steps_left(i) < 1 or seconds_left(i) <= 0:
        return
    if i.optimizer.answered and i.optimizer.told == i.ledger.last_id:
        return  # it has nothing to propose until a pending result arrives
    yield Ask(n=free, budget=budget_view(i))


def _next_deadline(i: PlannerInput) -> float:
    """Seconds until a time-out or a delayed retry is due."""
    waits = [300.0, i.optimizer.retry_at - i.now]
    for entry in i.ledger.open.values():
        waits.append(entry.since + retry_delay(entry) - i.now)
    for job in i.observed.jobs:
        waited = entry_of(i, job)
        if waited is not None and job.phase is not JobPhase.ENDED:
            waits.append(due(i, waited, job) - i.now + 0.5)
    if i.spec.budget.max_wallclock is not None:
        waits.append(wallclock_left(i))
    return max(0.05, min(wait for wait in waits if wait > 0))


_POLICIES = (
    _start, _readopt, collect, _retry, evaluate, finetune, _reopen, _close, _recreate,
    _weights, _prepare, _open, _ask,
)  # fmt: skip
"""In the order they are tried; the first that has work makes the plan."""

"""What a run has left, why it ends and why it stands still, read off a planner's input. Pure.

Nothing here orders anything; `planner` turns these facts into actions, status shows them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping

from qtt_core.ledger.events import PREPARE, is_evaluation, is_pseudo
from qtt_core.ledger.fold import FINETUNE_NOTE, RETRY_NOTE, LedgerState, OpenEntry, position
from qtt_core.plan import JobPhase, ObservedJob, Phase, PlannerInput
from qtt_core.results import State
from qtt_core.spec import Budget, RunSpec
from qtt_core.steps import BudgetView, digest

PREPARE_TIMEOUT = 4 * 3600.0
FEW_MODELS = 4
"""So many are named in a command to type; of more the whole hub is fetched."""

BUGS_IN_A_ROW, INVALID_IN_A_ROW, INFRA_IN_A_ROW = 5, 3, 3
"""Configurations lost one after the other, no result between, before a person must look."""

COMPLETE = {
    "goal": "GoalReached",
    "gain": "GainExhausted",
    "exhausted": "SpaceExhausted",
    "budget": "BudgetExhausted",
}
"""The optimizer's word for an end -> the reason of the condition Complete."""


def steps_of(frm: int, to: int, delta: int) -> int:
    """Steps of `delta` epochs between two epochs; the last one may be shorter."""
    return math.ceil((to - frm) / delta)


def tuning(i: PlannerInput) -> list[OpenEntry]:
    """Open entries of real configurations, in id order."""
    entries = [entry for c, entry in i.ledger.open.items() if c.isdigit()]
    return sorted(entries, key=lambda entry: int(entry.c))


def _reserved_seconds(i: PlannerInput) -> float:
    return sum(entry.reserved for entry in tuning(i))


def _open_steps(i: PlannerInput) -> int:
    return sum(steps_of(entry.frm, entry.to, i.spec.fidelity.step) for entry in tuning(i))


def steps_left(i: PlannerInput) -> float:
    """Steps that may still be opened."""
    limit = i.spec.budget.max_steps
    return math.inf if limit is None else limit - i.ledger.steps - _open_steps(i)


def seconds_left(i: PlannerInput) -> float:
    """Device-seconds neither charged nor reserved."""
    limit = i.spec.budget.max_gpu_seconds
    return math.inf if limit is None else limit - i.ledger.charged_seconds - _reserved_seconds(i)


def wallclock_left(i: PlannerInput) -> float:
    """Seconds of wall clock left, counted from the run's first event."""
    limit = i.spec.budget.max_wallclock
    started = i.ledger.first_time or i.now
    return math.inf if limit is None else limit - (i.now - started)


def budget_view(i: PlannerInput) -> BudgetView:
    """Limits and what ended jobs have used; the optimizer itself counts what it has pending.

    Seconds are those of one Job, as the optimizer is told and predicts them: a Job on many devices
    uses a budget of device-seconds up faster. Wall clock counts for all workers.
    """
    rate = i.spec.charged_devices
    spent = i.ledger.charged_seconds / rate
    totals = []
    if i.spec.budget.max_gpu_seconds is not None:
        totals.append(i.spec.budget.max_gpu_seconds / rate)
    if i.spec.budget.max_wallclock is not None:
        totals.append(spent + max(0.0, wallclock_left(i)) * slots(i))
    return BudgetView(
        total_seconds=min(totals) if totals else None,
        spent_seconds=spent,
        total_steps=i.spec.budget.max_steps,
        spent_steps=i.ledger.steps,
        workers=max(1, slots(i)),
    )


def slots(i: PlannerInput) -> int:
    """Jobs that may be open at once."""
    return min(i.spec.parallelism, i.observed.devices)


def step_timeout(i: PlannerInput, entry_c: str, reserved: float) -> float:
    """Seconds an attempt may run: the manifest's, else max(15 min, 10 × expected + 5 min)."""
    if i.spec.failure_policy.step_timeout is not None:
        return i.spec.failure_policy.step_timeout
    if not entry_c.isdigit():
        return PREPARE_TIMEOUT
    return max(900.0, 10 * reserved / i.spec.charged_devices + 300.0)


def template_hash(spec: RunSpec) -> str:
    """Which pod template a decision was made under; empty without one."""
    return digest(spec.template)[:12] if spec.template else ""


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
    if wallclock_left(i) <= 0:
        return "BudgetExhausted", f"{spec.budget.max_wallclock:.0f} seconds of wall clock used"
    return None if wished(i.ledger, i.spec.fidelity.max) else _optimizer_end(i)


def may_open(i: PlannerInput) -> bool:
    """Whether steps may begin: the run goes on, and the store knows all that was counted."""
    going = i.ledger.closed is None and not i.spec.suspend and end_reason(i) is None
    return going and not lost_steps(i)


def wished(ledger: LedgerState, full: int) -> list[str]:
    """Configurations that a person wants at epoch `full` and that can still get there."""
    found: dict[str, None] = {}
    for note in ledger.notes:
        ids = json.loads(note.old) if note.what == FINETUNE_NOTE else None
        if isinstance(ids, list):
            found |= dict.fromkeys(map(str, ids))
    return [c for c in found if c not in ledger.failed and ledger.heads.get(c, 0) < full]


def lost_steps(i: PlannerInput) -> int:
    """Steps that were counted and that the ledger does not know, 0 once a person accepts that."""
    lost = i.counted_steps - i.ledger.steps
    accepted = any(
        note.what == RETRY_NOTE and note.old == str(i.counted_steps) for note in i.ledger.notes
    )
    return 0 if accepted else max(0, lost)


def _optimizer_end(i: PlannerInput) -> tuple[str, str] | None:
    """The optimizer's own end, if its answer takes every recorded result into account."""
    view = i.optimizer
    if not view.answered or view.told != i.ledger.last_id:
        return None
    if view.finished is not None and (view.finished == "goal" or not tuning(i)):
        return COMPLETE[view.finished], f"the optimizer finished: {view.finished}"
    if not view.proposals and not tuning(i):
        return "SpaceExhausted", "the optimizer proposes nothing more"
    return None


def _failed_configs(i: PlannerInput) -> int:
    return sum(1 for reason in i.ledger.failed.values() if reason != "diverged")


def held(i: PlannerInput) -> tuple[str, str] | None:
    """Why nothing new is opened although the run is not over, or None."""
    if lost_steps(i) or any(is_lost(i, job) for job in i.observed.jobs):
        return "DataRegressed", _regressed(lost_steps(i))
    if i.ledger.cancelled_in_a_row >= INFRA_IN_A_ROW:
        return (
            "InfraRetriesExhausted",
            f"{i.ledger.cancelled_in_a_row} steps in a row used up their retries; see the logs",
        )
    lacking = _lacking_weights(i)
    if lacking:
        return "WeightsMissing", lacking
    if i.ledger.dataset_changed:
        return "DatasetChanged", i.ledger.dataset_changed
    full = [e.c for e in i.ledger.open.values() if e.retries[-1:] == (State.DISK_FULL.value,)]
    if full:
        return "DiskFull", f"no space left on the checkpoint volume; waiting: {', '.join(full)}"
    if is_resting(i):
        return "OptimizerUnhealthy", i.optimizer.error
    return None


def _lacking_weights(i: PlannerInput) -> str:
    """Which models have no weights, why, and what to type; empty if none is known to lack them."""
    missing = i.ledger.prepared.missing_weights if i.ledger.prepared is not None else ()
    if i.ledger.weights_missing:
        why, missing = i.ledger.weights_missing, i.supply.models
    elif missing and (i.supply.offline or i.spec.weights.fetch == "Never"):
        why = f"no pretrained weights for {', '.join(missing)}"
    else:
        return ""
    claim, words = i.supply.claim or "CLAIM", ["qtt weights fetch --hub", i.supply.hub or "HUB"]
    if len(missing) <= FEW_MODELS:
        words += [f"--model {name}" for name in missing]
    return (
        f"{why[:600]}. Where the hub can be reached: {' '.join(words)} --to DIR; then"
        f" qtt data push DIR {claim}, then annotate quicktune.dev/retry with a new token"
    )


def awaits_weights(i: PlannerInput) -> bool:
    """Whether a `weights` job must end well before the data set is read."""
    ledger = i.ledger
    return bool(i.supply.models) and ledger.weights is None and ledger.prepared is None


def _regressed(steps: int) -> str:
    if not steps:
        return "the store has lost decisions whose jobs still exist; they are recorded again"
    return (
        f"the store lacks {steps} steps that were counted; jobs that still exist are read again."
        " Restore it, or go on without them: annotate quicktune.dev/retry with a new token"
    )


def volumes_taken(i: PlannerInput) -> set[str]:
    """Configurations that have a volume of their own, or are about to get one."""
    return set(i.observed.volumes or ()) | {entry.c for entry in tuning(i)}


def lacks_volume(i: PlannerInput, config_id: int, taken: Collection[str]) -> bool:
    """Whether a configuration needs a volume more than `checkpoint.maxVolumes` allows."""
    checkpoint = i.spec.checkpoint
    if i.observed.volumes is None or checkpoint is None or checkpoint.max_volumes is None:
        return False
    return str(config_id) not in taken and len(taken) >= checkpoint.max_volumes


def waits_for_volume(i: PlannerInput) -> tuple[str, str] | None:
    """Why nothing runs although there are proposals: every one of them needs a volume more."""
    taken, proposals = volumes_taken(i), i.optimizer.proposals
    if tuning(i) or not proposals:
        return None
    if not all(lacks_volume(i, proposal.config_id, taken) for proposal in proposals):
        return None
    return (
        "NoProgress",
        f"checkpoint.maxVolumes: {len(taken)} volumes hold configurations that may go on; "
        "the least promising one is deleted for the next",
    )


def is_resting(i: PlannerInput) -> bool:
    """Whether the optimizer has failed and is not due to be tried again."""
    return bool(i.optimizer.error) and i.now < i.optimizer.retry_at


def phase(i: PlannerInput) -> Phase:
    """Where the run is, for people's eyes."""
    if i.ledger.closed is not None:
        done = i.ledger.closed.reason in {*COMPLETE.values(), "Stopped"}
        return Phase.COMPLETED if done else Phase.FAILED
    if i.ledger.run is None:
        return Phase.PENDING
    if i.spec.suspend:
        running = any(job.phase in {JobPhase.PENDING, JobPhase.RUNNING} for job in i.observed.jobs)
        return Phase.DRAINING if running else Phase.SUSPENDED
    if i.ledger.prepared is None:
        return Phase.PREPARING
    return Phase.FINISHING if end_reason(i) else Phase.RUNNING


def entry_of(i: PlannerInput, job: ObservedJob) -> OpenEntry | None:
    """The open entry whose present attempt this job is; None: the ledger waits for it no longer."""
    entry = i.ledger.open.get(job.c)
    if entry is None or (entry.to, entry.attempt) != (job.to, job.attempt):
        return None
    return entry


def is_lost(i: PlannerInput, job: ObservedJob) -> bool:
    """Whether a job carries a decision that the ledger should hold and does not (3.3, 10 and 11).

    The store came back without its newest writes. A decision that was cancelled, or whose epochs
    are already recorded, is old, not lost.
    """
    ledger, entry = i.ledger, i.ledger.open.get(job.c)
    if job.opening is None or ledger.run is None:
        return False
    if ledger.closed is not None and not is_evaluation(job.c):
        return False
    if job.c in ledger.failed or (job.c, job.to) in ledger.step_keys:
        return False
    frm, opened_id = job.opening.event.frm, job.opening.event.id
    looked = [note.id for note in ledger.notes if note.what == RETRY_NOTE]
    if opened_id and any(_is_later(stream_id, opened_id) for stream_id in looked):
        return False  # written after the loss: a person accepts it
    return (
        head_of(i, job.c) <= frm
        and ledger.attempts.get((job.c, job.to), 0) <= job.attempt
        and (entry is None or entry.to <= frm)
    )


def head_of(i: PlannerInput, c: str) -> int:
    """The epoch from which a decision of `c` must begin."""
    if not is_pseudo(c):
        return i.ledger.heads.get(c, 0)
    return i.ledger.prepared.to if c == PREPARE and i.ledger.prepared is not None else 0


def next_attempt(i: PlannerInput, c: str, to: int) -> int:
    """The attempt a new decision begins with: names of jobs are never used twice."""
    used = i.ledger.attempts.get((c, to), 0)
    before = i.ledger.prepared
    return used if c != PREPARE or before is None else max(used, before.a + 1)


def budget_limits(budget: Budget) -> dict[str, float]:
    """The limits that are set, by their names in the manifest."""
    known = {
        "maxSteps": budget.max_steps,
        "maxGPUSeconds": budget.max_gpu_seconds,
        "maxWallclock": budget.max_wallclock,
    }
    return {name: value for name, value in known.items() if value is not None}


def may_reopen(i: PlannerInput) -> str:
    """Why a closed run goes on, empty if it stays closed.

    A raised budget reopens a run that ended by budget; a person's wish one that failed. What the
    ledger says of the budget at the close counts: the optimizer may have ended it before its limit.
    """
    closed = i.ledger.closed
    if closed is None or i.spec.stop:
        return ""
    if closed.reason == COMPLETE["budget"]:
        raised = _is_raised(closed.budget, budget_limits(i.spec.budget))
        if raised:
            return "BudgetRaised" if end_reason(i) is None else ""
    asked = {note.what for note in i.ledger.notes if _is_later(note.id, closed.id)}
    if closed.reason not in {*COMPLETE.values(), "Stopped"}:
        return "Retried" if RETRY_NOTE in asked else ""
    chosen = FINETUNE_NOTE in asked and wished(i.ledger, i.spec.fidelity.max)
    return "Finetune" if chosen and end_reason(i) is None else ""


def _is_raised(old: Mapping[str, float], new: Mapping[str, float]) -> bool:
    """Whether a limit has grown or gone; a close of an older version does not say its limits."""
    return not old or any(new.get(name, math.inf) > limit for name, limit in old.items())


def _is_later(stream_id: str, than: str) -> bool:
    return position(stream_id) > position(than)

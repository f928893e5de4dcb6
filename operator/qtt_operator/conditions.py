"""Which conditions are true of a run, and why: the one place that chooses type and reason. Pure.

Positive polarity; `Complete` and `Failed` exclude each other. `names.REASONS` lists every reason,
docs/operations.md explains each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtt_core.errors import (
    NewerSchemaError,
    NotFoundError,
    QuickTuneError,
    SpecDriftError,
    SpecError,
    StoreUnavailableError,
)
from qtt_core.ledger.events import WEIGHTS
from qtt_core.ledger.fold import LedgerState
from qtt_core.plan import JobPhase, ObservedJob, OptimizerView, Phase
from qtt_operator.names import COMPLETE_REASONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """A condition as it should be now."""

    type: str
    status: bool
    reason: str
    message: str = ""


_HELD = {
    "DatasetChanged": ("Suspended", True),
    "DataRegressed": ("StoreAvailable", False),
    "WeightsMissing": ("Accepted", False),
}
"""Why a run is held -> the condition that says so, beside `Progressing`."""

_OWN_PROGRESS = frozenset({"InfraRetriesExhausted", "DiskFull"})
"""Reasons of `Progressing` itself."""

_MISSING = {"spec.dataset": "DatasetNotFound", "spec.weights": "WeightsMissing"}


def of_run(ledger: LedgerState, phase: Phase, held: tuple[str, str] | None) -> list[Truth]:
    """What the ledger and the planner say; of one type the last truth counts."""
    found: list[Truth] = []
    if ledger.run is not None:
        bad = ledger.closed is not None and ledger.closed.reason == "BadData"
        reason = "BadData" if bad else "Valid"
        found.append(Truth(type="Accepted", status=not bad, reason=reason))
    if ledger.closed is not None:
        reason, message = ledger.closed.reason, ledger.closed.msg
        kind = "Complete" if reason in COMPLETE_REASONS else "Failed"
        found.append(Truth(type=kind, status=True, reason=reason, message=message))
        found.append(Truth(type="Progressing", status=False, reason=reason))
    elif phase in {Phase.SUSPENDED, Phase.DRAINING}:
        reason = "Draining" if phase is Phase.DRAINING else "UserRequested"
        found.append(Truth(type="Suspended", status=phase is Phase.SUSPENDED, reason=reason))
    elif held is not None:
        found += _held(*held)
    elif WEIGHTS in ledger.open:
        message = "the weights Job looks for pretrained weights and fetches what is missing"
        found.append(
            Truth(type="Progressing", status=True, reason="FetchingWeights", message=message)
        )
    else:
        message = f"{len(ledger.open)} steps open"
        found.append(Truth(type="Progressing", status=True, reason="StepsRunning", message=message))
    return found


def _held(why: str, message: str) -> list[Truth]:
    reason = why if why in _OWN_PROGRESS else "NoProgress"
    found = [Truth(type="Progressing", status=False, reason=reason, message=message)]
    if why in _HELD:
        kind, status = _HELD[why]
        found.append(Truth(type=kind, status=status, reason=why, message=message))
    return found


def of_optimizer(
    view: OptimizerView, trouble: tuple[str, str] | None = None, *, began: str, version: str
) -> Truth | None:
    """The optimizer's health.

    `trouble`: reason and message of what its workers went through. `began`: the version that
    started the run, `version`: ours.
    """
    kind = "OptimizerHealthy"
    if trouble is not None:
        return Truth(type=kind, status=False, reason=trouble[0], message=trouble[1])
    if view.error:
        return Truth(type=kind, status=False, reason=view.fault or "Failed", message=view.error)
    if not view.loaded:
        return None
    if began and began != version:
        words = f"the run began under {began}, this is {version}: new proposals may differ"
        return Truth(type=kind, status=True, reason="VersionSkew", message=words)
    return Truth(type=kind, status=True, reason="Ready")


def of_jobs(jobs: Sequence[ObservedJob], waiting: Callable[[], tuple[str, str]]) -> list[Truth]:
    """Why nothing runs although Jobs are there; `waiting`: (reason, message) of a pending pod."""
    phases = {job.phase for job in jobs if not job.put_aside}
    if JobPhase.RUNNING in phases:
        return []
    if JobPhase.PENDING in phases:
        reason, message = waiting()
        found = Truth(type="Progressing", status=False, reason=reason, message=message)
        return [found] if reason else []
    if JobPhase.QUEUED in phases:
        message = "Jobs are suspended: a queue holds them back"
        return [Truth(type="Progressing", status=False, reason="WaitingForQuota", message=message)]
    return []


def of_error(error: QuickTuneError) -> Truth:
    """What it means for a run that a turn of it raised this."""
    kind, reason = "StoreAvailable", "DataRegressed"
    if isinstance(error, SpecDriftError):
        kind, reason = "Accepted", "SpecDrift"
    elif isinstance(error, SpecError):
        kind, reason = "Accepted", _invalid(error)
    elif isinstance(error, NewerSchemaError):
        reason = "NewerSchema"
    elif isinstance(error, StoreUnavailableError):
        reason = error.reason
    return Truth(type=kind, status=False, reason=reason, message=str(error))


def _invalid(error: SpecError) -> str:
    sections = {".".join(fault.field.split(".")[:2]) for fault in error.faults}
    if sections == {"spec.search"}:
        return "InvalidSearchSpace"
    if isinstance(error, NotFoundError) and len(sections) == 1:
        return _MISSING.get(sections.pop(), "Invalid")
    return "Invalid"

"""Conditions as tables: every reason the code gives is listed, and stands under its type."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qtt_core import plan as p
from qtt_core.errors import (
    Fault,
    LedgerError,
    NewerSchemaError,
    NotFoundError,
    QuickTuneError,
    SpecDriftError,
    SpecError,
    StoreUnavailableError,
)
from qtt_core.ledger.events import Close, Run
from qtt_core.ledger.fold import LedgerState
from qtt_operator.conditions import Truth, of_error, of_jobs, of_optimizer, of_run
from qtt_operator.names import REASONS

RUN = Run(name="birds", spec_hash="h", seed=7, algorithm="QuickTune", version="1", space_hash="s")
GOING = LedgerState(run=RUN)


def shown(truths: list[Truth]) -> dict[str, tuple[bool, str]]:
    """What a person sees: of one type the last truth counts."""
    for truth in truths:
        known = REASONS[truth.type]
        over = (
            truth.type == "Progressing" and truth.reason in REASONS["Complete"] + REASONS["Failed"]
        )
        assert truth.reason in known or over
    return {truth.type: (truth.status, truth.reason) for truth in truths}


@pytest.mark.parametrize(
    ("phase", "held", "expected"),
    [
        (p.Phase.RUNNING, None, {"Progressing": (True, "StepsRunning")}),
        (p.Phase.DRAINING, None, {"Suspended": (False, "Draining")}),
        (p.Phase.SUSPENDED, None, {"Suspended": (True, "UserRequested")}),
        (p.Phase.RUNNING, "DatasetChanged",
         {"Progressing": (False, "NoProgress"), "Suspended": (True, "DatasetChanged")}),
        (p.Phase.RUNNING, "DataRegressed",
         {"Progressing": (False, "NoProgress"), "StoreAvailable": (False, "DataRegressed")}),
        (p.Phase.RUNNING, "WeightsMissing",
         {"Progressing": (False, "NoProgress"), "Accepted": (False, "WeightsMissing")}),
        (p.Phase.RUNNING, "InfraRetriesExhausted",
         {"Progressing": (False, "InfraRetriesExhausted")}),
        (p.Phase.RUNNING, "DiskFull", {"Progressing": (False, "DiskFull")}),
        (p.Phase.RUNNING, "OptimizerUnhealthy", {"Progressing": (False, "NoProgress")}),
    ],
)  # fmt: skip
def test_what_holds_a_run_is_said_by_the_condition_it_concerns(
    phase: p.Phase, held: str | None, expected: dict[str, tuple[bool, str]]
) -> None:
    truths = of_run(GOING, phase, None if held is None else (held, "why"))

    assert shown(truths) == {"Accepted": (True, "Valid")} | expected
    assert all(t.message == "why" for t in truths if held and t.type != "Accepted")


@pytest.mark.parametrize(
    ("reason", "kind", "accepted"),
    [
        ("GoalReached", "Complete", True),
        ("BadData", "Failed", False),
        ("StoreLost", "Failed", True),
    ],
)
def test_an_end_is_complete_or_failed(reason: str, kind: str, accepted: bool) -> None:
    ledger = replace(GOING, closed=Close(reason=reason, msg="m"))
    seen = shown(of_run(ledger, p.Phase.COMPLETED, None))

    assert seen[kind] == (True, reason)
    assert seen["Progressing"] == (False, reason)
    assert seen["Accepted"][0] is accepted
    assert not {"Complete", "Failed"} <= seen.keys()


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (p.OptimizerView(), None),
        (p.OptimizerView(loaded=True), (True, "Ready")),
        (p.OptimizerView(loaded=True, error="late", fault="Timeout"), (False, "Timeout")),
        (p.OptimizerView(error="killed", fault="OutOfMemory"), (False, "OutOfMemory")),
        (p.OptimizerView(error="?"), (False, "Failed")),
    ],
)
def test_the_optimizers_health(view: p.OptimizerView, expected: tuple[bool, str] | None) -> None:
    truth = of_optimizer(view, began="1", version="1")

    assert (None if truth is None else shown([truth])["OptimizerHealthy"]) == expected


def test_what_the_workers_went_through_comes_first() -> None:
    view = p.OptimizerView(loaded=True, error="late", fault="Timeout")
    truth = of_optimizer(view, ("FallbackRandom", "lost"), began="1", version="2")

    assert truth is not None
    assert shown([truth]) == {"OptimizerHealthy": (False, "FallbackRandom")}
    assert truth.message == "lost"


def test_a_run_of_an_older_version_goes_on_and_says_so() -> None:
    truth = of_optimizer(p.OptimizerView(loaded=True), began="1", version="2")

    assert truth is not None
    assert shown([truth]) == {"OptimizerHealthy": (True, "VersionSkew")}


def seen(phase: p.JobPhase, *, put_aside: bool = False) -> p.ObservedJob:
    return p.ObservedJob(
        name="j", kind="step", c="1", to=1, attempt=0, phase=phase, created_at=0.0,
        put_aside=put_aside,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("jobs", "reason"),
    [
        ([p.JobPhase.RUNNING, p.JobPhase.PENDING], None),
        ([p.JobPhase.PENDING, p.JobPhase.QUEUED], "Unschedulable"),
        ([p.JobPhase.QUEUED], "WaitingForQuota"),
        ([p.JobPhase.ENDED], None),
        ([], None),
    ],
)
def test_why_no_job_runs(jobs: list[p.JobPhase], reason: str | None) -> None:
    truths = of_jobs([seen(phase) for phase in jobs], lambda: ("Unschedulable", "no node"))

    assert [t.reason for t in truths] == ([] if reason is None else [reason])
    assert all(not t.status and t.type == "Progressing" for t in truths)


def test_jobs_that_we_put_aside_wait_for_no_queue() -> None:
    assert of_jobs([seen(p.JobPhase.QUEUED, put_aside=True)], lambda: ("", "")) == []


def fault(field: str) -> Fault:
    return Fault(field, "x", "why")


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (SpecError([fault("spec.budget")]), "Accepted", "Invalid"),
        (SpecError([fault("spec.search.models"), fault("spec.search.space")]), "Accepted",
         "InvalidSearchSpace"),
        (SpecError([fault("spec.search.models"), fault("spec.budget")]), "Accepted", "Invalid"),
        (SpecError([fault("spec.dataset.claimName")]), "Accepted", "Invalid"),
        (NotFoundError([fault("spec.dataset.claimName")]), "Accepted", "DatasetNotFound"),
        (NotFoundError([fault("spec.weights.claimName")]), "Accepted", "WeightsMissing"),
        (NotFoundError([fault("spec.search.hubRef")]), "Accepted", "InvalidSearchSpace"),
        (SpecDriftError(["spec.dataset"], "put it back"), "Accepted", "SpecDrift"),
        (StoreUnavailableError("away"), "StoreAvailable", "Unreachable"),
        (StoreUnavailableError("x", reason="ReadOnly"), "StoreAvailable", "ReadOnly"),
        (StoreUnavailableError("x", reason="EvictionPolicy"), "StoreAvailable", "EvictionPolicy"),
        (NewerSchemaError("2"), "StoreAvailable", "NewerSchema"),
        (LedgerError("contradiction"), "StoreAvailable", "DataRegressed"),
    ],
)  # fmt: skip
def test_an_error_of_a_turn_is_said_by_the_condition_it_concerns(
    error: QuickTuneError, kind: str, reason: str
) -> None:
    truth = of_error(error)

    assert shown([truth]) == {kind: (False, reason)}
    assert truth.message == str(error)

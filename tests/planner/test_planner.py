"""The planner as tables: one input, the actions it must order, and those it must not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from qtt_core import plan as p
from qtt_core.ledger.events import Close, Note, Open, Prepared, Run
from qtt_core.ledger.fold import LedgerState, OpenEntry, fold
from qtt_core.planner import budget_view, decide, end_reason, step_timeout
from qtt_core.results import State, StepResult
from qtt_core.spec import Budget, Dataset, FailurePolicy, Fidelity, RunSpec, Trainer, Weights
from qtt_core.steps import Proposal, Why

NOW = 1_000_000.0
IDENTITY = p.Identity(
    uid="u1", name="birds", seed=7, space_id="native", space_sha="s", spec_hash="h", version="0"
)
RUN = Run(name="birds", spec_hash="h", seed=7, algorithm="QuickTune", version="0", space_hash="s")
PREPARED = Prepared(fingerprint="f", n_train=10, n_val=5, classes=2)
READY = p.OptimizerView(loaded=True, told="5-0")


def make_spec(**changes: Any) -> RunSpec:
    base: dict[str, Any] = {
        "dataset": Dataset(claim_name="d"),
        "budget": Budget(max_steps=10),
        "fidelity": Fidelity(max=10),
        "parallelism": 2,
    }
    return RunSpec(**(base | changes))


def make_ledger(**changes: Any) -> LedgerState:
    base: dict[str, Any] = {
        "last_id": "5-0",
        "run": RUN,
        "prepared": PREPARED,
        "first_time": NOW - 100,
    }
    return LedgerState(**(base | changes))


def make_input(
    *,
    spec: RunSpec | None = None,
    ledger: LedgerState | None = None,
    jobs: tuple[p.ObservedJob, ...] = (),
    optimizer: p.OptimizerView = READY,
    now: float = NOW,
) -> p.PlannerInput:
    return p.PlannerInput(
        spec=spec or make_spec(),
        identity=IDENTITY,
        ledger=ledger or make_ledger(),
        observed=p.Observed(jobs=jobs, synced_at=now),
        optimizer=optimizer,
        now=now,
    )


def entry(c: str, frm: int = 0, to: int = 1, **changes: Any) -> OpenEntry:
    base: dict[str, Any] = {
        "c": c, "frm": frm, "to": to, "attempt": 0, "decision": f"h{c}", "reserved": 5.0,
        "opened_id": "4-0", "since": NOW - 10,
    }  # fmt: skip
    return OpenEntry(**(base | changes))


def opened(*entries: OpenEntry) -> Mapping[str, OpenEntry]:
    return {e.c: e for e in entries}


def job(
    c: str, to: int = 1, phase: p.JobPhase = p.JobPhase.RUNNING, **changes: Any
) -> p.ObservedJob:
    base: dict[str, Any] = {
        "name": f"birds-c{c}-f{to}-a0", "kind": "step", "c": c, "to": to, "attempt": 0,
        "phase": phase, "created_at": NOW - 9, "started_at": NOW - 8,
    }  # fmt: skip
    return p.ObservedJob(**(base | changes))


def ended(c: str, to: int = 1, *, verdict: p.Verdict, seconds: float = 3.0) -> p.ObservedJob:
    end = p.JobEnd(exit_code=0, device_seconds=seconds)
    return replace(job(c, to, p.JobPhase.ENDED), end=end, verdict=verdict)


def ok_verdict(*scores: tuple[int, float, float]) -> p.Verdict:
    result = StepResult(attempt=0, nonce="n", state=State.OK)
    return p.Verdict(
        kind=p.Ending.RESULT, reason="ok", state=State.OK, result=result, scores=tuple(scores)
    )


def proposal(c: int, frm: int = 0, to: int = 1, seconds: float = 5.0) -> Proposal:
    return Proposal(
        config_id=c, config={"model": "m"}, fidelity_from=frm, fidelity_to=to,
        expected_seconds=seconds, why=Why(rule="test"),
    )  # fmt: skip


def answered(*proposals: Proposal, finished: str | None = None) -> p.OptimizerView:
    return replace(READY, answered=True, proposals=proposals, finished=finished)


def kinds(plan: p.Plan) -> list[str]:
    return [type(action).__name__ for action in plan.actions]


def only(plan: p.Plan, kind: type[Any]) -> Any:
    found = [action for action in plan.actions if isinstance(action, kind)]
    assert len(found) == 1, plan.actions
    return found[0]


def test_a_new_run_is_recorded_before_anything_else() -> None:
    plan = decide(make_input(ledger=LedgerState()))

    note = only(plan, p.RecordNote)
    assert (note.key, note.event.kind, note.event.seed) == ("run", "run", 7)
    assert plan.phase is p.Phase.PENDING


def test_prepare_is_opened_first_and_its_job_created_in_the_next_turn() -> None:
    fresh = make_ledger(prepared=None)
    first = decide(make_input(ledger=fresh, optimizer=p.OptimizerView()))

    step = only(first, p.OpenStep)
    assert (step.event.c, step.event.frm, step.event.to) == ("prepare", 0, 1)

    waiting = replace(fresh, open=opened(entry("prepare")))
    second = decide(make_input(ledger=waiting, optimizer=p.OptimizerView()))
    create = only(second, p.CreateJob)
    assert (create.kind, create.attempt, create.decision) == ("prepare", 0, "hprepare")


def test_the_optimizer_is_loaded_once_prepared_and_asked_for_the_free_slots() -> None:
    assert kinds(decide(make_input(optimizer=p.OptimizerView(told="0-0")))) == ["LoadOptimizer"]
    assert kinds(decide(make_input(optimizer=p.OptimizerView(busy=True)))) == ["Requeue"]
    plan = decide(make_input(ledger=make_ledger(open=opened(entry("3"))), jobs=(job("3"),)))
    assert only(plan, p.Ask).n == 1


def test_the_optimizer_is_told_what_happened_before_it_is_asked() -> None:
    plan = decide(make_input(ledger=make_ledger(last_id="9-0")))

    assert kinds(plan) == ["Tell", "Ask"]


def test_an_open_entry_without_a_job_is_created_only_after_a_later_full_list() -> None:
    ledger = make_ledger(open=opened(entry("3", since=NOW + 1)))
    early = make_input(ledger=ledger)
    assert "CreateJob" not in kinds(decide(early))

    later = make_input(ledger=ledger, now=NOW + 2)
    assert only(decide(later), p.CreateJob).c == "3"


def test_an_end_is_committed_once_and_its_job_forgotten() -> None:
    ledger = make_ledger(open=opened(entry("3")))
    done = ended("3", verdict=ok_verdict((1, 0.5, 2.0)))
    plan = decide(make_input(ledger=ledger, jobs=(done,)))

    commit = only(plan, p.Commit)
    assert (commit.event.kind, commit.event.epochs, commit.event.dev) == (
        "done",
        ((1, 0.5, 2.0),),
        3.0,
    )
    assert commit.event.ov == pytest.approx(1.0)
    assert kinds(plan) == ["Commit", "Forget"]


def test_an_end_the_ledger_no_longer_waits_for_is_only_forgotten() -> None:
    late = ended("3", verdict=ok_verdict((1, 0.5, 2.0)))
    old_attempt = make_ledger(open=opened(entry("3", attempt=1)))

    assert kinds(decide(make_input(jobs=(late,)))) == ["Forget"]
    assert kinds(decide(make_input(ledger=old_attempt, jobs=(late,)))) == ["Forget"]


def test_proposals_are_opened_up_to_the_slots_and_the_rest_given_back() -> None:
    three = answered(proposal(1), proposal(2), proposal(3))
    plan = decide(make_input(optimizer=three))

    assert kinds(plan) == ["OpenStep", "OpenStep", "Abandon"]


@pytest.mark.parametrize(
    ("used", "span", "expected"),
    [(0, (0, 9), 9), (7, (0, 9), 3), (9, (2, 9), 3), (10, (0, 1), None)],
    ids=["fits", "cut to three", "cut to one", "nothing left"],
)
def test_max_steps_is_never_overshot(
    used: int, span: tuple[int, int], expected: int | None
) -> None:
    frm, to = span
    view = answered(proposal(1, frm, to, seconds=9.0))
    plan = decide(make_input(ledger=make_ledger(steps=used), optimizer=view))

    steps = [action.event for action in plan.actions if isinstance(action, p.OpenStep)]
    if expected is None:
        assert steps == []
    else:
        assert [step.to for step in steps] == [expected]
        assert steps[0].res == pytest.approx(9.0 * (expected - frm) / (to - frm))


def test_steps_of_several_epochs_are_cut_at_step_boundaries() -> None:
    spec = make_spec(fidelity=Fidelity(max=10, step=3), budget=Budget(max_steps=2))
    plan = decide(make_input(spec=spec, optimizer=answered(proposal(1, 0, 10))))

    assert only(plan, p.OpenStep).event.to == 6


def test_open_steps_and_their_reservations_count_against_admission() -> None:
    seconds = make_spec(budget=Budget(max_gpu_seconds=20.0))
    ledger = make_ledger(charged_seconds=16.0, open=opened(entry("4")))
    steps = make_spec(budget=Budget(max_steps=4))
    wide = make_ledger(steps=2, open=opened(entry("4", 2, 4)))

    for spec, state in ((seconds, ledger), (steps, wide)):
        view = answered(proposal(1))
        plan = decide(make_input(spec=spec, ledger=state, jobs=(job("4", 1),), optimizer=view))
        assert "OpenStep" not in kinds(plan)
        assert "Ask" not in kinds(decide(make_input(spec=spec, ledger=state, jobs=(job("4"),))))


def test_the_optimizer_sees_what_ended_jobs_used_and_wall_clock_as_device_seconds() -> None:
    spec = make_spec(budget=Budget(max_steps=10, max_gpu_seconds=200.0, max_wallclock=150.0))
    ledger = make_ledger(steps=3, charged_seconds=11.0, open=opened(entry("4", 2, 4)))
    view = budget_view(make_input(spec=spec, ledger=ledger))

    assert (view.spent_steps, view.total_steps) == (3, 10)
    assert (view.spent_seconds, view.total_seconds) == (11.0, 111.0)  # 50 s left on 2 workers


@pytest.mark.parametrize(
    ("budget", "ledger", "reason"),
    [
        (Budget(max_steps=5), {"steps": 5}, "BudgetExhausted"),
        (Budget(max_steps=5), {"steps": 4}, None),
        (Budget(max_gpu_seconds=50.0), {"charged_seconds": 50.0}, "BudgetExhausted"),
        (Budget(max_wallclock=99.0), {}, "BudgetExhausted"),
        (Budget(max_wallclock=101.0), {}, None),
        (Budget(max_steps=5), {"invalid_in_a_row": 3}, "TooManyFailedConfigs"),
        (Budget(max_steps=5), {"bugs_in_a_row": 5}, "TooManyFailedConfigs"),
    ],
)
def test_the_reason_for_an_end(budget: Budget, ledger: dict[str, Any], reason: str | None) -> None:
    found = end_reason(make_input(spec=make_spec(budget=budget), ledger=make_ledger(**ledger)))

    assert (found and found[0]) == reason


def test_the_run_closes_only_when_nothing_is_open() -> None:
    spent = make_ledger(steps=10, open=opened(entry("3")))
    assert "RecordNote" not in kinds(decide(make_input(ledger=spent, jobs=(job("3"),))))

    close = only(decide(make_input(ledger=make_ledger(steps=10))), p.RecordNote)
    assert (close.event.kind, close.event.reason) == ("close", "BudgetExhausted")


@pytest.mark.parametrize(
    ("word", "reason"),
    [("goal", "GoalReached"), ("gain", "GainExhausted"), ("exhausted", "SpaceExhausted"),
     ("budget", "BudgetExhausted"), (None, "SpaceExhausted")],
)  # fmt: skip
def test_the_optimizers_last_word_closes_the_run(word: str | None, reason: str) -> None:
    close = only(decide(make_input(optimizer=answered(finished=word))), p.RecordNote)

    assert close.event.reason == reason


def test_an_answer_older_than_the_last_result_is_asked_again() -> None:
    stale = replace(answered(finished="exhausted"), answered=False)

    assert kinds(decide(make_input(optimizer=stale))) == ["Ask"]


def test_a_raised_budget_reopens_a_run_that_ended_by_budget_only() -> None:
    by_budget = make_ledger(steps=5, closed=Close(id="5-0", reason="BudgetExhausted"))
    assert only(decide(make_input(ledger=by_budget)), p.RecordNote).event.kind == "reopen"

    by_goal = make_ledger(steps=5, closed=Close(id="5-0", reason="GoalReached"))
    assert kinds(decide(make_input(ledger=by_goal))) == ["Requeue"]


def test_what_is_open_when_unreadable_data_close_a_run_is_cancelled_once_its_job_is_gone() -> None:
    """It stayed open for ever: nothing starts a step of a closed run, and nothing ended it."""
    closed = Close(id="5-0", reason="BadData")
    ledger = make_ledger(closed=closed, open=opened(entry("3", attempt=1)))
    assert kinds(decide(make_input(ledger=ledger, jobs=(job("3", attempt=1),)))) == ["Requeue"]

    cancel = only(decide(make_input(ledger=ledger)), p.Commit).event
    assert (cancel.kind, cancel.c, cancel.a, cancel.retire) == ("cancel", "3", 1, False)
    assert kinds(decide(make_input(ledger=make_ledger(closed=closed)))) == ["Requeue"]


def test_suspend_drains_what_runs_and_opens_nothing() -> None:
    spec = make_spec(suspend=True)
    ledger = make_ledger(open=opened(entry("3")))
    running = decide(make_input(spec=spec, ledger=ledger, jobs=(job("3"),)))
    assert (kinds(running), running.phase) == (["Requeue"], p.Phase.DRAINING)

    quiet = decide(make_input(spec=spec, ledger=ledger))
    assert (kinds(quiet), quiet.phase) == (["Requeue"], p.Phase.SUSPENDED)


RUNNING, QUEUED, PENDING = p.JobPhase.RUNNING, p.JobPhase.QUEUED, p.JobPhase.PENDING


@pytest.mark.parametrize(
    ("changes", "phase", "put_aside", "action"),
    [
        ({}, RUNNING, False, "SuspendJob"),
        ({}, PENDING, False, "SuspendJob"),
        ({}, QUEUED, True, None),
        ({}, QUEUED, False, "Kill"),
        ({"queue_name": "q"}, RUNNING, False, "Kill"),
        ({"stop": True}, RUNNING, False, "Kill"),
        ({"suspend": False}, QUEUED, True, "ResumeJob"),
        ({"suspend": False}, QUEUED, False, None),
        ({"suspend": False, "stop": True}, QUEUED, True, "Kill"),
        ({"suspend": False, "budget": Budget(max_steps=3)}, QUEUED, True, "Kill"),
    ],
    ids=["running", "pending", "put aside", "held by another", "a queue's", "stopped",
         "ours again", "another's", "stopped meanwhile", "budget used up meanwhile"],
)  # fmt: skip
def test_eviction_puts_jobs_aside_and_brings_back_only_those(
    changes: dict[str, Any], phase: p.JobPhase, put_aside: bool, action: str | None
) -> None:
    base: dict[str, Any] = {"suspend": True, "suspend_policy": "Evict"}
    spec = make_spec(**(base | changes))
    ledger = make_ledger(open=opened(entry("3")), steps=3)
    started = NOW - 8 if phase is RUNNING else None
    seen = job("3", phase=phase, put_aside=put_aside, started_at=started)
    plan = decide(make_input(spec=spec, ledger=ledger, jobs=(seen,)))

    steering = [a for a in plan.actions if isinstance(a, p.Kill | p.SuspendJob | p.ResumeJob)]
    assert [type(a).__name__ for a in steering] == ([] if action is None else [action])
    if spec.suspend:
        drained = phase is QUEUED
        assert plan.phase is (p.Phase.SUSPENDED if drained else p.Phase.DRAINING)


def test_stop_kills_what_runs_cancels_what_is_open_and_closes() -> None:
    spec = make_spec(stop=True)
    ledger = make_ledger(open=opened(entry("3")))
    assert kinds(decide(make_input(spec=spec, ledger=ledger, jobs=(job("3"),))))[0] == "Kill"

    cancel = only(decide(make_input(spec=spec, ledger=ledger)), p.Commit)
    assert (cancel.event.kind, cancel.event.reason) == ("cancel", "Stopped")
    close = only(decide(make_input(spec=spec)), p.RecordNote)
    assert close.event.reason == "Stopped"


def test_a_step_past_its_limit_is_killed_and_its_slot_waits() -> None:
    spec = make_spec(failure_policy=FailurePolicy(step_timeout=60.0))
    ledger = make_ledger(open=opened(entry("3")))
    hung = job("3", started_at=NOW - 61)
    plan = decide(make_input(spec=spec, ledger=ledger, jobs=(hung,)))

    kill = only(plan, p.Kill)
    assert (kill.job, kill.reason) == (hung.name, "DeadlineExceeded")
    fine = job("3", started_at=NOW - 59)
    assert "Kill" not in kinds(decide(make_input(spec=spec, ledger=ledger, jobs=(fine,))))


def test_the_default_limit_follows_the_expected_seconds() -> None:
    i = make_input()

    assert step_timeout(i, "3", 1.0) == 900.0
    assert step_timeout(i, "3", 200.0) == 2300.0


def test_a_running_job_nobody_waits_for_is_killed() -> None:
    stray = job("8")

    kill = only(decide(make_input(jobs=(stray,))), p.Kill)
    assert kill.job == stray.name


@pytest.mark.parametrize(
    ("retries", "waits"),
    [((), 0.0), (("RunnerLost",), 0.0), (("infra_gpu",), 1.0), (("infra_gpu",) * 4, 8.0)],
)
def test_retries_wait_longer_each_time_unless_they_do_not_count(
    retries: tuple[str, ...], waits: float
) -> None:
    ledger = make_ledger(open=opened(entry("3", retries=retries, since=NOW, attempt=len(retries))))
    soon, later = make_input(ledger=ledger), make_input(ledger=ledger, now=NOW + waits)

    assert ("CreateJob" in kinds(decide(soon))) == (waits == 0)
    assert "CreateJob" in kinds(decide(later))


def test_bad_data_ends_the_run_with_the_trainers_words() -> None:
    ledger = make_ledger(prepared=None, open=opened(entry("prepare")))
    verdict = p.Verdict(kind=p.Ending.BAD_DATA, reason="bad_data", message="class cat is empty")
    job_end = replace(ended("prepare", verdict=verdict), kind="prepare")
    plan = decide(make_input(ledger=ledger, jobs=(job_end,)))

    close = only(plan, p.RecordNote)
    assert (close.event.reason, close.event.msg) == ("BadData", "class cat is empty")
    assert only(plan, p.Commit).event.kind == "cancel"


def test_what_prepare_measured_is_recorded_and_the_manifests_values_win() -> None:
    spec = make_spec(dataset=Dataset(claim_name="d", metafeatures={"num_classes": 3.0}))
    facts = {
        "fingerprint": "f", "n_train": 8, "n_val": 4, "classes": 2,
        "metafeatures": {"num_classes": 2.0, "n_train": 8.0},
    }  # fmt: skip
    result = StepResult(attempt=0, nonce="n", state=State.OK, prepared=facts)
    verdict = p.Verdict(kind=p.Ending.PREPARED, reason="ok", state=State.OK, result=result)
    ledger = make_ledger(prepared=None, open=opened(entry("prepare")))
    plan = decide(make_input(spec=spec, ledger=ledger, jobs=(ended("prepare", verdict=verdict),)))

    event = only(plan, p.RecordNote).event
    assert event.metafeatures == {"num_classes": 3.0, "n_train": 8.0}
    assert (event.kind, event.dev) == ("prepared", 3.0)


def test_nothing_is_asked_while_infrastructure_fails_step_after_step() -> None:
    plan = decide(make_input(ledger=make_ledger(cancelled_in_a_row=3)))

    assert kinds(plan) == ["Requeue"]
    assert plan.held is not None
    assert plan.held[0] == "InfraRetriesExhausted"


def test_the_same_input_gives_the_same_plan() -> None:
    i = make_input(optimizer=answered(proposal(1), proposal(2)))

    assert decide(i) == decide(i)


# --- what a cluster adds --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "since", "reason"),
    [
        (p.JobPhase.PENDING, NOW - 1801, "PendingTimeout"),
        (p.JobPhase.PENDING, NOW - 1799, None),
        (p.JobPhase.PENDING, None, None),
        (p.JobPhase.QUEUED, NOW - 9999, None),
    ],
    ids=["too long", "in time", "unknown", "a queue has no limit"],
)
def test_a_job_that_cannot_start_is_given_up_but_one_in_a_queue_waits(
    phase: p.JobPhase, since: float | None, reason: str | None
) -> None:
    ledger = make_ledger(open=opened(entry("3")))
    waiting = job("3", phase=phase, started_at=None, pending_since=since)
    plan = decide(make_input(ledger=ledger, jobs=(waiting,)))

    kills = [action.reason for action in plan.actions if isinstance(action, p.Kill)]
    assert kills == ([] if reason is None else [reason])


@pytest.mark.parametrize("phase", [p.JobPhase.QUEUED, p.JobPhase.PENDING])
@pytest.mark.parametrize(
    ("spec", "steps"),
    [(make_spec(suspend=True), 0), (make_spec(budget=Budget(max_gpu_seconds=5.0)), 9)],
    ids=["suspended", "budget used up"],
)
def test_what_has_not_started_when_a_run_ends_or_pauses_does_not_start(
    phase: p.JobPhase, spec: RunSpec, steps: int
) -> None:
    ledger = make_ledger(open=opened(entry("3"), entry("4")), charged_seconds=float(steps))
    jobs = (job("3", phase=phase, started_at=None), job("4"))
    plan = decide(make_input(spec=spec, ledger=ledger, jobs=jobs))

    assert only(plan, p.Kill).job == jobs[0].name


def test_a_retry_is_not_started_once_the_budget_is_used_up() -> None:
    """Else a step that is retried again and again overshoots the budget without bound."""
    spec = make_spec(budget=Budget(max_gpu_seconds=20.0))
    ledger = make_ledger(charged_seconds=21.0, open=opened(entry("3", attempt=4)))
    plan = decide(make_input(spec=spec, ledger=ledger))

    cancel = only(plan, p.Commit).event
    assert (cancel.kind, cancel.a, cancel.retire) == ("cancel", 4, False)
    unseen = replace(make_input(spec=spec, ledger=ledger), observed=p.Observed(synced_at=0.0))
    assert "Commit" not in kinds(decide(unseen))  # its job may exist


def closed_by_the_optimizer(**budget: float) -> LedgerState:
    close = Close(id="6-0", reason="BudgetExhausted", budget=budget)
    return make_ledger(steps=5, last_id="6-0", closed=close)


@pytest.mark.parametrize(
    ("old", "new", "reopens"),
    [
        ({"maxSteps": 10.0}, Budget(max_steps=10), False),
        ({"maxSteps": 10.0}, Budget(max_steps=11), True),
        ({"maxSteps": 10.0}, Budget(max_steps=9), False),
        ({"maxSteps": 10.0}, Budget(max_gpu_seconds=50.0), True),
        ({"maxSteps": 10.0, "maxGPUSeconds": 9.0}, Budget(max_steps=10), True),
        ({}, Budget(max_steps=10), True),
    ],
    ids=["same", "raised", "lowered", "limit gone", "second limit gone", "older version"],
)
def test_a_run_that_the_optimizer_ended_by_budget_reopens_only_for_a_larger_one(
    old: dict[str, float], new: Budget, reopens: bool
) -> None:
    """The optimizer ends below the limit, when no step fits any more; that must not be undone."""
    i = make_input(spec=make_spec(budget=new), ledger=closed_by_the_optimizer(**old))

    assert kinds(decide(i)) == (["RecordNote"] if reopens else ["Requeue"])


def test_a_close_records_the_limits_it_ended_under() -> None:
    spec = make_spec(budget=Budget(max_steps=10, max_wallclock=500.0))
    close = only(decide(make_input(spec=spec, ledger=make_ledger(steps=10))), p.RecordNote).event

    assert close.budget == {"maxSteps": 10, "maxWallclock": 500.0}


def test_a_token_is_noted_once_and_reopens_a_failed_run_only() -> None:
    failed = make_ledger(closed=Close(id="5-0", reason="TooManyFailedConfigs"))
    first = decide(replace(make_input(ledger=failed), wishes=p.Wishes(retry="again-1")))
    note = only(first, p.RecordNote)
    assert (note.event.kind, note.event.what, note.event.new) == ("note", "retry", "again-1")

    noted = replace(failed, notes=(replace(note.event, id="6-0"),), last_id="6-0")
    second = only(
        decide(replace(make_input(ledger=noted), wishes=p.Wishes(retry="again-1"))), p.RecordNote
    )
    assert (second.event.kind, second.event.reason) == ("reopen", "Retried")

    older = replace(noted, closed=Close(id="7-0", reason="TooManyFailedConfigs"))
    complete = replace(noted, closed=Close(id="5-0", reason="GoalReached"))
    for state in (older, complete):
        i = replace(make_input(ledger=state), wishes=p.Wishes(retry="again-1"))
        assert kinds(decide(i)) == ["Requeue"]


def test_a_decision_that_was_cancelled_begins_with_an_attempt_never_used() -> None:
    """Names of Jobs and folders hold the attempt: the old Job may still exist under it."""
    ledger = make_ledger(attempts={("1", 1): 7})
    plan = decide(make_input(ledger=ledger, optimizer=answered(proposal(1), proposal(2))))

    steps = [action.event for action in plan.actions if isinstance(action, p.OpenStep)]
    assert [(step.c, step.a) for step in steps] == [("1", 7), ("2", 0)]


def test_changed_data_hold_the_run_until_a_person_asks_then_prepare_compares() -> None:
    changed = make_ledger(dataset_changed="fingerprint a, expected b")
    held = decide(make_input(ledger=changed))
    assert (kinds(held), held.held) == (
        ["Requeue"],
        ("DatasetChanged", "fingerprint a, expected b"),
    )

    asked = replace(changed, recheck=True, prepared=replace(PREPARED, a=2))
    step = only(decide(make_input(ledger=asked)), p.OpenStep).event
    assert (step.c, step.frm, step.to, step.a) == ("prepare", 1, 2, 3)

    verdict = p.Verdict(kind=p.Ending.BAD_DATA, reason="dataset_changed", message="differs")
    again = replace(asked, open=opened(entry("prepare", 1, 2)))
    ended_job = replace(ended("prepare", 2, verdict=verdict), kind="prepare")
    plan = decide(make_input(ledger=again, jobs=(ended_job,)))
    assert only(plan, p.RecordNote).event.reason == "BadData"


def test_a_full_volume_holds_new_steps_while_the_waiting_one_is_tried_again() -> None:
    full = entry("3", retries=("disk_full",), attempt=1, since=NOW - 5)
    plan = decide(make_input(ledger=make_ledger(open=opened(full))))

    assert only(plan, p.CreateJob).attempt == 1
    assert plan.held is not None
    assert plan.held[0] == "DiskFull"
    other = decide(make_input(ledger=make_ledger(open=opened(full)), jobs=(job("3", attempt=1),)))
    assert "Ask" not in kinds(other)


def test_a_job_is_told_of_memory_kills_and_of_nodes_whose_device_failed_lately() -> None:
    killed = entry("3", retries=("OOMKilled", "OOMKilled"), attempt=2, since=NOW - 99)
    nodes = {"n1": NOW - 3599, "n2": NOW - 3601}
    ledger = make_ledger(open=opened(killed), bad_nodes=nodes)
    create = only(decide(make_input(ledger=ledger)), p.CreateJob)

    assert (create.oom_kills, create.avoid_nodes) == (2, ("n1",))


def carried(c: str, frm: int, to: int, attempt: int = 0, **changes: Any) -> p.ObservedJob:
    event = Open(c=c, frm=frm, to=to, h=f"h{c}", res=5.0)
    opening = p.OpenStep(event=event, config={"model": "m"})
    return job(c, to, attempt=attempt, opening=opening, **changes)


@pytest.mark.parametrize("phase", [p.JobPhase.RUNNING, p.JobPhase.ENDED])
def test_a_decision_that_the_store_lost_is_recorded_again_from_its_job(phase: p.JobPhase) -> None:
    lost = carried("3", 2, 4, attempt=1, phase=phase)
    plan = decide(make_input(ledger=make_ledger(heads={"3": 2}), jobs=(lost,)))

    step = only(plan, p.OpenStep)
    assert (step.event.c, step.event.frm, step.event.to, step.event.a) == ("3", 2, 4, 1)
    assert kinds(plan) == ["OpenStep"]
    assert plan.held is not None
    assert plan.held[0] == "DataRegressed"


def test_a_decision_beyond_a_lost_result_waits_for_it_and_is_not_killed() -> None:
    ledger = make_ledger(heads={"3": 1})
    plan = decide(make_input(ledger=ledger, jobs=(carried("3", 2, 4),)))

    assert kinds(plan) == ["Requeue"]
    assert plan.held is not None


@pytest.mark.parametrize(
    "ledger",
    [
        make_ledger(heads={"3": 4}, step_keys=frozenset({("3", 4)})),
        make_ledger(heads={"3": 2}, attempts={("3", 4): 1}),
        make_ledger(heads={"3": 2}, failed={"3": "oom"}),
        make_ledger(heads={"3": 2}, closed=Close(id="5-0", reason="GoalReached")),
    ],
    ids=["recorded", "cancelled", "closed configuration", "closed run"],
)
def test_an_old_decision_is_not_recorded_again(ledger: LedgerState) -> None:
    plan = decide(make_input(ledger=ledger, jobs=(carried("3", 2, 4),)))

    assert "OpenStep" not in kinds(plan)
    assert only(plan, p.Kill)


def test_the_optimizer_counts_in_seconds_of_a_job_whatever_it_is_charged() -> None:
    spec = make_spec(
        budget=Budget(max_gpu_seconds=800.0),
        trainer=Trainer(custom=True, devices=4), gpu_share=0.5,
    )  # fmt: skip
    view = budget_view(make_input(spec=spec, ledger=make_ledger(charged_seconds=100.0)))

    assert (view.spent_seconds, view.total_seconds) == (50.0, 400.0)


@pytest.mark.parametrize(
    ("kind", "reason", "told"),
    [
        (p.Ending.BAD_JOB, "invalid_config", "JobRefused"),
        (p.Ending.BUG, "internal", "TrainerFailed"),
        (p.Ending.INFRA, "infra_gpu", None),
    ],
)
def test_faults_of_the_trainer_are_told_to_people_with_its_last_words(
    kind: p.Ending, reason: str, told: str | None
) -> None:
    verdict = p.Verdict(kind=kind, reason=reason, message="Traceback: boom")
    ledger = make_ledger(open=opened(entry("3")))
    plan = decide(make_input(ledger=ledger, jobs=(ended("3", verdict=verdict),)))

    said = [(a.reason, a.warning) for a in plan.actions if isinstance(a, p.EmitEvent)]
    assert said == ([] if told is None else [(told, True)])
    if told is not None:
        assert "boom" in only(plan, p.EmitEvent).message
    assert isinstance(only(plan, p.Commit), p.Commit)


def test_models_without_weights_hold_a_run_that_may_not_fetch_them() -> None:
    lacking = make_ledger(prepared=replace(PREPARED, missing_weights=("vit",)))
    never = make_spec(weights=Weights(fetch="Never"))
    plan = decide(make_input(spec=never, ledger=lacking))
    assert plan.held is not None
    assert plan.held[0] == "WeightsMissing"
    assert "vit" in plan.held[1]
    assert "Ask" not in kinds(plan)
    assert decide(make_input(ledger=lacking)).held is None

    note = Note(id="6-0", what="retry", new="t")
    again = only(decide(make_input(spec=never, ledger=fold([note], lacking))), p.OpenStep)
    assert (again.event.c, again.event.frm) == ("prepare", 1)


def test_a_loss_that_no_job_can_mend_holds_the_run_until_a_person_accepts_it() -> None:
    lost = replace(make_input(ledger=make_ledger(steps=4)), counted_steps=6)
    plan = decide(lost)
    assert (kinds(plan), plan.held and plan.held[0]) == (["Requeue"], "DataRegressed")

    token = replace(lost, wishes=p.Wishes(retry="yes"))
    note = only(decide(token), p.RecordNote).event
    accepted = replace(token, ledger=fold([replace(note, id="6-0")], lost.ledger))
    assert decide(accepted).held is None
    assert "Ask" in kinds(decide(accepted))
    assert decide(replace(accepted, counted_steps=7)).held is not None  # another loss


def test_a_decision_names_the_pod_template_it_was_made_under() -> None:
    def hashes(**template: Any) -> list[str]:
        spec = make_spec(template=template)
        fresh = decide(make_input(spec=spec, ledger=make_ledger(prepared=None)))
        step = decide(make_input(spec=spec, optimizer=answered(proposal(1))))
        return [only(plan, p.OpenStep).event.tpl for plan in (fresh, step)]

    assert hashes() == ["", ""]
    (low, same), (high, _) = hashes(spec={"a": 1}), hashes(spec={"a": 2})
    assert low == same != high
    assert len(low) == 12

"""What an end means for the ledger: the table of retries, cancels and results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qtt_core.ledger.events import Cancel, Fail, Open, Retry
from qtt_core.ledger.fold import USER_REASONS, OpenEntry, fold
from qtt_core.plan import Cause, Ending, JobEnd, Verdict
from qtt_core.results import (
    EXIT_BAD_DATA,
    EXIT_BAD_JOB,
    EXIT_BUG,
    EXIT_CODES,
    EXIT_RETRY,
    State,
    StepResult,
)
from qtt_core.settle import UNCOUNTED, may_restart, memory_factor, retry_delay, settle
from qtt_core.spec import Budget, Dataset, FailurePolicy, RunSpec, Trainer

COUNTERS = {
    Ending.BAD_JOB: "invalid_in_a_row",
    Ending.BAD_DATA: "",
    Ending.BUG: "bugs_in_a_row",
    Ending.INFRA: "cancelled_in_a_row",
}
SPEC = RunSpec(dataset=Dataset(claim_name="d"), budget=Budget(max_steps=1))
END = JobEnd(exit_code=75, device_seconds=10.0, queue_seconds=2.0, node="n1")


def entry(*retries: str) -> OpenEntry:
    return OpenEntry(
        c="4", frm=1, to=3, attempt=len(retries), decision="h", reserved=9.0, opened_id="1-0",
        since=0.0, retries=retries,
    )  # fmt: skip


def infra(reason: str, **changes: Any) -> Verdict:
    return Verdict(kind=Ending.INFRA, reason=reason, message="why", **changes)


def result(state: State, *scores: tuple[int, float, float], **changes: Any) -> Verdict:
    message = StepResult(attempt=0, nonce="n", state=state, memory_mb=7, **changes)
    return Verdict(
        kind=Ending.RESULT, reason=state.value, state=state, result=message, scores=scores
    )


@pytest.mark.parametrize(
    ("verdict", "past", "kind", "retire"),
    [
        (result(State.OK, (2, 0.5, 3.0), (3, 0.6, 3.0)), (), "done", None),
        (result(State.DIVERGED, (2, 0.5, 3.0)), (), "done", None),
        (result(State.OOM), (), "fail", None),
        (result(State.INFEASIBLE), (), "fail", None),
        (Verdict(kind=Ending.BAD_JOB, reason="invalid_config"), (), "cancel", True),
        (Verdict(kind=Ending.BAD_DATA, reason="bad_data"), (), "cancel", False),
        (Verdict(kind=Ending.BUG, reason="bug"), (), "retry", None),
        (Verdict(kind=Ending.BUG, reason="bug"), ("bug",), "cancel", True),
        (Verdict(kind=Ending.BUG, reason="badmessage"), ("bug",), "cancel", True),
        (Verdict(kind=Ending.BUG, reason="bug"), ("preempted",) * 9, "retry", None),
        (infra("preempted"), ("preempted",) * 50, "retry", None),
        (infra("RunnerLost"), ("RunnerLost",) * 50, "retry", None),
        (infra("infra_gpu"), ("infra_gpu",) * 5, "retry", None),
        (infra("infra_gpu"), ("infra_gpu",) * 6, "cancel", False),
        (infra("infra_gpu"), ("preempted",) * 6, "retry", None),
        (infra("timeout"), (), "retry", None),
        (infra("timeout"), ("DeadlineExceeded",), "fail", None),
        (infra("timeout"), ("timeout_progressed",) * 9, "retry", None),
        (infra("PendingTimeout"), (), "cancel", False),
        (infra("OOMKilled"), ("OOMKilled",), "retry", None),
        (infra("OOMKilled"), ("OOMKilled",) * 2, "fail", None),
        (infra("weights_corrupt"), ("weights_corrupt",), "cancel", True),
        (infra("checkpoint_corrupt"), ("checkpoint_corrupt",), "retry", None),
        (infra("checkpoint_corrupt"), ("checkpoint_corrupt",) * 2, "cancel", True),
    ],
)
def test_the_event_that_records_an_end(
    verdict: Verdict, past: tuple[str, ...], kind: str, retire: bool | None
) -> None:
    event = settle(entry(*past), verdict, END, SPEC)

    assert event.kind == kind
    assert (event.c, event.to, event.dev, event.q) == ("4", 3, 10.0, 2.0)
    assert getattr(event, "retire", None) == retire
    assert event.a == len(past) + (kind == "retry")


@pytest.mark.parametrize(
    ("verdict", "past", "kind"),
    [
        (result(State.OOM), (), "retry"),
        (result(State.OOM), ("oom",), "fail"),
        (result(State.OOM), ("infra_gpu",), "retry"),
        (infra("OOMKilled"), ("OOMKilled",), "retry"),
        (infra("OOMKilled"), ("OOMKilled",) * 2, "retry"),
        (infra("OOMKilled"), ("OOMKilled",) * 2 + ("oom",), "fail"),
        (result(State.INFEASIBLE), (), "fail"),
    ],
)
def test_what_does_not_fit_is_tried_once_more_with_more_memory_on_request(
    verdict: Verdict, past: tuple[str, ...], kind: str
) -> None:
    spec = replace(SPEC, failure_policy=FailurePolicy(on_oom="RetryLarger"))
    event = settle(entry(*past), verdict, END, spec)

    assert event.kind == kind
    if isinstance(event, Retry):
        again = entry(*past, event.reason)
        assert memory_factor(again) == pytest.approx(1.5 * memory_factor(entry(*past)))
        assert retry_delay(again) == 0 or event.reason == "OOMKilled"


@pytest.mark.parametrize(
    ("reason", "past", "word"),
    [("timeout", ("timeout",), "infeasible"), ("OOMKilled", ("OOMKilled",) * 2, "oom")],
)
def test_prepare_that_never_ends_is_cancelled_so_that_it_may_be_opened_again(
    reason: str, past: tuple[str, ...], word: str
) -> None:
    """A `fail` marks its step as done: the ledger refused the next `prepare` for ever."""
    waiting = replace(entry(*past), c="prepare", frm=0, to=1)
    event = settle(waiting, infra(reason), END, SPEC)

    assert isinstance(event, Cancel)
    assert (event.reason, event.retire, event.dev) == (word, False, 10.0)


def test_a_time_out_that_made_progress_is_retried_for_ever() -> None:
    """`progress` is what the message of qtt_trainer says: updates saved by this attempt."""
    trained = StepResult(attempt=1, nonce="n", state=State.TIMEOUT, timing={"progress": 12.0})
    past: tuple[str, ...] = ("timeout",)
    for _ in range(20):
        event = settle(entry(*past), infra("timeout", result=trained), END, SPEC)
        assert event.kind == "retry"
        past = (*past, event.reason)

    assert settle(entry(*past), infra("timeout"), END, SPEC).kind == "fail"


CAUSES = [infra(cause.value) for cause in Cause]
STATES = {
    EXIT_BAD_JOB: Ending.BAD_JOB,
    EXIT_BAD_DATA: Ending.BAD_DATA,
    EXIT_BUG: Ending.BUG,
    EXIT_RETRY: Ending.INFRA,
}


@pytest.mark.parametrize(
    ("verdict", "counter"),
    [
        *((v, "cancelled_in_a_row") for v in CAUSES if v.reason not in USER_REASONS),
        *(
            (Verdict(kind=STATES[code], reason=state.value), COUNTERS[STATES[code]])
            for state, code in EXIT_CODES.items()
            if code in STATES
        ),
        (Verdict(kind=Ending.BUG, reason="badmessage"), "bugs_in_a_row"),
        (Verdict(kind=Ending.BUG, reason="bug"), "bugs_in_a_row"),
        (Verdict(kind=Ending.BAD_JOB, reason="weights_unavailable"), "invalid_in_a_row"),
        (infra("unknown"), "cancelled_in_a_row"),
        (infra("Killed"), "cancelled_in_a_row"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.kind.value} {value.reason}",
)
def test_every_cancel_is_counted_as_the_fault_it_is(verdict: Verdict, counter: str) -> None:
    """The words of `settle` and the sets of `fold` are two lists; this ties them."""
    state = fold([])
    opening = Open(c="4", frm=0, to=3, h="h", res=1.0)
    event: object = None
    past: list[str] = []
    while not isinstance(event, Cancel):
        now = replace(entry(*past), frm=0)
        event = settle(now, verdict, END, SPEC)
        if isinstance(event, Fail):
            return  # a fact about the configuration
        assert isinstance(event, Retry | Cancel)
        past.append(event.reason)
        if len(past) > 20:
            assert verdict.reason in UNCOUNTED
            return
    state = fold([opening, replace(event, a=0)], state)

    counts = {name: getattr(state, name) for name in set(COUNTERS.values()) - {""}}
    assert counts == {name: int(name == counter) for name in counts}


def test_overhead_is_what_was_held_but_not_trained() -> None:
    event = settle(entry(), result(State.OK, (2, 0.5, 3.0), (3, 0.6, 4.0)), END, SPEC)

    assert event.kind == "done"
    assert event.ov == pytest.approx(3.0)


def test_the_charge_counts_devices_and_share() -> None:
    spec = RunSpec(
        dataset=Dataset(claim_name="d"), budget=Budget(max_steps=1),
        trainer=Trainer(custom=True, devices=4), gpu_share=0.5,
    )  # fmt: skip

    assert settle(entry(), infra("infra_gpu"), END, spec).dev == pytest.approx(20.0)


def test_the_limits_are_the_manifests() -> None:
    policy = FailurePolicy(max_app_failures_per_config=0, max_infra_retries_per_step=0)
    spec = RunSpec(
        dataset=Dataset(claim_name="d"), budget=Budget(max_steps=1), failure_policy=policy
    )

    bug = Verdict(kind=Ending.BUG, reason="bug")
    assert settle(entry(), bug, END, spec).kind == "cancel"
    assert settle(entry(), infra("infra_gpu"), END, spec).kind == "cancel"


@pytest.mark.parametrize(
    ("past", "seconds"),
    [
        ((), 0),
        (("Killed",), 1),
        (("Killed",) * 3, 4),
        (("Killed",) * 20, 60),
        (("Killed", "preempted"), 0),
    ],
)
def test_delays_double_up_to_a_minute(past: tuple[str, ...], seconds: float) -> None:
    assert retry_delay(entry(*past)) == seconds


def test_a_restart_from_zero_is_allowed_after_two_unreadable_checkpoints() -> None:
    assert not may_restart(entry("checkpoint_corrupt"))
    assert may_restart(entry("checkpoint_corrupt", "checkpoint_corrupt"))

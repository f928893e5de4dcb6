"""`fold`: what a stream adds up to, event by event and in any two halves."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from qtt_core.errors import LedgerError
from qtt_core.ledger.events import (
    Cancel,
    Close,
    Done,
    Event,
    Fail,
    Note,
    Open,
    Prepared,
    Reopen,
    Retry,
    Run,
    WeightsFetched,
)
from qtt_core.ledger.fold import LedgerState, fold


def numbered(*events: Event, start: int = 1000) -> list[Event]:
    """Events with stream ids one second apart."""
    return [replace(event, id=f"{(start + i) * 1000}-0") for i, event in enumerate(events)]


def run(step: int = 1, full: int = 50) -> Run:
    return Run(
        name="digits", spec_hash="s", seed=1, algorithm="QuickTune", version="0", space_hash="p",
        spec={"fidelity": {"max": full, "step": step}},
    )  # fmt: skip


def opened(c: str = "7", frm: int = 0, to: int = 1, a: int = 0, res: float = 2.0) -> Open:
    return Open(c=c, frm=frm, to=to, a=a, h=f"h{c}-{to}", res=res)


def done(c: str = "7", to: int = 1, a: int = 0, epochs=((1, 0.5, 1.0),), **other) -> Done:  # type: ignore[no-untyped-def]
    return Done(**{"c": c, "to": to, "a": a, "state": "ok", "epochs": epochs, "dev": 3.0} | other)


def prepared(**other) -> Prepared:  # type: ignore[no-untyped-def]
    return Prepared(fingerprint="f", n_train=10, n_val=5, classes=2, **other)


def test_empty_stream_is_the_empty_state() -> None:
    assert fold([]) == LedgerState()


def test_a_done_moves_the_head_marks_the_step_and_charges_it() -> None:
    state = fold(numbered(run(), opened(), done(ov=0.5, q=4.0)))

    assert state.heads == {"7": 1}
    assert state.step_keys == {("7", 1)}
    assert state.open == {}
    assert (state.steps, state.charged_seconds) == (1, 3.0)
    assert (state.overhead_seconds, state.queue_seconds) == (0.5, 4.0)
    assert (state.first_time, state.last_end, state.last_id) == (1000.0, 1002.0, "1002000-0")


@pytest.mark.parametrize(
    ("step", "frm", "to", "keys"),
    [
        pytest.param(1, 0, 3, {1, 2, 3}, id="three steps of one epoch"),
        pytest.param(3, 0, 9, {3, 6, 9}, id="three steps of three epochs"),
        pytest.param(3, 9, 10, {10}, id="the last step is shorter"),
        pytest.param(4, 8, 14, {12, 14}, id="whole and shorter step in one job"),
    ],
)
def test_a_job_over_several_steps_marks_every_step_key(
    step: int, frm: int, to: int, keys: set[int]
) -> None:
    before = [opened(to=frm), done(to=frm, epochs=curve(1, frm))] if frm else []

    state = fold(
        numbered(run(step), *before, opened(frm=frm, to=to), done(to=to, epochs=curve(frm + 1, to)))
    )

    first = {target for target in range(1, frm + 1) if target % step == 0}
    assert {target for _, target in state.step_keys} == keys | first
    assert state.steps == len(keys | first)


def curve(first: int, last: int) -> tuple[tuple[int, float, float], ...]:
    return tuple((epoch, epoch / 100, 1.0) for epoch in range(first, last + 1))


@pytest.mark.parametrize(
    ("step", "to", "last", "steps"),
    [
        pytest.param(1, 5, 0, 1, id="nothing finite is one step"),
        pytest.param(1, 5, 2, 3, id="the failed epoch is consumed"),
        pytest.param(1, 5, 4, 5, id="failed in the last epoch"),
        pytest.param(3, 9, 4, 2, id="failed inside the second step"),
        pytest.param(3, 9, 3, 2, id="failed in the first epoch of the second step"),
        pytest.param(3, 9, 8, 3, id="failed in the last step"),
    ],
)
def test_a_diverged_done_counts_the_steps_it_consumed_and_closes_the_configuration(
    step: int, to: int, last: int, steps: int
) -> None:
    state = fold(
        numbered(run(step), opened(to=to), done(to=to, state="diverged", epochs=curve(1, last)))
    )

    assert state.steps == steps
    assert state.failed == {"7": "diverged"}
    assert ("7", to) in state.step_keys
    assert state.heads == ({"7": last} if last else {})
    assert state.retired == frozenset()


def test_a_gap_that_diverged_when_it_was_trained_again_keeps_the_head() -> None:
    """The checkpoint of epoch 3 was lost; the next job began again at 2 and diverged there."""
    again = Done(c="7", to=5, a=0, state="diverged", epochs=((2, 0.1, 1.0),), dev=1.0)

    state = fold(
        numbered(run(), opened(to=3), done(to=3, epochs=curve(1, 3)), opened(frm=3, to=5), again)
    )

    assert state.heads == {"7": 3}
    assert state.steps == 3 + 1


def test_a_fail_counts_one_step_and_closes_the_configuration() -> None:
    state = fold(numbered(run(), opened(to=3), Fail(c="7", to=3, a=0, state="oom", dev=2.0)))

    assert (state.steps, state.failed, state.heads) == (1, {"7": "oom"}, {})
    assert state.step_keys == {("7", 3)}


def test_a_retry_keeps_the_entry_open_under_the_next_attempt() -> None:
    state = fold(
        numbered(
            run(), opened(),
            Retry(c="7", to=1, a=1, reason="preempted", dev=5.0, ov=1.0),
            Retry(c="7", to=1, a=2, reason="bug", dev=1.0),
        )
    )  # fmt: skip

    entry = state.open["7"]
    assert (entry.attempt, entry.retries, entry.charged) == (2, ("preempted", "bug"), 6.0)
    assert (entry.since, entry.opened_id) == (1003.0, "1001000-0")
    assert (state.infra_retries, state.steps, state.charged_seconds) == (1, 0, 6.0)


def test_cancel_reopens_the_place_and_retire_closes_it() -> None:
    state = fold(
        numbered(
            run(),
            opened("1"), Cancel(c="1", to=1, a=0, reason="timeout", dev=1.0),
            opened("2"), Cancel(c="2", to=1, a=0, reason="invalid_config", retire=True),
            opened("1"),
        )
    )  # fmt: skip

    assert set(state.open) == {"1"}
    assert state.retired == {"2"}
    assert state.failed == {"2": "invalid_config"}
    assert state.step_keys == frozenset()
    assert (state.cancelled_in_a_row, state.invalid_in_a_row) == (1, 1)


@pytest.mark.parametrize(
    ("reason", "retire", "rows"),
    [
        pytest.param("timeout", False, (1, 0), id="used-up infrastructure retries"),
        pytest.param("checkpoint_corrupt", True, (1, 0), id="storage that loses checkpoints"),
        pytest.param("identity_mismatch", True, (0, 1), id="version skew"),
        pytest.param("weights_unavailable", True, (0, 1), id="the hub refuses"),
        pytest.param("weights_unavailable", False, (1, 0), id="the hub is away"),
        pytest.param("bug", True, (0, 0), id="a bug of the trainer"),
        pytest.param("bad_data", False, (0, 0), id="the user's images"),
        pytest.param("Stopped", False, (0, 0), id="the user's stop"),
    ],
)
def test_which_cancels_count_towards_stopping_the_run(
    reason: str, retire: bool, rows: tuple[int, int]
) -> None:
    cancelled = fold(
        numbered(run(), opened(), Cancel(c="7", to=1, a=0, reason=reason, retire=retire))
    )
    after_result = fold(numbered(opened("8"), done("8"), start=2000), cancelled)

    assert (cancelled.cancelled_in_a_row, cancelled.invalid_in_a_row) == rows
    assert (after_result.cancelled_in_a_row, after_result.invalid_in_a_row) == (0, 0)


def test_prepare_is_charged_but_weights_and_evaluations_are_not() -> None:
    state = fold(
        numbered(
            run(),
            opened("weights"), Retry(c="weights", to=1, a=1, reason="infra_storage", dev=9.0),
            WeightsFetched(claim="w", a=1),
            opened("prepare"), Retry(c="prepare", to=1, a=1, reason="RunnerLost", dev=2.0),
            prepared(a=1, dev=4.0),
            opened("eval-ab"), Note(what="evaluation", c="eval-ab", new="{}"),
        )
    )  # fmt: skip

    assert state.charged_seconds == 6.0
    assert state.steps == 0
    assert state.heads == {}
    assert state.open == {}
    assert state.prepared is not None
    assert state.weights is not None
    assert state.step_keys == {("weights", 1), ("prepare", 1), ("eval-ab", 1)}


def test_a_second_prepare_begins_where_the_first_ended() -> None:
    state = fold(
        numbered(run(), opened("prepare"), prepared(), opened("prepare", 1, 2), prepared(to=2))
    )

    assert state.prepared is not None
    assert state.prepared.to == 2


def test_close_and_reopen_say_whether_the_run_goes_on() -> None:
    closed = fold(numbered(run(), Close(reason="BudgetExhausted")))
    reopened = fold(numbered(Reopen(reason="budget raised"), start=2000), closed)

    assert closed.closed is not None
    assert closed.closed.reason == "BudgetExhausted"
    assert reopened.closed is None


def test_an_evaluation_may_be_opened_on_a_closed_run() -> None:
    state = fold(numbered(run(), Close(reason="Stopped"), opened("eval-ab")))

    assert set(state.open) == {"eval-ab"}


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([run(), run()], id="two runs"),
        pytest.param([run(), done()], id="an end without a beginning"),
        pytest.param([run(), opened(to=2), done(to=1)], id="the end of another step"),
        pytest.param([run(), opened(), done(a=1)], id="an attempt that never was"),
        pytest.param(
            [run(), opened(), Retry(c="7", to=1, a=2, reason="x", dev=0)], id="an attempt skipped"
        ),
        pytest.param([run(), opened(), opened()], id="opened twice"),
        pytest.param([run(), opened(frm=1, to=2)], id="a gap"),
        pytest.param([run(), opened(frm=0, to=0)], id="no epoch"),
        pytest.param([run(), prepared()], id="prepared without an open prepare"),
        pytest.param([run(), Close(reason="Stopped"), opened()], id="opened on a closed run"),
        pytest.param(
            [run(), Note(what="evaluation", c="eval-a")], id="an evaluation nobody opened"
        ),
    ],
)
def test_events_that_contradict_each_other_are_refused(events: list[Event]) -> None:
    with pytest.raises(LedgerError):
        fold(numbered(*events))


def test_events_out_of_stream_order_are_refused() -> None:
    first, second = numbered(run(), opened())

    with pytest.raises(LedgerError, match="comes after"):
        fold([second, first])


def test_sequence_numbers_are_compared_as_numbers() -> None:
    events = [replace(run(), id="1000-9"), replace(opened(), id="1000-10")]

    assert fold(events).last_id == "1000-10"


def long_stream(configurations: int, epochs: int) -> list[Event]:
    stream: list[Event] = [run(full=epochs)]
    for epoch in range(1, epochs + 1):
        for c in map(str, range(configurations)):
            stream.append(opened(c, epoch - 1, epoch))
            stream.append(done(c, epoch, epochs=((epoch, 0.5, 1.0),)))
    return numbered(*stream)


def test_folding_in_two_parts_equals_folding_at_once() -> None:
    stream = [
        *long_stream(3, 3),
        *numbered(
            opened("9"), Retry(c="9", to=1, a=1, reason="timeout", dev=1.5),
            Cancel(c="9", to=1, a=1, reason="timeout", retire=True, dev=0.1),
            Note(what="budget", old="1", new="2"), Close(reason="Stopped"), Reopen(reason="again"),
            start=5000,
        ),
    ]  # fmt: skip
    whole = fold(stream)

    for cut in range(len(stream) + 1):
        assert fold(stream[cut:], fold(stream[:cut])) == whole


def test_folding_further_leaves_the_earlier_state_alone() -> None:
    before = fold(numbered(run(), opened()))

    fold(numbered(done(), start=2000), before)

    assert set(before.open) == {"7"}
    assert before.heads == {}


def test_ten_thousand_steps_fold_in_a_fraction_of_a_second() -> None:
    """Replay after a restart reads the whole stream; the target is 0.3 s on an idle core."""
    stream = long_stream(200, 50)

    began = time.process_time()
    state = fold(stream)
    spent = time.process_time() - began

    assert state.steps == 10_000
    assert spent < 1.5  # five times the target: other work shares the core


def test_a_cancelled_decision_leaves_the_next_attempt_number() -> None:
    retry = Retry(c="7", to=1, a=1, reason="infra_gpu", dev=1.0)
    state = fold(numbered(run(), opened(), retry, Cancel(c="7", to=1, a=1, reason="infra_gpu")))

    assert state.attempts == {("7", 1): 2}


def test_changed_data_are_remembered_until_a_person_asks_and_prepare_agrees() -> None:
    changed = Cancel(c="7", to=1, a=0, reason="dataset_changed", msg="f, expected g")
    first = numbered(run(), opened("prepare"), prepared(), opened(), changed)
    held = fold(first)
    asked = fold([replace(Note(what="retry", new="t"), id="2000000-0")], held)
    second = [
        replace(opened("prepare", 1, 2), id="2000001-0"),
        replace(prepared(to=2), id="2000002-0"),
    ]

    assert (held.dataset_changed, held.recheck) == ("f, expected g", False)
    assert (asked.dataset_changed, asked.recheck) == ("f, expected g", True)
    after = fold(second, asked)
    assert (after.dataset_changed, after.recheck) == ("", False)


def test_nodes_whose_device_failed_are_remembered_with_the_time() -> None:
    fault = Retry(c="7", to=1, a=1, reason="infra_gpu", node="n1", dev=1.0)
    other = Retry(c="7", to=1, a=2, reason="Evicted", node="n2", dev=1.0)
    state = fold(numbered(run(), opened(), fault, other))

    assert state.bad_nodes == {"n1": 1002.0}


def test_a_step_that_a_person_stopped_is_no_infrastructure_retry() -> None:
    stopped = Retry(c="7", to=1, a=1, reason="Stopped", dev=1.0)

    assert fold(numbered(run(), opened(), stopped)).infra_retries == 0

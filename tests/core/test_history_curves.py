"""What each configuration's past is, and what the optimizer is told of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qtt_core.errors import LedgerError
from qtt_core.history import Standing, best_so_far, histories, optimizer_events
from qtt_core.ledger.events import Cancel, Done, Event, Fail, Note, Open, Prepared, Retry, Run
from qtt_core.ledger.fold import fold
from qtt_core.steps import Abandon, Observation, Outcome, Proposal, Why

CONFIGS = {"1": {"model": "a"}, "2": {"model": "b"}}
RUN = Run(
    name="r", spec_hash="", seed=0, algorithm="Random", version="", space_hash="",
    spec={"fidelity": {"max": 4, "step": 1}},
)  # fmt: skip
WHY = Why(rule="ei", mean=0.9, cost_seconds=3.0)


def numbered(*events: Event) -> list[Event]:
    return [replace(event, id=f"{1000 * (i + 1)}-0") for i, event in enumerate(events)]


def opened(frm: int = 0, to: int = 1, c: str = "1", a: int = 0) -> Open:
    return Open(c=c, frm=frm, to=to, a=a, h="", res=2.5, why=WHY.to_json())


def done(first: int, to: int, *scores: float, c: str = "1", state: str = "ok", **other) -> Done:  # type: ignore[no-untyped-def]
    epochs = tuple((first + i, score, 0.5) for i, score in enumerate(scores))
    return Done(**{"c": c, "to": to, "a": 0, "state": state, "epochs": epochs, "dev": 2.0} | other)


def told(*events: Event) -> list[object]:
    return [event for _, event in optimizer_events(numbered(RUN, *events), CONFIGS)]


# --- what the optimizer is told ---


def test_a_decision_is_told_as_the_proposal_it_was_and_its_result_as_scores() -> None:
    assert told(opened(), done(1, 1, 0.6, ov=0.25, gpu="H100", inert=("x",), eb=32, mem=900)) == [
        Proposal(
            config_id=1, config={"model": "a"}, fidelity_from=0, fidelity_to=1,
            expected_seconds=2.5, why=WHY,
        ),
        Observation(
            config_id=1, fidelity=1, outcome=Outcome.OK, scores=(0.6,), seconds=(0.5,),
            overhead_seconds=0.25, gpu="H100", inert=("x",), effective_batch=32, memory_mb=900,
        ),
    ]  # fmt: skip


def test_each_epoch_is_told_once_when_a_gap_was_trained_again() -> None:
    """The checkpoint of epoch 3 was lost: the job to 4 trained 2 and 3 again, with other scores."""
    events = [opened(to=3), done(1, 3, 0.1, 0.2, 0.3), opened(3, 4), done(2, 4, 0.8, 0.9, 0.4)]

    observed = [event for event in told(*events) if isinstance(event, Observation)]

    assert [(o.fidelity, o.scores) for o in observed] == [(3, (0.1, 0.2, 0.3)), (4, (0.4,))]


@pytest.mark.parametrize(
    ("before", "scores", "fidelity", "fresh"),
    [
        pytest.param([], (), 1, (), id="in the first epoch"),
        pytest.param([], (0.1, 0.2), 3, (0.1, 0.2), id="after two finite epochs"),
        pytest.param([opened(to=1), done(1, 1, 0.7)], (), 2, (), id="continued, at once"),
    ],
)
def test_a_diverged_result_names_the_epoch_that_failed(
    before: list[Event], scores: tuple[float, ...], fidelity: int, fresh: tuple[float, ...]
) -> None:
    frm = len(before) // 2

    last = told(*before, opened(frm, 4), done(frm + 1, 4, *scores, state="diverged"))[-1]

    assert last == Observation(
        config_id=1, fidelity=fidelity, outcome=Outcome.DIVERGED, scores=fresh,
        seconds=(0.5,) * len(fresh),
    )  # fmt: skip


def test_a_diverged_result_of_epochs_known_already_fails_after_the_last_one_told() -> None:
    last = told(
        opened(to=2), done(1, 2, 0.1, 0.2), opened(2, 4), done(1, 4, 0.3, state="diverged")
    )[-1]

    assert isinstance(last, Observation)
    assert (last.fidelity, last.scores) == (3, ())


@pytest.mark.parametrize("state", ["oom", "infeasible"])
def test_a_failure_is_told_at_the_proposals_end_without_scores(state: str) -> None:
    last = told(opened(to=3), Fail(c="1", to=3, a=0, state=state, dev=1.0, mem=7))[-1]

    assert last == Observation(config_id=1, fidelity=3, outcome=Outcome(state), memory_mb=7)


@pytest.mark.parametrize("retire", [False, True])
def test_a_cancel_is_told_as_abandoned(retire: bool) -> None:
    last = told(opened(), Cancel(c="1", to=1, a=0, reason="timeout", retire=retire))[-1]

    assert last == Abandon(config_id=1, retire=retire)


def test_what_is_no_fact_about_a_configuration_is_not_told() -> None:
    prepare = Open(c="prepare", frm=0, to=1, h="", res=0)
    evaluation = Open(c="eval-a", frm=0, to=1, h="", res=0)

    assert told(
        prepare,
        Retry(c="prepare", to=1, a=1, reason="bug", dev=1),
        Cancel(c="prepare", to=1, a=1, reason="bug"),
        evaluation,
        Note(what="evaluation", c="eval-a"),
    ) == []  # fmt: skip
    assert len(told(opened(), Retry(c="1", to=1, a=1, reason="preempted", dev=1))) == 1


def test_a_tail_is_told_like_the_whole() -> None:
    """A worker that was told a prefix gets the rest, from the fold of that prefix."""
    stream = numbered(
        RUN,
        opened(to=2), done(1, 2, 0.1, 0.2), opened(c="2"), done(1, 1, 0.5, c="2"),
        opened(2, 4), done(1, 4, 0.9, 0.9, 0.3, 0.4),
        opened(1, 4, c="2"), done(2, 4, 0.6, c="2", state="diverged"),
    )  # fmt: skip
    whole = optimizer_events(stream, CONFIGS)

    for cut in range(len(stream) + 1):
        heads = fold(stream[:cut]).heads
        tail = optimizer_events(stream[cut:], CONFIGS, told=heads)
        assert optimizer_events(stream[:cut], CONFIGS) + tail == whole


def test_a_configuration_without_its_values_is_a_damaged_ledger() -> None:
    for read in (optimizer_events, histories):
        with pytest.raises(LedgerError, match="configuration 9"):
            read(numbered(RUN, opened(c="9")), CONFIGS)


# --- what people see ---


def history_of(*events: Event):  # type: ignore[no-untyped-def]
    return histories(numbered(RUN, *events), CONFIGS)[1]


@pytest.mark.parametrize(
    ("events", "standing", "reason"),
    [
        pytest.param([opened()], Standing.OPEN, "", id="waiting or running"),
        pytest.param(
            [opened(), Retry(c="1", to=1, a=1, reason="x", dev=1)], Standing.OPEN, "", id="retried"
        ),
        pytest.param([opened(), done(1, 1, 0.5)], Standing.PAUSED, "", id="may be continued"),
        pytest.param(
            [opened(to=4), done(1, 4, 0.5, 0.5, 0.5, 0.5)],
            Standing.FINISHED,
            "",
            id="full fidelity",
        ),
        pytest.param(
            [opened(), done(1, 1, state="diverged", msg="loss is NaN")],
            Standing.DIVERGED,
            "loss is NaN",
            id="diverged",
        ),
        pytest.param(
            [opened(), Fail(c="1", to=1, a=0, state="oom", dev=1)],
            Standing.OOM,
            "oom",
            id="out of memory",
        ),
        pytest.param(
            [opened(), Cancel(c="1", to=1, a=0, reason="bug", retire=True)],
            Standing.RETIRED,
            "bug",
            id="retired",
        ),
        pytest.param(
            [opened(), Cancel(c="1", to=1, a=0, reason="timeout")],
            Standing.CANCELLED,
            "timeout",
            id="cancelled",
        ),
        pytest.param(
            [opened(), done(1, 1, 0.5), opened(1, 2), Cancel(c="1", to=2, a=0, reason="Stopped")],
            Standing.PAUSED,
            "Stopped",
            id="stopped with results",
        ),
        pytest.param(
            [opened(), Cancel(c="1", to=1, a=0, reason="timeout"), opened()],
            Standing.OPEN,
            "",
            id="taken again",
        ),
    ],
)
def test_the_standing_of_a_configuration(
    events: list[Event], standing: Standing, reason: str
) -> None:
    record = history_of(*events)

    assert (record.standing, record.reason) == (standing, reason)


def test_a_record_adds_up_every_attempt_and_keeps_the_curve() -> None:
    record = history_of(
        opened(to=2),
        Retry(c="1", to=2, a=1, reason="preempted", dev=3.0, ov=1.0, q=0.5),
        done(1, 2, 0.6, 0.4, a=1, ck="sha-2", bytes=100, gpu="cpu", eb=16, inert=("x",), ov=0.5),
        opened(2, 3),
        done(3, 3, 0.7, ck="sha-3", bytes=110, q=0.25),
    )

    assert (record.epochs, record.scores) == ((1, 2, 3), (0.6, 0.4, 0.7))
    assert (record.fidelity, record.last_score) == (3, 0.7)
    assert (record.best_score, record.best_epoch) == (0.7, 3)
    assert record.trained_seconds == 1.5
    assert (record.charged_seconds, record.overhead_seconds, record.queue_seconds) == (7, 1.5, 0.75)
    assert (record.steps, record.attempts, record.retries) == (3, 3, ("preempted",))
    assert (record.checkpoint, record.checkpoint_epoch, record.checkpoint_bytes) == (
        "sha-3",
        3,
        110,
    )
    assert (record.gpu, record.effective_batch, record.inert) == ("cpu", 16, ("x",))
    assert (record.target, record.expected_seconds, record.why) == (3, 2.5, WHY)
    assert (record.opened_id, record.opened_at, record.ended_at) == ("2000-0", 2.0, 6.0)


def test_the_best_epoch_is_the_first_that_reached_the_best_score() -> None:
    record = history_of(opened(to=3), done(1, 3, 0.5, 0.9, 0.9))

    assert record.best_epoch == 2


def test_records_come_in_the_order_of_their_first_decision() -> None:
    stream = numbered(RUN, opened(c="2"), opened(c="1"), done(1, 1, 0.5, c="2"))

    assert list(histories(stream, CONFIGS)) == [2, 1]


def test_histories_and_fold_count_the_same() -> None:
    stream = numbered(
        replace(RUN, spec={"fidelity": {"max": 10, "step": 3}}),
        opened(to=7), done(1, 7, *[0.5] * 7),
        opened(to=9, c="2"), done(1, 9, 0.1, 0.2, 0.3, c="2", state="diverged"),
        opened(7, 10), Fail(c="1", to=10, a=0, state="oom", dev=1.5),
    )  # fmt: skip
    state, records = fold(stream), histories(stream, CONFIGS)
    last = best_so_far(stream)[-1]

    assert sum(record.steps for record in records.values()) == state.steps == last.steps == 6
    assert sum(r.charged_seconds for r in records.values()) == state.charged_seconds == 5.5
    assert last.charged_seconds == 5.5
    assert {c: records[int(c)].fidelity for c in state.heads} == state.heads


def test_best_so_far_rises_with_what_was_spent() -> None:
    prepare = Open(c="prepare", frm=0, to=1, h="", res=0)
    points = best_so_far(
        numbered(
            RUN, prepare,
            Prepared(fingerprint="", n_train=1, n_val=1, classes=2, dev=1.0),
            opened(to=2), done(1, 2, 0.7, 0.6), opened(c="2"), done(1, 1, 0.65, c="2"),
            opened(2, 3), Retry(c="1", to=3, a=1, reason="bug", dev=4.0),
            done(3, 3, 0.8, a=1),
        )
    )  # fmt: skip

    assert [(p.charged_seconds, p.steps, p.best_score) for p in points] == [
        (1.0, 0, None), (3.0, 2, 0.7), (5.0, 3, 0.7), (9.0, 3, 0.7), (11.0, 4, 0.8),
    ]  # fmt: skip
    assert (points[1].config_id, points[1].fidelity) == (1, 1)
    assert (points[-1].config_id, points[-1].fidelity, points[-1].time) == (1, 3, 10.0)

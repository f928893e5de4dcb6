"""Rows, words and lines that people read, from one recorded run."""
# ruff: noqa: E501 -- whole lines of output stand in the tables

import pytest

from qtt_core.ledger.events import Cancel, Close, Done, Open, Retry
from qtt_core.spec import Budget
from qtt_core.steps import METRICS, Metric, Why
from qtt_operator.narrate import Narrator
from qtt_operator.report import (
    best_checkpoint,
    checkpoints,
    leaderboard,
    metric_of,
    predicted,
    settings,
    statistics,
    why_it_won,
)

TOP1, LOSS = METRICS["top1"], METRICS["log_loss"]


@pytest.fixture
def board(recorded):
    return leaderboard(recorded.events(), recorded.configs, metric=TOP1, recommended=7)


def test_each_configuration_is_ranked_at_its_best_checkpoint_not_its_last_epoch(board):
    assert [(row.rank, row.config_id, row.score, row.fidelity) for row in board] == [
        (1, 7, 0.95, 2),
        (2, 0, 0.8, 1),
    ]
    assert [row.best for row in board] == [True, False]


def test_equal_scores_rank_the_cheaper_configuration_first():
    events = [
        event
        for c, seconds in (("1", 9.0), ("2", 3.0))
        for event in (
            Open(c=c, frm=0, to=1, h="h", res=1.0),
            Done(c=c, to=1, a=0, state="ok", epochs=((1, 0.5, seconds),), dev=1.0, ck="x"),
        )
    ]

    rows = leaderboard(events, {"1": {}, "2": {}}, metric=TOP1)

    assert [row.config_id for row in rows] == [2, 1]


def test_statistics_keep_the_order_of_decisions_and_show_failures(recorded):
    rows = statistics(recorded.events(), recorded.configs, metric=TOP1)

    assert [row.config_id for row in rows] == [0, 7, 9]
    assert (rows[1].cost, rows[1].device_seconds, rows[1].steps) == (4.5, 6.5, 3)
    failed = rows[2]
    assert (failed.status, failed.score, failed.value, failed.checkpoint) == (False, None, None, "")


def test_only_checkpoints_that_still_exist_count(recorded):
    rows = leaderboard(
        recorded.events(), recorded.configs, metric=TOP1, kept=lambda point: point.epoch == 3
    )

    assert [(row.config_id, row.score, row.checkpoint) for row in rows] == [(7, 0.9, "c7/f3")]


def test_a_loss_is_shown_as_a_loss_and_ranked_by_being_small(recorded):
    rows = leaderboard(recorded.events(), recorded.configs, metric=LOSS)

    assert rows[0].value == pytest.approx(0.0513, abs=1e-4)
    assert rows[0].value < rows[1].value


def test_the_earlier_of_equal_checkpoints_is_the_best():
    events = [
        Done(c="1", to=n, a=0, state="ok", epochs=((n, 0.5, 1.0),), dev=1.0, ck="x") for n in (1, 2)
    ]

    assert best_checkpoint(checkpoints(events)[1]).epoch == 1


@pytest.mark.parametrize(
    ("spec", "metric"),
    [
        ({"objective": {"metric": "macro_f1"}}, METRICS["macro_f1"]),
        ({"objective": {"metric": "log_loss"}}, LOSS),
        ({}, TOP1),
        ({"objective": {"metric": "mine"}}, Metric(name="mine")),
        (
            {"objective": {"metric": "mine", "direction": "Minimize"}},
            Metric(name="mine", maximise=False),
        ),
    ],
)
def test_the_metric_is_read_from_the_recorded_spec(spec, metric):
    assert metric_of(spec) == metric


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"opt": "adamw", "lr": 0.001, "batch_size": 32, "drop": 0.0, "mixup": "none"}, "adamw lr 0.001, batch 32"),
        ({"opt": "sgd", "lr": 1e-05, "linear_probing": True, "pct_to_freeze": 0.4}, "sgd lr 1e-05, freeze 0.4, probe first"),
        ({"lr": 0.1, "linear_probing": False}, "lr 0.1"),
        ({}, ""),
    ],
)  # fmt: skip
def test_settings_are_few_words_and_leave_out_what_is_off(config, words):
    assert settings(config) == words


@pytest.mark.parametrize(
    ("why", "metric", "text"),
    [
        (Why(rule="r", mean=0.93, sd=0.03), TOP1, "0.930 ± 0.030"),
        (Why(rule="r", mean=0.93), TOP1, "0.930"),
        (Why(rule="r"), TOP1, ""),
        (Why(rule="r", mean=0.99, sd=0.5), TOP1, "0.990 ± 0.010"),
        (Why(rule="r", mean=0.0, sd=0.1), LOSS, "30.000 ± 27.697"),
    ],
)
def test_a_prediction_is_in_the_metrics_own_unit_and_possible(why, metric, text):
    assert predicted(why, metric) == text


def test_the_last_sentence_says_who_proposed_what_was_predicted_and_what_it_cost(recorded, board):
    sentence = why_it_won(
        recorded.events(), board, winner=board[0], metric=TOP1, spent_seconds=11.5, n_val=30
    )

    assert sentence == (
        "c7 (mini_vit, momentum lr 0.01, batch 16) was proposed by highest gain at predicted "
        "0.900 ± 0.050, rank 2 of 512, and reached top1 0.9500 at epoch 2 using 6.5 of 11.5 "
        "device-seconds; runner-up: c0 (mini_resnet) with 0.8000 (30 validation images)."
    )


def test_a_winner_that_once_measured_less_says_so(recorded, board):
    sentence = why_it_won(
        recorded.events(), board, winner=board[1], metric=TOP1, spent_seconds=11.5
    )

    assert "a single better measurement, within the noise, came from c7" in sentence


# --- lines --------------------------------------------------------------------------------------


def told(events, configs, **budget):
    narrator = Narrator(metric=TOP1, budget=Budget(**(budget or {"max_steps": 9})))
    return [line for event in events if (line := narrator.line(event, configs))]


def test_every_decision_and_result_is_one_line_with_the_budget_used(recorded):
    lines = told(recorded.events(), recorded.configs)

    assert lines == [
        "run rec: QuickTune, seed 1",
        "prepare: reading the data set",
        "data: 90 train + 30 val images, 3 classes",
        "c0 epoch 1: mini_resnet (adamw lr 0.001, batch 32); predicted 0.900 ± 0.050, ~3 s, rank 2 of 512, highest gain",
        "c0 epoch 1: top1 0.8000 in 1.5 s  * best so far  [step 1 of 9, 4 device-s]",
        "c7 epochs 1-2: mini_vit (momentum lr 0.01, batch 16, mixup 0.2); predicted 0.900 ± 0.050, ~3 s, rank 2 of 512, highest gain",
        "c7 epoch 2: top1 0.9500 in 3.0 s  * best so far  [step 3 of 9, 8 device-s]",
        "c7 epoch 3: mini_vit (momentum lr 0.01, batch 16, mixup 0.2); predicted 0.900 ± 0.050, ~3 s, rank 2 of 512, highest gain",
        "c7 epoch 3: top1 0.9000 in 1.5 s  (best 0.9500 by c7)  [step 4 of 9, 10 device-s]",
        "c9 epoch 1: mini_resnet (sgd lr 0.1, batch 64, drop 0.1); predicted 0.900 ± 0.050, ~3 s, rank 2 of 512, highest gain",
        "c9 oom: out of memory at batch 64  [step 5 of 9, 12 device-s]",
        "ended: BudgetExhausted 5 of 5 steps used",
    ]  # fmt: skip


def test_a_run_that_goes_on_says_in_one_line_what_it_has(recorded):
    narrator = Narrator(metric=TOP1, budget=Budget(max_steps=9))
    for event in recorded.events():
        narrator.line(event, recorded.configs)

    assert narrator.so_far() == (
        "going on where the run stopped: best top1 0.9500 by c7 at epoch 2"
        "  [step 5 of 9, 12 device-s]"
    )


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Retry(c="3", to=1, a=1, reason="ServeDied", dev=1.0, msg="SIGKILL"), "c3 again, attempt 2: ServeDied SIGKILL"),
        (Retry(c="3", to=1, a=1, reason="Stopped", dev=1.0, msg="Stopped"), "c3 again, attempt 2: Stopped"),
        (Cancel(c="3", to=1, a=0, reason="bug", retire=True, msg="Traceback\nValueError: x"), "c3 given up: bug ValueError: x"),
        (Cancel(c="prepare", to=1, a=0, reason="RunnerLost"), "prepare put back: RunnerLost"),
        (Done(c="3", to=1, a=0, state="diverged", epochs=(), dev=1.0), "c3 diverged after 0 good epochs  [step 1 of 9, 1 device-s]"),
        (Close(reason="BadData", msg="no val folder"), "ended: BadData no val folder"),
    ],
)  # fmt: skip
def test_trouble_is_told_with_its_reason(event, line):
    assert told([event], {}) == [line]

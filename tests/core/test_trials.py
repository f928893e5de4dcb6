"""What the book accepts, refuses and ignores; rungs, job ends, the noise-aware incumbent."""

import pytest

from qtt_core.errors import ObservationError, UnknownConfigurationError
from qtt_core.steps import (
    Abandon,
    BudgetView,
    Observation,
    Options,
    Outcome,
    Proposal,
    Why,
)
from qtt_core.trials import (
    Trial,
    Trials,
    best_observed,
    is_stagnating,
    job_end,
    next_rung,
    rungs,
    seconds_left,
    smoothed,
    steps_left,
)


def make_trials(**options):
    trials = Trials(max_fidelity=9, step=1, options=Options(**options))
    trials.add([{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}])
    return trials


def proposal(config_id=0, to=3, start=0, config=None):
    return Proposal(
        config_id=config_id,
        config=config or {"lr": (0.1, 0.2, 0.3)[config_id]},
        fidelity_from=start,
        fidelity_to=to,
        expected_seconds=1.0,
        why=Why(rule="test"),
    )


def ok(config_id=0, fidelity=3, *scores):
    scores = scores or (0.5,) * fidelity
    return Observation(
        config_id=config_id,
        fidelity=fidelity,
        outcome=Outcome.OK,
        scores=scores,
        seconds=(1.0,) * len(scores),
    )


def failed(outcome, config_id=0, fidelity=3, *scores):
    return Observation(
        config_id=config_id,
        fidelity=fidelity,
        outcome=outcome,
        scores=scores,
        seconds=(1.0,) * len(scores),
    )


def started():
    trials = make_trials()
    trials.open(proposal())
    return trials


def test_a_result_ends_the_proposal_it_completes():
    trials = started()
    trials.tell(ok(0, 2))
    assert trials.trial(0).pending_to == 3
    trials.tell(ok(0, 3, 0.6))
    assert trials.trial(0).pending_to is None
    assert trials.trial(0).scores == [0.5, 0.5, 0.6]


def test_telling_twice_changes_nothing():
    trials = started()
    assert trials.tell(ok()) is True
    assert trials.tell(ok(0, 3, 0.9, 0.9, 0.9)) is False
    assert trials.tell(ok(0, 2)) is False
    assert trials.trial(0).scores == [0.5] * 3
    assert len(trials.told) == 1


def test_an_overlap_adds_only_what_is_new():
    trials = started()
    trials.tell(ok(0, 2, 0.1, 0.2))
    trials.tell(ok(0, 4, 0.9, 0.9, 0.3, 0.4))
    assert trials.trial(0).scores == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("observation", "words"),
    [
        (ok(0, 4, 0.5), "epochs must follow"),
        (ok(0, 1, 0.5, 0.5), "epochs must follow"),
        (ok(0, 10, 0.5), "use 1..9"),
        (ok(0, 1, 1.2), "outside"),
        (ok(0, 1, -0.1), "outside"),
        (failed(Outcome.OK, 0, 1), "without scores"),
        (failed(Outcome.OOM, 0, 1, 0.5), "carries 1 scores"),
        (failed(Outcome.DIVERGED, 0, 2, 0.5, 0.5), "epoch that failed"),
    ],
)
def test_results_out_of_range_or_order_are_refused(observation, words):
    trials = started()
    with pytest.raises(ObservationError, match=words):
        trials.tell(observation)
    assert trials.trial(0).scores == []
    assert trials.told == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_never_come_into_being(value):
    with pytest.raises(ObservationError, match="finite"):
        ok(0, 1, value)


def test_overhead_must_be_a_number():
    trials = started()
    bad = Observation(
        config_id=0, fidelity=1, outcome=Outcome.OK, scores=(0.1,), seconds=(1.0,),
        overhead_seconds=float("nan"),
    )  # fmt: skip
    with pytest.raises(ObservationError, match="overhead_seconds"):
        trials.tell(bad)


@pytest.mark.parametrize("config_id", [1, 99])
def test_a_configuration_nobody_proposed_is_unknown(config_id):
    with pytest.raises(UnknownConfigurationError, match=str(config_id)):
        started().tell(ok(config_id, 1))


def test_divergence_keeps_the_finite_epochs_and_closes():
    trials = started()
    trials.tell(failed(Outcome.DIVERGED, 0, 3, 0.4, 0.2))
    trial = trials.trial(0)
    assert (trial.scores, trial.failure, trial.failed_at) == ([0.4, 0.2], Outcome.DIVERGED, 3)
    assert trial not in trials.trainable()
    assert trials.tell(failed(Outcome.DIVERGED, 0, 3)) is False
    with pytest.raises(ObservationError, match="closed as diverged"):
        trials.tell(ok(0, 4, 0.5))


@pytest.mark.parametrize("outcome", [Outcome.OOM, Outcome.INFEASIBLE])
def test_what_does_not_fit_is_closed_without_a_curve(outcome):
    trials = started()
    trials.tell(failed(outcome))
    assert trials.trial(0).scores == []
    assert trials.trial(0) not in trials.trainable()


def test_abandon_frees_and_retire_removes():
    trials = started()
    trials.abandon(Abandon(config_id=0))
    assert trials.trial(0) in trials.trainable()
    trials.open(proposal())
    trials.abandon(Abandon(config_id=0, retire=True))
    assert trials.trial(0) not in trials.trainable()


def test_a_model_that_nobody_can_have_is_proposed_no_more_but_goes_on_where_it_trained():
    trials = started()
    models = {trial.config_id: trial.config.get("model") for trial in trials.all()}
    trials.tell(ok())
    other = next(c for c, model in models.items() if c != 0)
    trials.open(proposal(other))
    trials.abandon(Abandon(config_id=other, retire=True, model_gone=True))

    left = {trial.config_id for trial in trials.trainable()}
    assert left == {c for c, model in models.items() if model != models[other]} | {0}


def test_a_late_result_after_an_abandon_is_taken():
    trials = started()
    trials.abandon(Abandon(config_id=0))
    assert trials.tell(ok()) is True


def test_what_was_asked_and_never_opened_leaves_no_trace():
    trials = make_trials()
    trials.propose(proposal(1))
    assert (trials.proposal_count, trials.started) == (1, [1])
    trials.retract()
    assert (trials.proposal_count, trials.started, trials.pending()) == (0, [], [])


def test_opening_is_idempotent_and_confirms():
    trials = make_trials()
    trials.propose(proposal())
    trials.open(proposal())
    trials.open(proposal())
    trials.retract()
    assert (trials.proposal_count, len(trials.pending())) == (1, 1)


def test_a_recorded_decision_is_a_fact_even_with_an_id_of_another_version():
    trials = make_trials()
    trials.open(proposal(7, config={"lr": 9.0}))
    trials.tell(ok(7, 1))
    assert trials.trial(7).config == {"lr": 9.0}
    trials.add([{"lr": 0.4}])
    assert trials.trial(8).config == {"lr": 0.4}


def test_scores_outside_zero_and_one_are_scaled_by_the_range():
    trials = make_trials(score_range=(-10.0, 30.0))
    trials.open(proposal())
    trials.tell(ok(0, 1, 10.0))
    assert trials.trial(0).scores == [0.5]
    assert trials.native(0.5) == 10.0


@pytest.mark.parametrize(
    ("max_fidelity", "step", "expected"),
    [
        (50, 1, (1, 3, 9, 27, 50)),
        (10, 1, (1, 3, 9, 10)),
        (9, 1, (1, 3, 9)),
        (1, 1, (1,)),
        (10, 2, (2, 4, 10)),
        (10, 10, (10,)),
        (7, 4, (4, 7)),
        (50, 4, (4, 12, 28, 50)),
    ],
)
def test_rungs_lie_on_the_grid_and_end_at_t(max_fidelity, step, expected):
    assert rungs(max_fidelity, step) == expected
    assert next_rung(0, max_fidelity, step) == expected[0]
    assert next_rung(expected[-1] - 1, max_fidelity, step) == max_fidelity


@pytest.mark.parametrize(
    ("t", "settings", "end"),
    [
        (0, {"wanted": 9}, 9),
        (0, {"wanted": 9, "steps_left": 2}, 2),
        (0, {"wanted": 9, "steps_per_job": 1}, 1),
        (4, {"wanted": 9, "steps_per_job": 3}, 7),
        (8, {"wanted": 9, "steps_per_job": 5}, 10),
        (3, {"wanted": 9, "steps_per_job": 1, "step": 2}, 4),
        (0, {"wanted": 400, "max_fidelity": 400}, 150),
        (0, {"wanted": 400, "max_fidelity": 400, "step": 40}, 120),
        (0, {"wanted": 400, "max_fidelity": 400, "step": 200}, 1),
    ],
)
def test_job_end(t, settings, end):
    trial = Trial(config_id=0, config={}, scores=[0.5] * t)
    assert job_end(trial, **{"max_fidelity": 10, "step": 1} | settings) == end


def test_budget_left():
    budget = BudgetView(total_seconds=10.0, spent_seconds=12.0, total_steps=5, spent_steps=2)
    assert (seconds_left(budget), steps_left(budget)) == (0.0, 3)
    assert (seconds_left(BudgetView()), steps_left(BudgetView())) == (None, None)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5], (1, 0.5)),
        ([0.5, 0.7], (2, 0.6)),
        ([0.1, 0.9, 0.2, 0.6, 0.6, 0.6], (6, 0.6)),
        ([0.6, 0.6, 0.6, 0.5], (3, 0.6)),
    ],
)
def test_the_incumbent_is_a_mean_not_the_luckiest_epoch(scores, expected):
    epoch, score = smoothed(scores)
    assert (epoch, score) == (expected[0], pytest.approx(expected[1]))


def test_best_observed_prefers_the_earlier_of_equals():
    trials = [Trial(config_id=i, config={}, scores=s) for i, s in enumerate(([0.2, 0.8], [0.8]))]
    best = best_observed(trials)
    assert (best.config_id, best.fidelity, best.score) == (0, 2, 0.8)
    assert best_observed([]) is None


@pytest.mark.parametrize(
    ("scores", "stagnating"),
    [
        ([0.0], False),
        ([0.0, 0.0], False),
        ([0.0, 0.0, 0.0], True),
        ([0.5, 0.1, 0.4], True),
        ([0.5, 0.1, 0.6], False),
        ([0.1, 0.2, 0.3, 0.4], False),
    ],
)
def test_patience_compares_with_its_own_best(scores, stagnating):
    assert is_stagnating(Trial(config_id=0, config={}, scores=scores), 2, 1e-3) is stagnating

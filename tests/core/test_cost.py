"""Seconds are predicted in seconds, and learned from the first result on."""

import numpy as np
import pytest

from qtt_core.cost import UNKNOWN_SECONDS, fit_cost
from qtt_core.encoding import build_encoder
from qtt_core.hub import load_hub
from qtt_core.pool import generator
from qtt_core.space import build_space
from qtt_core.testing.curves import ToyTask
from qtt_core.trials import Trial

HUB = load_hub("timm24")
SPACE = build_space("native", HUB, max_fidelity=10)
ENCODER = build_encoder(SPACE, HUB)


def make_trials(count, seed=0, seconds=None):
    configs = SPACE.sample(count, generator(seed, "test"))
    task = ToyTask(seed=0, hub=HUB, max_fidelity=10)
    return [
        Trial(
            config_id=i,
            config=config,
            seconds=list(task.curve(config).seconds[:2]) if seconds is None else [seconds],
        )
        for i, config in enumerate(configs)
    ]


def model_of(trials, overheads=()):
    rows = ENCODER([t.config for t in trials])
    return fit_cost(ENCODER, trials, rows, overheads)


def test_before_any_result_the_guess_is_moderate():
    fresh = [Trial(config_id=0, config=SPACE.default())]
    guess = model_of([]).epoch_seconds(fresh, ENCODER([SPACE.default()]))[0]
    assert UNKNOWN_SECONDS / 100 < guess < UNKNOWN_SECONDS * 100


def test_one_result_sets_the_scale_for_equal_configurations():
    config = SPACE.default()
    model = model_of([Trial(config_id=0, config=config, seconds=[1234.0])])
    twin = Trial(config_id=1, config=config)
    assert model.epoch_seconds([twin], ENCODER([config]))[0] == pytest.approx(1234.0, rel=0.05)


def test_a_started_configuration_costs_what_it_cost():
    trial = Trial(config_id=0, config=SPACE.default(), seconds=[9.0, 2.0, 2.2])
    assert model_of([trial]).epoch_seconds([trial], ENCODER([trial.config]))[0] == 2.2


def test_after_sixty_results_unseen_configurations_are_ranked_and_priced():
    model = model_of(make_trials(60))
    unseen = make_trials(200, seed=1)
    rows = ENCODER([t.config for t in unseen])
    true = np.log([np.median(t.seconds) for t in unseen])
    fresh = [Trial(config_id=t.config_id, config=t.config) for t in unseen]

    predicted = np.log(model.epoch_seconds(fresh, rows))

    ranks = np.corrcoef(np.argsort(np.argsort(true)), np.argsort(np.argsort(predicted)))[0, 1]
    assert ranks > 0.9
    assert np.median(np.abs(predicted - true)) < 0.3


def test_uncertainty_shrinks_with_results():
    rows = ENCODER([t.config for t in make_trials(50, seed=2)])
    assert model_of(make_trials(40)).deviation(rows).mean() < model_of([]).deviation(rows).mean()


def test_start_up_is_the_median_overhead():
    assert model_of(make_trials(3), [1.0, 50.0, 2.0]).startup_seconds == 2.0


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e6])
def test_extreme_seconds_stay_finite(seconds):
    model = model_of(make_trials(5, seconds=seconds))
    fresh = [Trial(config_id=0, config=SPACE.default())]
    assert np.isfinite(model.epoch_seconds(fresh, ENCODER([SPACE.default()]))).all()

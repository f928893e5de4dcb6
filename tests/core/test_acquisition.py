"""Log expected improvement against mpmath; incumbents on a hand-made table."""

import mpmath
import numpy as np
import pytest

from qtt_core.acquisition import (
    cooled,
    expected_improvement,
    incumbent_at,
    log_expected_improvement,
    log_h,
)
from qtt_core.trials import Trial


def reference(z):
    with mpmath.workdps(60):
        z = mpmath.mpf(z)
        return float(mpmath.log(mpmath.npdf(z) + z * mpmath.ncdf(z)))


@pytest.mark.parametrize(
    "z", [-1e4, -150.0, -100.1, -99.9, -40.0, -10.0, -3.0, -1.0001, -1.0, -0.5, 0.0, 2.0, 8.0]
)
def test_log_h_agrees_with_high_precision(z):
    assert log_h(np.array([z]))[0] == pytest.approx(reference(z), rel=1e-8, abs=1e-9)


def test_log_h_falls_steadily_where_the_direct_formula_is_zero():
    z = -np.logspace(0, 8, 400)
    values = log_h(z)
    assert np.all(np.isfinite(values))
    assert np.all(np.diff(values) < 0)


def test_expected_improvement_equals_monte_carlo():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.4, 0.2, 400_000)
    simulated = np.maximum(draws - 0.55, 0).mean()
    exact = expected_improvement(np.array([0.4]), np.array([0.2]), 0.55)[0]
    assert exact == pytest.approx(simulated, rel=0.02)


def test_zero_deviation_gives_the_plain_gain_or_nothing():
    values = log_expected_improvement(np.array([0.7, 0.5]), np.zeros(2), 0.6)
    assert np.exp(values[0]) == pytest.approx(0.1)
    assert values[1] < -1e6


def make_trial(config_id, *scores):
    return Trial(config_id=config_id, config={}, scores=list(scores))


TABLE = [make_trial(0, 0.3, 0.5, 0.4), make_trial(1, 0.6), make_trial(2)]


@pytest.mark.parametrize(
    ("rule", "fidelity", "best"),
    [
        ("qtt", 1, 0.6),
        ("qtt", 2, 0.6),
        ("qtt", 3, 0.6),
        ("dyhpo", 1, 0.6),
        ("dyhpo", 2, 0.5),
        ("dyhpo", 3, 0.4),
        ("dyhpo", 4, 0.6),
    ],
)
def test_incumbent_of_an_epoch(rule, fidelity, best):
    assert incumbent_at(TABLE, fidelity, rule) == best


def test_before_any_score_everything_is_an_improvement():
    assert incumbent_at([make_trial(0)], 1, "qtt") == -np.inf


@pytest.mark.parametrize(("share", "exponent"), [(0.0, 0.7), (0.5, 0.35), (1.0, 0.0), (1.4, 0.0)])
def test_the_cost_exponent_cools_with_the_budget(share, exponent):
    assert cooled(0.7, share) == pytest.approx(exponent)

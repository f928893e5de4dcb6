"""How far ahead a choice looks, by budget, workers and what is spent."""

import numpy as np
import pytest

from qtt_core.horizon import horizons, until_goal
from qtt_core.steps import BudgetView


@pytest.mark.parametrize(
    ("total", "spent", "workers", "expected"),
    [
        (100, 0, 1, 10),
        (100, 0, 4, 2.5),
        (100, 5, 1, 5),
        (100, 10, 1, 10),
        (100, 40, 2, 20),
        (100, 60, 1, 40),
        (100, 120, 1, 0),
    ],
)
def test_the_goal_is_a_tenth_of_the_budget_then_twice_what_is_spent(
    total, spent, workers, expected
):
    assert until_goal(max(0, total - spent), spent, workers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("t", "seconds", "budget", "expected"),
    [
        (0, 1.0, {}, 50),
        (0, 1.0, {"total_seconds": 1000}, 50),
        (0, 4.0, {"total_seconds": 1000}, 25),
        (0, 4.0, {"total_seconds": 1000, "workers": 2}, 12),
        (7, 4.0, {"total_seconds": 1000}, 32),
        (30, 4.0, {"total_seconds": 1000}, 50),
        (0, 40.0, {"total_seconds": 1000}, 3),
        (0, 40.0, {"total_seconds": 1000, "spent_seconds": 500}, 12),
        (3, 40.0, {"total_seconds": 1000, "spent_seconds": 970}, 3),
        (0, None, {"total_seconds": 1000}, 50),
        (0, None, {"total_steps": 400}, 40),
        (0, None, {"total_steps": 400, "workers": 40}, 3),
        (0, None, {"total_steps": 400, "spent_steps": 395}, 5),
        (0, 4.0, {"total_steps": 400, "total_seconds": 1000}, 25),
    ],
    ids=[
        "no limit", "whole trainings fit", "a tenth of the seconds", "shared by two workers",
        "from where it is", "never beyond T", "a twentieth of T at least", "half is left",
        "not one step fits", "seconds not known", "a tenth of the steps",
        "steps shared, a twentieth at least", "five steps are left", "the nearer limit",
    ],
)  # fmt: skip
def test_the_horizon_is_what_one_worker_reaches_by_the_next_goal(t, seconds, budget, expected):
    known = None if seconds is None else np.array([seconds])
    found = horizons(np.array([float(t)]), known, BudgetView(**budget), max_fidelity=50, step=1)
    assert found.tolist() == [expected]


def test_steps_of_several_epochs_end_at_their_multiples():
    found = horizons(
        np.array([0.0, 5.0, 10.0]), np.array([1.0, 1.0, 3.0]),
        BudgetView(total_seconds=200), max_fidelity=50, step=5,
    )  # fmt: skip
    assert found.tolist() == [20.0, 25.0, 15.0]


def test_a_training_that_is_never_interrupted_is_judged_by_its_end():
    found = horizons(
        np.array([0.0]), np.array([4.0]), BudgetView(total_seconds=1000, total_steps=400),
        max_fidelity=50, step=1, to_the_end=True,
    )  # fmt: skip
    assert found.tolist() == [50.0]

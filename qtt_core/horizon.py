"""How far ahead a choice looks: to the epoch that a configuration reaches by the next goal.

A search may be stopped at any time, and what it then recommends should be good. So a gain is wanted
soon: by a tenth of the budget, later by twice what is spent, by one worker of W. A configuration
that shows its worth later than that has its turn when the goal is further away.
"""

from __future__ import annotations

import math

import numpy as np

from qtt_core.encoding import Array
from qtt_core.steps import BudgetView
from qtt_core.trials import seconds_left, steps_left

FIRST, GROWTH = 0.1, 2.0
"""Of the budget; of what is spent."""
SHORTEST = 0.05
"""Of T, as an informed search trains at first: fewer epochs say nothing of a configuration."""


def until_goal(left: float, spent: float, workers: int) -> float:
    """What one worker may spend until the next goal, of what is left of a limit."""
    total = spent + left
    return max(0.0, min(total, max(FIRST * total, GROWTH * spent)) - spent) / max(1, workers)


def horizons(
    t: Array,
    epoch_seconds: Array | None,
    budget: BudgetView,
    *,
    max_fidelity: int,
    step: int,
    to_the_end: bool = False,
) -> Array:
    """The epoch at which each candidate is judged, (n,); t where not one step fits the budget.

    `t` (n,): epochs trained. `epoch_seconds` (n,): None = not known, seconds are not looked at.
    `to_the_end`: only the budget limits, for trainings that are never interrupted.
    """
    done = t // step
    shortest = math.inf if to_the_end else math.ceil(SHORTEST * max_fidelity / step)
    horizon = np.full(len(t), float(max_fidelity))
    steps, seconds = steps_left(budget), seconds_left(budget)
    if steps is not None:
        near = until_goal(steps, budget.spent_steps, budget.workers)
        horizon = np.minimum(horizon, (done + min(steps, max(math.ceil(near), shortest))) * step)
    if seconds is not None and epoch_seconds is not None:
        price = step * epoch_seconds
        near = until_goal(seconds, budget.spent_seconds, budget.workers)
        fits = np.minimum(np.floor(seconds / price), np.maximum(np.floor(near / price), shortest))
        horizon = np.minimum(horizon, (done + fits) * step)
    return np.asarray(np.maximum(horizon, t))

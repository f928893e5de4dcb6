"""What the default rule takes for a gain, and how a prior changes its stance."""

import numpy as np
import pytest

from qtt_core.policy import STANCES, to_beat
from qtt_core.steps import Outcome
from qtt_core.trials import Trial, rungs

FRESH, STARTED, PENDING, FAILED = "fresh", "started", "pending", "failed"


def trial(config_id, kind):
    return Trial(
        config_id=config_id, config={},
        scores=[0.5] if kind == STARTED else [],
        pending_to=3 if kind == PENDING else None,
        failure=Outcome.DIVERGED if kind == FAILED else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "mean", "best", "expected"),
    [
        ([FRESH, FRESH], [1.0, 2.0], 0.3, [0.3, 0.3]),
        ([FRESH, STARTED], [5.0, 1.0], 0.2, [1.0, 0.2]),
        ([FRESH, STARTED, STARTED], [5.0, 1.0, 2.0], 0.2, [2.0, 2.0, 1.0]),
        ([FRESH, PENDING, STARTED], [5.0, 3.0, 2.0], 0.2, [3.0, 2.0, 3.0]),
        ([FRESH, STARTED, FAILED], [5.0, 1.0, 9.0], 0.2, [1.0, 0.2, 1.0]),
        ([STARTED, STARTED], [1.0, 0.5], 4.0, [4.0, 4.0]),
        ([STARTED, STARTED], [1.0, 1.0], 0.0, [1.0, 1.0]),
    ],
    ids=[
        "nothing started", "half-trained, will be better", "the leader is measured by the next",
        "pending ones count", "failed ones do not", "the incumbent is ahead of all", "a tie",
    ],
)  # fmt: skip
def test_a_gain_is_what_going_on_with_the_best_would_not_bring(kinds, mean, best, expected):
    trials = [trial(i, kind) for i, kind in enumerate(kinds)]
    assert to_beat(trials, np.array(mean), best).tolist() == expected


def test_an_informed_search_trains_longer_at_first_and_relies_less_on_rules():
    cold, warm = STANCES[False], STANCES[True]
    assert rungs(50, 1, cold.first_rung(50)) == (1, 3, 9, 27, 50)
    assert rungs(50, 1, warm.first_rung(50)) == (3, 9, 27, 50)
    assert rungs(12, 1, warm.first_rung(12)) == (1, 3, 9, 12)
    assert rungs(2, 1, warm.first_rung(2)) == (1, 2)
    assert warm.safety_share > cold.safety_share

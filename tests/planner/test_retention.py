"""Which checkpoints stay, by policy."""

from __future__ import annotations

import pytest

from qtt_core.history import ConfigHistory, Standing
from qtt_core.ledger.events import Done
from qtt_core.retention import best_checkpoint, chosen, committed, final_garbage, garbage
from qtt_core.steps import Best, Recommendation

POINTS = {1: (1, 3, 6), 2: (2,), 3: (1, 2)}


def history(config: int, *scores: float) -> ConfigHistory:
    return ConfigHistory(
        config_id=config, config={"model": "m"}, standing=Standing.PAUSED,
        epochs=tuple(range(1, len(scores) + 1)), scores=scores, seconds=(1.0,) * len(scores),
    )  # fmt: skip


HISTORIES = {
    1: history(1, 0.1, 0.5, 0.9, 0.8, 0.8, 0.8),
    2: history(2, 0.3, 0.4),
    3: history(3, 0.6, 0.7),
}
BEST = Recommendation(
    config_id=1,
    fidelity=4,
    score=0.8,
    n_val=9,
    best_observed=Best(config_id=1, fidelity=3, score=0.9),
)


def test_one_checkpoint_per_ended_job_that_has_one() -> None:
    def done(c: str, to: int, state: str = "ok") -> Done:
        return Done(c=c, to=to, a=0, state=state, epochs=((to, 0.5, 1.0),), dev=1.0)

    events = [done("1", 3), done("2", 1, "diverged"), done("1", 6), done("1", 1)]
    assert committed(events) == {1: (1, 3, 6)}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("None", set()),
        ("Incumbent", {(1, 3)}),
        ("TopK", {(1, 3), (3, 2)}),
        ("All", {(1, 1), (1, 3), (1, 6), (2, 2), (3, 1), (3, 2)}),
    ],
)
def test_what_a_policy_keeps(policy: str, expected: set[tuple[int, int]]) -> None:
    assert chosen(policy, 2, HISTORIES, POINTS, BEST) == expected


def test_the_nearest_checkpoint_and_the_later_of_two() -> None:
    assert best_checkpoint((1, 3, 6), HISTORIES[1]) == 3
    assert best_checkpoint((2, 4), HISTORIES[1], wanted=3) == 4
    assert best_checkpoint((), HISTORIES[1]) is None


def test_the_newest_checkpoint_stays_while_the_run_goes_on() -> None:
    kept = chosen("Incumbent", 1, HISTORIES, POINTS, BEST)

    assert garbage(kept, POINTS, 1) == ("c1/f1",)
    assert garbage(kept, POINTS, 2) == ()
    assert final_garbage(kept, POINTS) == ("c1/f1", "c1/f6", "c2/f2", "c3/f1", "c3/f2")

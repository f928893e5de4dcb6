"""What a search knows, as arrays: encoded candidates, costs, and curves up to a given result.

Between the book (`trials`) and the models: optimizers read rows, cost model and observations here.
Caches are memos of pure functions; dropping them changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qtt_core.beliefs import Beliefs
from qtt_core.cost import CostModel, fit_cost
from qtt_core.encoding import Array, Encoder
from qtt_core.steps import Outcome
from qtt_core.surrogate import MAX_ROWS, Rows, Squash, squash_of
from qtt_core.trials import Trial, Trials

EARLY, LATE = 8, 32
"""Models are fitted anew at every 8th result up to 64, at every 32nd after (10-optimizer 7)."""
EARLY_UNTIL = 64


class Evidence:
    """Rows and cost model of one search."""

    def __init__(
        self, encoder: Encoder, metafeatures: Mapping[str, float], beliefs: Beliefs
    ) -> None:
        self.encoder, self.beliefs = encoder, beliefs
        self.squash = squash_of(metafeatures)
        self._rows: dict[int, Array] = {}
        self._costs: tuple[int, CostModel] | None = None

    def rows(self, trials: Sequence[Trial]) -> Array:
        """Encoded configurations, (n, D)."""
        missing = [trial for trial in trials if trial.config_id not in self._rows]
        for trial, row in zip(
            missing, self.encoder([trial.config for trial in missing]), strict=True
        ):
            self._rows[trial.config_id] = row
        width = len(self.encoder.columns)
        found = [self._rows[trial.config_id] for trial in trials]
        return np.array(found, dtype=np.float64).reshape(len(trials), width)

    def costs(self, trials: Trials) -> CostModel:
        """The cost model of everything told so far."""
        count = len(trials.told)
        if self._costs is None or self._costs[0] != count:
            started = [trial for trial in trials.all() if trial.seconds]
            model = fit_cost(
                self.encoder, started, self.rows(started), trials.overheads, self.beliefs
            )
            self._costs = (count, model)
        return self._costs[1]


def boundary(results: int) -> int:
    """The newest count of results, at most `results`, at which models are fitted; 0 = the prior."""
    step = EARLY if results < EARLY_UNTIL + LATE else LATE
    return results // step * step


def observed(trials: Trials, squash: Squash, upto: int | None = None) -> tuple[list[int], Rows]:
    """Ids of the configurations with curve points, by first result, and the points themselves.

    `upto` cuts history after that many results. A divergence counts as the worst score at the epoch
    that failed; configurations that ran out of memory have no point (10-optimizer 5.1).
    """
    points = points_of(trials, upto)
    ids = list(dict.fromkeys(config_id for config_id, _, _ in points))
    return ids, _as_rows(points, ids, squash)


def points_of(trials: Trials, upto: int | None = None) -> list[tuple[int, int, float]]:
    """(config_id, epoch, score) of every curve point to learn from, as told; at most MAX_ROWS."""
    points: list[tuple[int, int, float]] = []
    for told in trials.told[:upto]:
        trial = trials.trial(told.config_id)
        epochs = range(told.start + 1, told.stop + 1)
        points += [(told.config_id, epoch, trial.scores[epoch - 1]) for epoch in epochs]
        if told.outcome is Outcome.DIVERGED:
            points.append((told.config_id, trial.failed_at, 0.0))
    return _thinned(points)


def _thinned(points: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """At most MAX_ROWS points: every curve's last one first, then epochs on a doubling grid."""
    if len(points) <= MAX_ROWS:
        return points
    last = {config_id: epoch for config_id, epoch, _ in points}

    def rank(point: tuple[int, int, float]) -> tuple[int, int]:
        behind = last[point[0]] - point[1]
        on_grid = behind == 0 or behind & (behind - 1) == 0
        return (0 if behind == 0 else 1 if on_grid else 2, behind)

    kept = sorted(range(len(points)), key=lambda i: (rank(points[i]), -i))[:MAX_ROWS]
    return [points[i] for i in sorted(kept)]


def _as_rows(points: list[tuple[int, int, float]], ids: list[int], squash: Squash) -> Rows:
    position = {config_id: i for i, config_id in enumerate(ids)}
    u = squash.to_u(np.array([score for _, _, score in points]))
    return Rows(
        index=np.array([position[c] for c, _, _ in points], dtype=np.intp),
        epoch=np.array([epoch for _, epoch, _ in points], dtype=np.float64),
        u=u,
        noise=squash.noise(u),
    )

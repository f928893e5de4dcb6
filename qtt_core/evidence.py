"""What a search knows, as arrays: encoded candidates, costs, and curves up to a given result.

Between the book (`trials`) and the models: optimizers read rows, cost model and observations here.
Caches are memos of pure functions; dropping them changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qtt_core.beliefs import Beliefs
from qtt_core.cost import CostModel, fit_cost
from qtt_core.encoding import Array, Encoder
from qtt_core.steps import Config, Outcome
from qtt_core.surrogate import GRID, MAX_ROWS, Rows, Squash, squash_of
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
        self._memos: dict[str, dict[int, tuple[Config, Array]]] = {}
        self._costs: tuple[int, CostModel] | None = None

    def rows(self, trials: Sequence[Trial]) -> Array:
        """Encoded configurations, (n, D)."""
        found = self._known("rows", trials, self.encoder)
        return np.array(found, dtype=np.float64).reshape(len(trials), len(self.encoder.columns))

    def inputs(self, trials: Sequence[Trial]) -> Array:
        """What the curve process sees of configurations: their rows, then psi; (n, D + R)."""
        psi = self._known("transfer", trials, self.beliefs.transfer)
        rows = self.rows(trials)
        return rows if psi is None else np.hstack([rows, psi])

    def trend(self, trials: Sequence[Trial]) -> Array:
        """Mean course of each configuration before data, (n, G)."""
        found = self._known("trend", trials, self.beliefs.trend)
        return np.array(found, dtype=np.float64).reshape(len(trials), len(GRID))

    def believed_finish(self, trials: Sequence[Trial]) -> Array | None:
        """P(finish) before data, (n,); None: nothing is known."""
        return self._known("finish", trials, self.beliefs.finish)

    def epoch_seconds(self, trials: Trials, every: Sequence[Trial]) -> Array:
        """Seconds of one further epoch of each configuration, (n,), after everything told."""
        believed = self._believed_seconds(every)
        return self.costs(trials).epoch_seconds(every, self.rows(every), believed)

    def costs(self, trials: Trials) -> CostModel:
        """The cost model of everything told so far."""
        count = len(trials.told)
        if self._costs is None or self._costs[0] != count:
            started = [trial for trial in trials.all() if trial.seconds]
            model = fit_cost(
                self.encoder, started, self.rows(started), trials.overheads,
                self._believed_seconds(started), self.beliefs.seconds_sd,
            )  # fmt: skip
            self._costs = (count, model)
        return self._costs[1]

    def _believed_seconds(self, trials: Sequence[Trial]) -> Array | None:
        return self._known("seconds", trials, self.beliefs.log_seconds)

    def _known(
        self,
        name: str,
        trials: Sequence[Trial],
        compute: Callable[[Sequence[Config]], Array | None],
    ) -> Array | None:
        """A pure function of configurations, computed once for each; None where it knows nothing.

        Asked of all candidates at every ask: a prior's trees are too slow for that. An id may come
        to stand for another configuration, where a proposal was never opened.
        """
        memo = self._memos.setdefault(name, {})
        missing = [t for t in trials if memo.get(t.config_id, (None,))[0] is not t.config]
        if missing or not trials:
            fresh = compute([trial.config for trial in missing])
            if fresh is None or not trials:
                return fresh  # of nothing: it still has its columns
            memo |= {t.config_id: (t.config, row) for t, row in zip(missing, fresh, strict=True)}
        return np.array([memo[trial.config_id][1] for trial in trials])


def boundary(results: int) -> int:
    """The newest count of results, at most `results`, at which models are fitted; 0 = the prior."""
    step = EARLY if results < EARLY_UNTIL + LATE else LATE
    return results // step * step


def observed(
    trials: Trials, squash: Squash, upto: int | None = None, most: int = MAX_ROWS
) -> tuple[list[int], Rows]:
    """Ids of the configurations with curve points, by first result, and the points themselves.

    `upto` cuts history after that many results, `most` bounds the points. A divergence counts as
    the worst score at the epoch that failed; configurations that ran out of memory have no point
    (10-optimizer 5.1).
    """
    points = points_of(trials, upto, most)
    ids = list(dict.fromkeys(config_id for config_id, _, _ in points))
    return ids, _as_rows(points, ids, squash)


def points_of(
    trials: Trials, upto: int | None = None, most: int = MAX_ROWS
) -> list[tuple[int, int, float]]:
    """(config_id, epoch, score) of every curve point to learn from, as told; at most `most`."""
    points: list[tuple[int, int, float]] = []
    for told in trials.told[:upto]:
        trial = trials.trial(told.config_id)
        epochs = range(told.start + 1, told.stop + 1)
        points += [(told.config_id, epoch, trial.scores[epoch - 1]) for epoch in epochs]
        if told.outcome is Outcome.DIVERGED:
            points.append((told.config_id, trial.failed_at, 0.0))
    return _thinned(points, most)


def _thinned(points: list[tuple[int, int, float]], most: int) -> list[tuple[int, int, float]]:
    """At most so many points: every curve's last one first, then epochs on a doubling grid."""
    if len(points) <= most:
        return points
    last = {config_id: epoch for config_id, epoch, _ in points}

    def rank(point: tuple[int, int, float]) -> tuple[int, int]:
        behind = last[point[0]] - point[1]
        on_grid = behind == 0 or behind & (behind - 1) == 0
        return (0 if behind == 0 else 1 if on_grid else 2, behind)

    kept = sorted(range(len(points)), key=lambda i: (rank(points[i]), -i))[:most]
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

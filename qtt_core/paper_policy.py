"""The choice rule of the Quick-Tune paper: multi-fidelity expected improvement per cost, one step.

    x* = argmax EI_MF(x, t + step) / c(x, t + step)^gamma          (10-optimizer 1 and 4.3)

Kept faithful as reference and ablation; the product's rule is `policy`. Repaired: the horizon is an
input, unobserved epochs are masked, the price is in seconds, pending jobs are fantasised, and
patience compares with the configuration's own best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qtt_core.acquisition import incumbent_at, log_expected_improvement
from qtt_core.baselines import Choice, Stop, order
from qtt_core.deep_kernel import DeepKernel, Samples, Weights, curve_row, fit, start
from qtt_core.encoding import Array
from qtt_core.evidence import Evidence, boundary, points_of
from qtt_core.pool import generator
from qtt_core.steps import BudgetView, Options
from qtt_core.trials import Trial, Trials, is_stagnating

COST_FACTOR = 1.0
"""gamma of the paper."""
UCB_WEIGHT = 1.0


class QuickTunePaper:
    """One object per search; its memos follow the results."""

    defaults_first = False

    def __init__(
        self, evidence: Evidence, *, seed: int, options: Options, max_fidelity: int, incumbent: str
    ) -> None:
        self._evidence, self._seed, self._options = evidence, seed, options
        self._max_fidelity, self._incumbent = max_fidelity, incumbent
        columns = len(evidence.encoder.columns)
        self._start = start(columns, 2 * max_fidelity + 1, seed)
        self._fits: dict[int, Weights] = {}

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | Stop | None:
        """`init_random` configurations at random, then the argmax; one step of Δ each."""
        opened = len(trials.started)
        fresh = [
            t for t in order(trials, self._seed, "paper") if trials.is_trainable(t) and not t.t
        ]
        if opened < self._options.init_random and fresh:
            return self._choice(trials, fresh[0], f"random start {opened + 1}")
        options = self._options
        open_ = [
            t
            for t in trials.trainable()
            if not is_stagnating(t, options.patience, options.tolerance)
        ]
        if not open_:
            return Stop("exhausted")
        mean, sd = self._predict(trials, open_)
        value = self._acquisition(trials, open_, mean, sd)
        if options.cost_aware:
            gamma = COST_FACTOR if options.cost_factor is None else options.cost_factor
            seconds = self._evidence.epoch_seconds(trials, open_)
            value = value - gamma * np.log(seconds * trials.step)
        ids = np.array([t.config_id for t in open_])
        chosen = int(np.lexsort((ids, -mean, -value))[0])
        rule = f"{options.acquisition} of the next step for its cost"
        return self._choice(trials, open_[chosen], rule, float(mean[chosen]), float(sd[chosen]))

    def _choice(
        self,
        trials: Trials,
        trial: Trial,
        rule: str,
        mean: float | None = None,
        sd: float | None = None,
    ) -> Choice:
        end = self._next(trial, trials.step)
        return Choice(config_id=trial.config_id, fidelity_to=end, rule=rule, mean=mean, sd=sd)

    def _acquisition(self, trials: Trials, open_: Sequence[Trial], mean: Array, sd: Array) -> Array:
        """On a logarithmic scale, so that a price can be subtracted; (n,)."""
        kind = self._options.acquisition
        if kind == "EI":
            every = trials.all()
            ends = [self._next(t, trials.step) for t in open_]
            known = {end: incumbent_at(every, end, self._incumbent) for end in sorted(set(ends))}
            best = np.array([known[end] for end in ends])
            return log_expected_improvement(mean, sd, np.where(np.isfinite(best), best, 0.0))
        if kind == "UCB":
            score = mean + UCB_WEIGHT * sd
        elif kind == "Thompson":
            rng = generator(self._seed, "thompson", trials.proposal_count)
            score = mean + sd * rng.standard_normal(len(mean))
        else:
            score = mean
        return np.asarray(np.log(np.maximum(score, 1e-9)))

    def warm_up(self, trials: Trials) -> None:
        """Fit now what the next ask needs."""
        if len(trials.told) >= 2:
            self._weights(trials)

    def _next(self, trial: Trial, step: int) -> int:
        return min((trial.t // step + 1) * step, self._max_fidelity)

    def _predict(self, trials: Trials, open_: Sequence[Trial]) -> tuple[Array, Array]:
        points = points_of(trials)
        model = self._model(trials, points)
        pending = [t for t in trials.pending() if t.t < (t.pending_to or 0)]
        if pending:
            believed, _ = model.predict(
                self._samples(
                    pending, [t.scores for t in pending], [t.pending_to or 0 for t in pending]
                )
            )
            model = self._model(trials, points, pending, believed)
        ends = [self._next(t, trials.step) for t in open_]
        return model.predict(self._samples(open_, [t.scores for t in open_], ends))

    def _model(
        self,
        trials: Trials,
        points: Sequence[tuple[int, int, float]],
        pending: Sequence[Trial] = (),
        believed: Array | None = None,
    ) -> DeepKernel:
        samples, y = self._training(trials, points)
        if believed is not None:
            extra = self._samples(
                pending, [t.scores for t in pending], [t.pending_to or 0 for t in pending]
            )
            samples = Samples(
                np.vstack([samples.x, extra.x]), np.vstack([samples.curve, extra.curve])
            )
            y = np.concatenate([y, believed])
        return DeepKernel(self._weights(trials), samples, y)

    def _training(
        self, trials: Trials, points: Sequence[tuple[int, int, float]]
    ) -> tuple[Samples, Array]:
        known = [trials.trial(c) for c, _, _ in points]
        prefixes = [t.scores[: e - 1] for t, (_, e, _) in zip(known, points, strict=True)]
        samples = self._samples(known, prefixes, [e for _, e, _ in points])
        return samples, np.array([score for _, _, score in points])

    def _samples(
        self, trials: Sequence[Trial], prefixes: Sequence[Sequence[float]], ends: Sequence[int]
    ) -> Samples:
        curves = [
            curve_row(prefix, end, self._max_fidelity)
            for prefix, end in zip(prefixes, ends, strict=True)
        ]
        width = 2 * self._max_fidelity + 1
        return Samples(self._evidence.rows(trials), np.array(curves).reshape(len(curves), width))

    def _weights(self, trials: Trials) -> Weights:
        """Weights fitted to the history up to the newest boundary."""
        count, refit = len(trials.told), self._options.refit
        mark = 0 if refit == "Never" else count if refit == "Always" else boundary(count)
        if mark < 2:
            return self._start
        if mark not in self._fits:
            samples, y = self._training(trials, points_of(trials, mark))
            self._fits = {mark: fit(self._start, samples, y) if len(y) > 1 else self._start}
        return self._fits[mark]

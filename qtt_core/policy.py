"""Quick-Tune's choice: expected improvement of the score to come, chance to finish, cooled cost.

The rule behind `ask` of the default optimizer (10-optimizer 5.5, 5.6). It reads the book,
conditions the curve process on it, and scores every candidate at the epoch that it reaches by the
next goal (`horizon`). It must not remember anything that is not a memo of the told results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtt_core.acquisition import cooled, expected_improvement, log_expected_improvement
from qtt_core.baselines import Choice, Stop, promotion
from qtt_core.encoding import Array
from qtt_core.evidence import Evidence, boundary
from qtt_core.failure import probability_to_finish
from qtt_core.forecast import Forecaster
from qtt_core.horizon import horizons
from qtt_core.pool import generator, key
from qtt_core.space import SearchSpace
from qtt_core.steps import BudgetView, Options
from qtt_core.trials import (
    Trial,
    Trials,
    is_stagnating,
    next_rung,
    smoothed,
)


@dataclass(frozen=True, slots=True)
class Stance:
    """How far the model is trusted (10-optimizer 5.5, 5.6); figures in docs/optimizer.md."""

    cost_factor: float
    """alpha_0."""
    safety_share: int
    """Every so manieth ask follows ASHA's promotion rule: a wrong model costs little."""
    refit: bool
    """Whether scales are fitted to this data set; a prior's, learned on many, are better."""
    first_share: float
    """Of T, trained at once; a first epoch says little where a prior has spoken already."""

    def first_rung(self, max_fidelity: int) -> int:
        """Epochs of a first job at least."""
        return max(1, math.ceil(self.first_share * max_fidelity))


STANCES = {
    False: Stance(cost_factor=0.7, safety_share=3, refit=True, first_share=0.0),
    True: Stance(cost_factor=1.0, safety_share=6, refit=False, first_share=0.05),
}
"""By whether a meta-learned prior has spoken."""
MARGIN = math.log(1.1)
"""Going on with the configuration that just ran saves a restart: it may be 10 % worse."""
GROWTH, PARENTS = 12, 4
"""Mutations added at every boundary, and the best configurations they come from."""
GROWTH_LIMIT = 2
"""The pool grows to this many times its size at most."""


@dataclass(frozen=True, slots=True)
class Scored:
    """All candidates of one ask; arrays (n,) in the order of `trials`."""

    trials: Sequence[Trial]
    mean: Array
    sd: Array
    finish: Array
    epoch_seconds: Array
    horizon: Array
    best: float
    acquisition: Array


def to_beat(trials: Sequence[Trial], mean: Array, best: float) -> Array:
    """What each candidate must be better than to be a gain, (n,).

    The incumbent, or what going on with the best started configuration is expected to reach: a
    candidate that only beats a half-trained incumbent gains nothing. For that one itself: what the
    second best reaches. `mean` (n,): predictions at each horizon; `best`: the incumbent.
    """
    started = [i for i, t in enumerate(trials) if t.failure is None and (t.scores or t.pending_to)]
    bar = np.full(len(trials), best)
    if not started:
        return bar
    ranked = sorted(started, key=lambda i: (-mean[i], trials[i].config_id))
    bar[:] = max(best, float(mean[ranked[0]]))
    bar[ranked[0]] = max([best, *(float(mean[i]) for i in ranked[1:2])])
    return bar


class QuickTuneRule:
    """The default rule: one object per search; its memos follow the results."""

    defaults_first = True

    def __init__(
        self,
        space: SearchSpace,
        evidence: Evidence,
        *,
        seed: int,
        options: Options,
        fixed_pool: bool = False,
    ) -> None:
        self._space, self._evidence = space, evidence
        self._stance = STANCES[evidence.beliefs.informed]
        self._first_rung = self._stance.first_rung(space.max_fidelity)
        self._seed, self._options, self._fixed = seed, options, fixed_pool
        self.forecaster = Forecaster(
            evidence, seed=seed, max_fidelity=space.max_fidelity,
            refit=options.refit == "Always" or (options.refit == "Auto" and self._stance.refit),
        )  # fmt: skip

    # --- the choice --------------------------------------------------------------------------

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | Stop | None:
        """The trainable candidate with the highest acquisition, and the rung to train it to."""
        scored = self.score(trials, budget)
        open_ = self._open(trials, budget, scored)
        if not open_.any():
            fits = any(trials.is_trainable(t) for t in scored.trials)
            limited = budget.total_seconds is not None or budget.total_steps is not None
            return Stop("budget" if fits and limited else "exhausted")
        if self._gain_is_spent(scored, open_):
            return Stop("gain")
        share = self._stance.safety_share
        if trials.proposal_count % share == share - 1:
            promoted = promotion(trials, self._first_rung)
            if promoted is not None and open_[self._place(scored, promoted.config_id)]:
                return self._explained(trials, scored, promoted.config_id, promoted.rule)
        order = self._order(scored, open_)
        chosen, rule = order[0], "highest expected gain for its cost"
        running = self._continued(trials, scored, open_)
        if (
            running is not None
            and scored.acquisition[running] >= scored.acquisition[chosen] - MARGIN
        ):
            chosen, rule = (
                running,
                rule if running == chosen else "goes on: within 10 % of the best",
            )
        return self._explained(trials, scored, scored.trials[chosen].config_id, rule)

    def score(self, trials: Trials, budget: BudgetView) -> Scored:
        """Predictions and acquisition of every candidate."""
        every = trials.all()
        rows = self._evidence.rows(every)
        costs = self._evidence.costs(trials)
        seconds = self._evidence.epoch_seconds(trials, every)
        known = self._options.cost_aware and costs.measured > 0
        horizon = horizons(
            np.array([trial.t for trial in every], dtype=np.float64), seconds if known else None,
            budget, max_fidelity=trials.max_fidelity, step=trials.step,
            to_the_end=not self._options.grey_box,
        )  # fmt: skip
        mean, sd, best = self.forecaster.predict(trials, every, horizon)
        ran = [i for i, t in enumerate(every) if t.scores or t.failure is not None]
        finish = probability_to_finish(
            self._evidence.encoder, [every[i] for i in ran], rows[ran], rows,
            believed=self._evidence.believed_finish(every),
        )  # fmt: skip
        bar = to_beat(every, mean, best)
        acquisition = log_expected_improvement(mean, sd, bar) + np.log(finish)
        if self._options.cost_aware:
            remaining = np.maximum(horizon - np.array([t.t for t in every]), 1)
            spending = costs.startup_seconds + seconds * remaining
            acquisition = acquisition - self._alpha(budget) * np.log(np.maximum(spending, 1e-9))
        return Scored(every, mean, sd, finish, seconds, horizon, best, acquisition)

    def _alpha(self, budget: BudgetView) -> float:
        factor = self._options.cost_factor
        shares = [0.0]
        if budget.total_seconds:
            shares.append(budget.spent_seconds / budget.total_seconds)
        if budget.total_steps:
            shares.append(budget.spent_steps / budget.total_steps)
        return cooled(self._stance.cost_factor if factor is None else factor, max(shares))

    def _open(self, trials: Trials, budget: BudgetView, scored: Scored) -> NDArray[np.bool_]:
        """Candidates that may be proposed: trainable, within the budget, not stagnating."""
        predicted = self._evidence.squash.to_score(scored.mean)
        return np.array(
            [
                trials.is_trainable(trial)
                and scored.horizon[i] > trial.t
                and not self._is_stagnating(trial, float(predicted[i]))
                for i, trial in enumerate(scored.trials)
            ],
            dtype=bool,
        )

    def _is_stagnating(self, trial: Trial, predicted: float) -> bool:
        """No gain for `patience` epochs, and none predicted either."""
        tolerance = self._options.tolerance
        return (
            is_stagnating(trial, self._options.patience, tolerance)
            and predicted < max(trial.scores) + tolerance
        )

    def _gain_is_spent(self, scored: Scored, open_: NDArray[np.bool_]) -> bool:
        """Whether no candidate promises the user's minimum gain per GPU-hour."""
        threshold = self._options.min_gain_per_gpu_hour
        if threshold is None or not any(trial.scores for trial in scored.trials):
            return False
        slope = float(self._evidence.squash.slope(np.array([scored.best]))[0])
        gain = slope * expected_improvement(scored.mean, scored.sd, scored.best)
        epochs = np.maximum(scored.horizon - np.array([t.t for t in scored.trials]), 1)
        rates = gain * scored.finish / (scored.epoch_seconds * epochs / 3600)
        return bool(np.max(rates[open_]) < threshold)

    def _order(self, scored: Scored, open_: NDArray[np.bool_]) -> list[int]:
        """Positions of open candidates, best first; ties: higher mean, lower cost, smaller id."""
        cost = scored.epoch_seconds if self._options.cost_aware else np.zeros(len(scored.mean))
        order = np.lexsort((np.arange(len(cost)), cost, -scored.mean, -scored.acquisition))
        return [int(i) for i in order if open_[i]]

    def _continued(self, trials: Trials, scored: Scored, open_: NDArray[np.bool_]) -> int | None:
        """Position of the configuration whose result came last, if it may go on."""
        if not trials.told:
            return None
        place = self._place(scored, trials.told[-1].config_id)
        return place if open_[place] else None

    def _place(self, scored: Scored, config_id: int) -> int:
        return next(i for i, t in enumerate(scored.trials) if t.config_id == config_id)

    def _explained(self, trials: Trials, scored: Scored, config_id: int, rule: str) -> Choice:
        place = self._place(scored, config_id)
        trial = scored.trials[place]
        squash, u = self._evidence.squash, scored.mean[place]
        mean = float(squash.to_score(u))
        rank = int(np.sum(scored.acquisition > scored.acquisition[place])) + 1
        end = next_rung(trial.t, trials.max_fidelity, trials.step, self._first_rung)
        if not self._options.grey_box:
            end = trials.max_fidelity
        return Choice(
            config_id=config_id,
            fidelity_to=int(min(end, max(scored.horizon[place], trial.t + 1))),
            rule=rule,
            mean=mean,
            sd=float(squash.slope(u) * scored.sd[place]),
            p_finish=float(scored.finish[place]),
            rank=rank,
            pool=len(scored.trials),
        )

    # --- the model ---------------------------------------------------------------------------

    def warm_up(self, trials: Trials) -> None:
        """Fit now what the next ask needs."""
        self.forecaster.warm_up(trials)

    def forecast(self, trials: Trials, trial: Trial, epochs: Sequence[int]) -> tuple[Array, Array]:
        """Mean and epistemic deviation of the score at further epochs of one configuration."""
        if not epochs:
            return np.empty(0), np.empty(0)
        u, sd = self.forecaster.forecast(trials, trial, epochs)
        return self._evidence.squash.to_score(u), self._evidence.squash.slope(u) * sd

    def standing(self, trials: Trials) -> list[tuple[float, int, int]]:
        """(score, configuration, epoch) of what was trained, as the model believes it to be.

        The posterior mean instead of the measured score: neither one lucky epoch wins, nor does a
        flat curve win over one that still rises (10-optimizer 5.7).
        """
        standing = self.forecaster.standing(trials)
        believed = self._evidence.squash.to_score(np.array([u for u, _, _ in standing]))
        return [
            # logits are cut off at chance and at what n_val resolves; measured scores are not
            (min(max(float(score), min(trial.scores)), max(trial.scores)), trial.config_id, epoch)
            for score, (_, trial, epoch) in zip(believed, standing, strict=True)
        ]

    # --- the pool ------------------------------------------------------------------------------

    def grow(self, trials: Trials) -> None:
        """After a result: at boundaries, add mutations of the best configurations to the pool."""
        count = len(trials.told)
        if self._fixed or count != boundary(count):
            return
        every = trials.all()
        if len(every) >= self._options.pool_size * GROWTH_LIMIT:
            return
        ran = sorted(
            (t for t in every if t.scores), key=lambda t: (-smoothed(t.scores)[1], t.config_id)
        )
        rng = generator(self._seed, "grow", count)
        seen = {key(t.config) for t in every}
        for parent in ran[:PARENTS]:
            for config in self._space.neighbours(parent.config, rng, GROWTH // PARENTS):
                if key(config) not in seen:
                    seen.add(key(config))
                    trials.add([config])

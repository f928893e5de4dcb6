"""Quick-Tune's choice: expected improvement of the final score, chance to finish, cooled cost.

The rule behind `ask` of the default optimizer (10-optimizer 5.5, 5.6). It reads the book,
conditions the curve process on it, and scores every candidate at the horizon it can still reach.
It must not remember anything that is not a memo of the told results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtt_core.acquisition import cooled, expected_improvement, log_expected_improvement
from qtt_core.baselines import Choice, Stop, promotion
from qtt_core.encoding import Array
from qtt_core.evidence import Evidence, boundary, observed
from qtt_core.failure import probability_to_finish
from qtt_core.fitting import fit
from qtt_core.hub import Hub
from qtt_core.pool import generator, key
from qtt_core.space import SearchSpace
from qtt_core.steps import BudgetView, Options
from qtt_core.surrogate import (
    CurveModel,
    Parameters,
    Rows,
    config_kernel,
    groups_of,
    prior_parameters,
)
from qtt_core.trials import (
    Trial,
    Trials,
    is_stagnating,
    next_rung,
    seconds_left,
    smoothed,
    steps_left,
)

COST_FACTOR = 0.7
"""alpha_0 of 10-optimizer 5.5."""
SAFETY_SHARE = 3
"""Every third ask follows ASHA's promotion rule: a wrong model costs little (10-optimizer 5.6)."""
MARGIN = math.log(1.1)
"""Going on with the configuration that just ran saves a restart: it may be 10 % worse."""
MIN_RESULTS = 8
"""Before as many results, parameters are the prior's."""
RISE_PER_E_FOLD = 0.4
"""Prior: logits won when training is e times as long."""
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


class QuickTune:
    """The default rule: one object per search; its memos follow the results."""

    defaults_first = True

    def __init__(
        self,
        space: SearchSpace,
        evidence: Evidence,
        *,
        seed: int,
        hub: Hub | None,
        options: Options,
        fixed_pool: bool = False,
    ) -> None:
        self._space, self._evidence, self._seed, self._options = space, evidence, seed, options
        self._fixed = fixed_pool
        self._hub = hub
        self._names, self._member = groups_of(evidence.encoder)
        self._prior = prior_parameters(evidence.encoder, seed)
        self._rise = RISE_PER_E_FOLD * math.log(max(space.max_fidelity, 1))
        self._fits: dict[int, Parameters] = {0: self._prior}
        self._cross: dict[tuple[int, int, int], Array] = {}

    # --- the choice --------------------------------------------------------------------------

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | Stop | None:
        """The trainable candidate with the highest acquisition, and the rung to train it to."""
        scored = self.score(trials, budget)
        open_ = self._open(trials, budget, scored)
        if not open_.any():
            fits = any(trials.is_trainable(t) for t in scored.trials)
            return Stop("budget" if fits and self._limited(budget) else "exhausted")
        if self._gain_is_spent(scored, open_):
            return Stop("gain")
        if trials.proposal_count % SAFETY_SHARE == SAFETY_SHARE - 1:
            promoted = promotion(trials)
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
        seconds = costs.epoch_seconds(every, rows)
        horizon = self._horizons(trials, every, seconds, budget, costs.measured > 0)
        mean, sd, best = self._predict(trials, every, rows, horizon)
        ran = [i for i, t in enumerate(every) if t.scores or t.failure is not None]
        finish = probability_to_finish(
            self._evidence.encoder, [every[i] for i in ran], rows[ran], rows
        )
        acquisition = log_expected_improvement(mean, sd, best) + np.log(finish)
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
        return cooled(COST_FACTOR if factor is None else factor, max(shares))

    def _limited(self, budget: BudgetView) -> bool:
        return budget.total_seconds is not None or budget.total_steps is not None

    def _horizons(
        self,
        trials: Trials,
        every: Sequence[Trial],
        seconds: Array,
        budget: BudgetView,
        measured: bool,
    ) -> Array:
        """Epoch that each candidate can still reach (10-optimizer 5.5); t if not one step fits."""
        t = np.array([trial.t for trial in every], dtype=np.float64)
        step = trials.step
        horizon = np.full(len(every), float(trials.max_fidelity))
        left = steps_left(budget)
        if left is not None:
            horizon = np.minimum(horizon, (t // step + left) * step)
        remaining = seconds_left(budget)
        if remaining is not None and self._options.cost_aware and measured:
            fits = np.floor(remaining / (step * seconds))
            horizon = np.minimum(horizon, (t // step + fits) * step)
        return np.asarray(np.maximum(horizon, t))

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
        end = next_rung(trial.t, trials.max_fidelity, trials.step)
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
        self._parameters(trials)

    def forecast(self, trials: Trials, trial: Trial, epochs: Sequence[int]) -> tuple[Array, Array]:
        """Mean and epistemic deviation of the score at further epochs of one configuration."""
        if not epochs:
            return np.empty(0), np.empty(0)
        every = [trial] * len(epochs)
        rows = self._evidence.rows(every)
        u, sd, _ = self._predict(trials, every, rows, np.array(epochs, dtype=np.float64))
        return self._evidence.squash.to_score(u), self._evidence.squash.slope(u) * sd

    def standing(self, trials: Trials) -> list[tuple[float, int, int]]:
        """(score, configuration, epoch) of what was trained, as the model believes it to be.

        The posterior mean instead of the measured score: neither one lucky epoch wins, nor does a
        flat curve win over one that still rises (10-optimizer 5.7).
        """
        mark, parameters = self._parameters(trials)
        ids, points = observed(trials, self._evidence.squash)
        known = [trials.trial(c) for c in ids]
        level = self.prior_level(known)
        model = self._model(parameters, self._evidence.rows(known), level, points)
        place = {t.config_id: i for i, t in enumerate(known)}
        standing = self._standing(model, known, level, mark, place)
        believed = self._evidence.squash.to_score(np.array([u for u, _, _ in standing]))
        return [
            # logits are cut off at chance and at what n_val resolves; measured scores are not
            (min(max(float(score), min(trial.scores)), max(trial.scores)), trial.config_id, epoch)
            for score, (_, trial, epoch) in zip(believed, standing, strict=True)
        ]

    def _predict(
        self, trials: Trials, every: Sequence[Trial], rows: Array, horizon: Array
    ) -> tuple[Array, Array, float]:
        """Mean and deviation of u at each horizon, and the noise-aware incumbent, in u."""
        mark, parameters = self._parameters(trials)
        ids, points = observed(trials, self._evidence.squash)
        pending = [t for t in trials.pending() if t.t < (t.pending_to or 0)]
        known = [trials.trial(c) for c in ids]
        known += [t for t in pending if t.config_id not in set(ids)]
        level = self.prior_level(known)
        x = self._evidence.rows(known)
        model = self._model(parameters, x, level, points)
        place = {t.config_id: i for i, t in enumerate(known)}
        reached = self._standing(model, known, level, mark, place)
        best = max((u for u, _, _ in reached), default=-math.inf)
        if pending:
            model = self._fantasised(model, parameters, known, level, points, mark, pending, place)
        identity = np.array([place.get(t.config_id, -1) for t in every], dtype=np.intp)
        kx = self._kernel(parameters, mark, known, every, rows)
        mean, sd = model.predict(
            kx, identity, self.prior_level(every), self._diagonal(parameters, every), horizon
        )
        if not len(points.u):
            best = float(np.min(mean))  # nothing to beat yet: rank by mean and price
        return mean, sd, best

    def _model(self, parameters: Parameters, x: Array, level: Array, points: Rows) -> CurveModel:
        return CurveModel(
            parameters, self._member, self._space.max_fidelity, self._rise, x, level, points
        )

    def _standing(
        self,
        model: CurveModel,
        known: Sequence[Trial],
        level: Array,
        mark: int,
        place: Mapping[int, int],
    ) -> list[tuple[float, Trial, int]]:
        """(posterior mean of u, configuration, epoch) where training has been: noise taken out.

        The epochs asked about are each curve's last and the middle of its best stretch.
        """
        ran = [t for t in known if t.scores]
        at = [(t, epoch) for t in ran for epoch in sorted({t.t, smoothed(t.scores)[0]})]
        trials = [t for t, _ in at]
        if not trials:
            return []
        index = np.array([place[t.config_id] for t in trials], dtype=np.intp)
        kx = self._kernel(model.parameters, mark, known, trials, self._evidence.rows(trials))
        diagonal = self._diagonal(model.parameters, trials)
        epochs = np.array([epoch for _, epoch in at], dtype=np.float64)
        mean, _ = model.predict(kx, index, level[index], diagonal, epochs)
        return [(float(u), trial, epoch) for u, (trial, epoch) in zip(mean, at, strict=True)]

    def _fantasised(
        self,
        model: CurveModel,
        parameters: Parameters,
        known: Sequence[Trial],
        level: Array,
        points: Rows,
        mark: int,
        pending: Sequence[Trial],
        place: Mapping[int, int],
    ) -> CurveModel:
        """The model as if pending jobs had shown their predicted mean (kriging believer)."""
        index = np.array([place[t.config_id] for t in pending], dtype=np.intp)
        epoch = np.array([t.pending_to for t in pending], dtype=np.float64)
        kx = self._kernel(parameters, mark, known, pending, self._evidence.rows(pending))
        diagonal = self._diagonal(parameters, pending)
        u, _ = model.predict(kx, index, level[index], diagonal, epoch)
        rows = Rows(
            index=np.concatenate([points.index, index]),
            epoch=np.concatenate([points.epoch, epoch]),
            u=np.concatenate([points.u, u]),
            noise=np.concatenate([points.noise, self._evidence.squash.noise(u)]),
        )
        return self._model(parameters, model.x, level, rows)

    def _parameters(self, trials: Trials) -> tuple[int, Parameters]:
        """(boundary, parameters fitted to the history up to it)."""
        mark = 0 if self._options.refit == "Never" else boundary(len(trials.told))
        if mark < MIN_RESULTS:
            mark = 0
        if mark not in self._fits:
            ids, points = observed(trials, self._evidence.squash, mark)
            known = [trials.trial(c) for c in ids]
            parameters = self._prior
            if len(known) > 1:
                parameters = fit(
                    self._prior,
                    self._member,
                    self._evidence.rows(known),
                    self.prior_level(known),
                    points,
                    max_fidelity=self._space.max_fidelity,
                    rise=self._rise,
                )
            self._fits = {0: self._prior, mark: parameters}
            self._cross.clear()
        return mark, self._fits[mark]

    def _kernel(
        self,
        parameters: Parameters,
        mark: int,
        known: Sequence[Trial],
        every: Sequence[Trial],
        rows: Array,
    ) -> Array:
        """k(x, x') between known configurations and candidates, (c, n); rows are kept as memos."""
        if len(every) < 64:
            return config_kernel(parameters, self._member, self._evidence.rows(known), rows)
        missing = [t for t in known if (mark, len(every), t.config_id) not in self._cross]
        if missing:
            fresh = config_kernel(parameters, self._member, self._evidence.rows(missing), rows)
            for trial, row in zip(missing, fresh, strict=True):
                self._cross[mark, len(every), trial.config_id] = row
        found = [self._cross[mark, len(every), t.config_id] for t in known]
        return np.array(found).reshape(len(known), len(every))

    def _diagonal(self, parameters: Parameters, every: Sequence[Trial]) -> Array:
        return np.full(len(every), parameters.deep + float(parameters.groups.sum()))

    # --- beliefs before data -------------------------------------------------------------------

    def prior_level(self, every: Sequence[Trial]) -> Array:
        """Prior mean of u at T, (n,): model card and rules of thumb; flat without meta-learning."""
        if not self._options.meta_learning:
            return np.zeros(len(every))
        accuracy = {card.name: card.accuracy for card in (self._hub.cards if self._hub else ())}
        known = [value for value in accuracy.values() if value is not None]
        middle = sorted(known)[len(known) // 2] if known else 0.0
        return np.array([_rule_of_thumb(t.config, accuracy, middle) for t in every])

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


def _rule_of_thumb(
    config: Mapping[str, object], accuracy: Mapping[str, float | None], middle: float
) -> float:
    """Logits that a card and common sense are worth.

    Learning rate and optimizer: the means by value over the public Quick-Tune micro runs
    (10-optimizer 10), as a parabola in log10 lr and an offset for plain SGD.
    """
    level = 0.5
    card = accuracy.get(str(config.get("model")))
    if card is not None:
        level += 5.0 * (card - middle)
    lr = config.get("lr")
    if isinstance(lr, float | int) and lr > 0:
        level -= 0.4 * (math.log10(lr) + 3.1) ** 2
    if config.get("opt") == "sgd":
        level -= 0.5
    return level

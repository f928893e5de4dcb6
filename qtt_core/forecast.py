"""The curve process on one search: fitted at fixed counts of results, conditioned on all of them.

Between the process (`surrogate`) and the choice (`policy`). It remembers nothing but memos of pure
functions of the told results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qtt_core.encoding import Array
from qtt_core.evidence import Evidence, boundary, observed
from qtt_core.fitting import Curves, fit
from qtt_core.surrogate import (
    CurveModel,
    Parameters,
    Rows,
    config_kernel,
    groups_of,
    prior_variance,
)
from qtt_core.trials import Trial, Trials, smoothed

MIN_RESULTS = 8
"""Before as many results, parameters are the prior's."""
FIT_ROWS = 256
"""Points that parameters are fitted to at most: a fit takes their third power, and neighbouring
epochs say the same."""
OPENING = 0.75
"""Nothing to beat yet: that quantile of the candidates' predictions. Against the worst of them all
gains are alike, and price alone decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioned:
    """The process given everything told: what it was fitted to, and on whom it rests."""

    mark: int
    settled: frozenset[int]
    """Configurations with results up to the mark."""
    parameters: Parameters
    known: Sequence[Trial]
    trend: Array
    model: CurveModel

    @property
    def place(self) -> dict[int, int]:
        """Configuration -> its index in `known`."""
        return {trial.config_id: i for i, trial in enumerate(self.known)}


class Forecaster:
    """Asked for the score that each configuration will have reached at an epoch."""

    def __init__(self, evidence: Evidence, *, seed: int, max_fidelity: int, refit: bool) -> None:
        self._evidence, self._refit = evidence, refit
        self._max_fidelity = max_fidelity
        _, self._member = groups_of(evidence.encoder)
        self._prior = evidence.beliefs.parameters(evidence.encoder, seed)
        self._fits: dict[int, Parameters] = {0: self._prior}
        self._cross: dict[tuple[int, int, int], Array] = {}  # (mark, candidates, configuration)

    def warm_up(self, trials: Trials) -> None:
        """Fit now what the next ask needs."""
        self._parameters(trials)

    def forecast(self, trials: Trials, trial: Trial, epochs: Sequence[int]) -> tuple[Array, Array]:
        """Mean and epistemic deviation of u at further epochs of one configuration.

        Of what was told alone: a pending job's expected result would make it look too sure. And
        wider than the deviations that choices rest on, so that 80 % intervals hold 80 %.
        """
        state = self._conditioned(trials, ())
        kx = np.repeat(self._columns(state, [trial]), len(epochs), axis=1)
        asked = np.array(epochs, dtype=np.float64)
        mean, sd = self._ask(state, kx, [trial] * len(epochs), asked)
        return mean, self._evidence.beliefs.spread * sd

    def standing(self, trials: Trials) -> list[tuple[float, Trial, int]]:
        """(posterior mean of u, configuration, epoch) where training has been: noise taken out.

        The epochs asked about are each curve's last and the middle of its best stretch.
        """
        return self._standing(self._conditioned(trials, ()))

    def predict(
        self, trials: Trials, every: Sequence[Trial], horizon: Array
    ) -> tuple[Array, Array, float]:
        """Mean and deviation of u at each horizon, and the noise-aware incumbent, in u.

        `every`: all candidates, in their order.
        """
        pending = [t for t in trials.pending() if t.t < (t.pending_to or 0)]
        state = self._conditioned(trials, pending)
        best = max((u for u, _, _ in self._standing(state)), default=-math.inf)
        if pending:
            state = self._fantasised(state, pending)
        mean, sd = self._ask(state, self._kernel(state, every), every, horizon)
        if not len(state.model.rows.u):
            best = float(np.quantile(mean, OPENING))
        return mean, sd, best

    # --- parts -------------------------------------------------------------------------------

    def _conditioned(self, trials: Trials, pending: Sequence[Trial]) -> Conditioned:
        mark, parameters = self._parameters(trials)
        ids, points = observed(trials, self._evidence.squash)
        known = [trials.trial(c) for c in ids]
        known += [t for t in pending if t.config_id not in set(ids)]
        trend = self._evidence.trend(known)
        model = CurveModel(
            parameters, self._member, self._max_fidelity, self._evidence.inputs(known), trend,
            points,
        )  # fmt: skip
        settled = frozenset(told.config_id for told in trials.told[:mark])
        return Conditioned(
            mark=mark,
            settled=settled,
            parameters=parameters,
            known=known,
            trend=trend,
            model=model,
        )

    def _ask(
        self, state: Conditioned, kx: Array, every: Sequence[Trial], epochs: Array
    ) -> tuple[Array, Array]:
        """`kx` (c, n): k between the known configurations and those asked about."""
        place = state.place
        identity = np.array([place.get(t.config_id, -1) for t in every], dtype=np.intp)
        diagonal = prior_variance(state.parameters, self._evidence.inputs(every))
        return state.model.predict(kx, identity, self._evidence.trend(every), diagonal, epochs)

    def _standing(self, state: Conditioned) -> list[tuple[float, Trial, int]]:
        ran = [t for t in state.known if t.scores]
        at = [(t, epoch) for t in ran for epoch in sorted({t.t, smoothed(t.scores)[0]})]
        if not at:
            return []
        epochs = np.array([epoch for _, epoch in at], dtype=np.float64)
        asked = [t for t, _ in at]
        mean, _ = self._ask(state, self._columns(state, asked), asked, epochs)
        return [(float(u), trial, epoch) for u, (trial, epoch) in zip(mean, at, strict=True)]

    def _fantasised(self, state: Conditioned, pending: Sequence[Trial]) -> Conditioned:
        """As if pending jobs had shown their predicted mean (kriging believer)."""
        place = state.place
        index = np.array([place[t.config_id] for t in pending], dtype=np.intp)
        epoch = np.array([t.pending_to for t in pending], dtype=np.float64)
        u, _ = self._ask(state, self._columns(state, pending), pending, epoch)
        more = Rows(index=index, epoch=epoch, u=u, noise=self._evidence.squash.noise(u))
        return replace(state, model=state.model.extended(more))

    def _parameters(self, trials: Trials) -> tuple[int, Parameters]:
        """(boundary, parameters fitted to the history up to it)."""
        mark = boundary(len(trials.told)) if self._refit else 0
        if mark < MIN_RESULTS:
            mark = 0
        if mark not in self._fits:
            ids, points = observed(trials, self._evidence.squash, mark, FIT_ROWS)
            known = [trials.trial(c) for c in ids]
            parameters = self._prior
            if len(known) > 1:
                curves = Curves(
                    x=self._evidence.inputs(known), trend=self._evidence.trend(known), rows=points
                )
                parameters = fit(
                    self._prior, self._member, [curves], max_fidelity=self._max_fidelity
                )
            self._fits = {0: self._prior, mark: parameters}
            self._cross.clear()
        return mark, self._fits[mark]

    def _columns(self, state: Conditioned, asked: Sequence[Trial]) -> Array:
        """k(x, x') between known configurations and a few, known or not; (c, n)."""
        place, rows = state.place, self._evidence.inputs
        if all(t.config_id in place for t in asked):
            return state.model.own[:, [place[t.config_id] for t in asked]]
        return config_kernel(state.parameters, self._member, rows(state.known), rows(asked))

    def _kernel(self, state: Conditioned, every: Sequence[Trial]) -> Array:
        """k(x, x') between known configurations and all candidates, (c, n); kept over asks."""
        rows, known = self._evidence.inputs, state.known
        width = len(every)
        missing = [t for t in known if (state.mark, width, t.config_id) not in self._cross]
        for together in self._batches(missing, state.settled):
            fresh = config_kernel(state.parameters, self._member, rows(together), rows(every))
            for trial, row in zip(together, fresh, strict=True):
                self._cross[state.mark, width, trial.config_id] = row
        found = [self._cross[state.mark, width, t.config_id] for t in known]
        return np.array(found).reshape(len(known), width)

    def _batches(self, missing: Sequence[Trial], settled: frozenset[int]) -> list[Sequence[Trial]]:
        """Those the boundary knew at once, later ones singly: the same in a search and its replay.

        BLAS rounds by shape, and a replay finds all of them missing together.
        """
        old = [t for t in missing if t.config_id in settled]
        late = [t for t in missing if t.config_id not in settled]
        return [*([old] if old else []), *([t] for t in late)]

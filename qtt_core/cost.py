"""What an epoch of a configuration costs: Bayesian linear regression on log-seconds.

Read by the acquisition (price), by the deadline rule and as the reservation of a proposal. Works in
log-seconds throughout: the public tool z-scored seconds, never inverted them and clipped at 1e-6
(10-optimizer 11, defect 2).

    X   (n, D)   encoded configurations          w ~ N(m, diag(v))   weights, prior by column
    y   (n,)     log of median epoch seconds     y = X w + b + e,    e ~ N(0, NOISE)

    cov = (diag(1/v) + X'X / NOISE)^-1           mean = cov (m/v + X'y / NOISE)

Source: Bishop, Pattern Recognition and Machine Learning, equations 3.50 and 3.51.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from qtt_core.encoding import Array, Encoder
from qtt_core.trials import Trial

NOISE = 0.15**2
"""Variance of log-seconds between equal configurations: other load, other nodes."""

UNKNOWN_SECONDS = 5.0
"""Seconds of an epoch before anything was measured; one result moves it where it belongs."""

# Column prefix -> (prior mean, prior deviation) of its weight. Model and batch size explain 91 % of
# the variance of log-seconds in the published runs; a frozen backbone needs no backward pass.
PRIORS: tuple[tuple[str, float, float], ...] = (
    ("card:gmacs", 3.2, 1.5),  # seconds ~ GMAC^0.7; the column is log10(GMAC) / 2
    ("card:params", 0.5, 1.0),
    ("card:", 0.0, 0.3),
    ("model", 0.0, 0.7),
    ("batch_size", -0.1, 0.4),
    ("derived:head_only", -0.6, 0.4),
    ("pct_to_freeze", -0.2, 0.3),
    ("data:", 0.0, 1e-6),  # constant within a run: the intercept's business
    ("", 0.0, 0.2),
)
INTERCEPT_SD = 4.0
"""From milliseconds to hours."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """A posterior over weights; immutable."""

    encoder: Encoder
    mean: Array
    covariance: Array
    startup_seconds: float
    measured: int

    def epoch_seconds(
        self, trials: Sequence[Trial], rows: Array, believed: Array | None = None
    ) -> Array:
        """Seconds of one further epoch of each trial, (n,): its own once it has run.

        `believed` (n,): log seconds that the model was fitted to correct.
        """
        start = 0.0 if believed is None else believed
        predicted = np.exp(np.clip(_with_intercept(rows) @ self.mean + start, -12, 16))
        own = [median(trial.seconds) if trial.seconds else math.nan for trial in trials]
        return np.where(np.isnan(own), predicted, np.maximum(own, 1e-6))

    def deviation(self, rows: Array) -> Array:
        """Deviation of the predicted log-seconds, (n,)."""
        design = _with_intercept(rows)
        variance = np.einsum("nd,de,ne->n", design, self.covariance, design) + NOISE
        return np.asarray(np.sqrt(variance))


def fit_cost(
    encoder: Encoder,
    started: Sequence[Trial],
    rows: Array,
    overheads: Sequence[float],
    believed: Array | None = None,
    believed_sd: tuple[float, float] = (0.0, 0.0),
) -> CostModel:
    """The posterior given trials that have run and their rows; exact, so no order matters.

    `believed` (n,): log seconds of the trials that a meta-learned prior predicts; the weights then
    correct it. `believed_sd`: how far it is off, its level and single ones.
    """
    mean, precision = _prior(encoder, None if believed is None else believed_sd)
    design = _with_intercept(rows)
    target = np.array([math.log(max(median(trial.seconds), 1e-6)) for trial in started])
    if believed is not None:
        target = target - believed
    covariance = np.linalg.inv(np.diag(precision) + design.T @ design / NOISE)
    return CostModel(
        encoder=encoder,
        mean=np.asarray(covariance @ (precision * mean + design.T @ target / NOISE)),
        covariance=np.asarray(covariance),
        startup_seconds=median(overheads) if overheads else 0.0,
        measured=len(started),
    )


def _prior(encoder: Encoder, believed_sd: tuple[float, float] | None) -> tuple[Array, Array]:
    """Prior mean and precision of the weights, intercept last.

    Corrections of a prediction are small and have no direction.
    """
    if believed_sd is not None:
        level, single = believed_sd
        sd = [0.0 if name.startswith("data:") else single for name in encoder.columns]
        return np.zeros(len(sd) + 1), np.maximum([*sd, level], 1e-3) ** -2.0
    rows = [
        next((mean, sd) for prefix, mean, sd in PRIORS if name.startswith(prefix))
        for name in encoder.columns
    ]
    rows.append((math.log(UNKNOWN_SECONDS), INTERCEPT_SD))
    table = np.array(rows)
    return table[:, 0], table[:, 1] ** -2


def _with_intercept(rows: Array) -> Array:
    return np.hstack([rows, np.ones((len(rows), 1))])

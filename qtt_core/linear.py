"""Ridge regressions on few data sets: a level from descriptors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qtt_core.encoding import Array

RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
CONSTANT = 0.02
"""A descriptor (log-scaled) that deviates by less has taught nothing: what differs is far away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """value ~ intercept + weights . (metafeatures - centre) / scale, `sd` off on new data."""

    centre: Array
    scale: Array
    weights: Array
    intercept: float
    sd: float

    def __call__(self, row: Array) -> float:
        """The prediction for one data set."""
        return float(self.intercept + self.standardised(row) @ self.weights)

    def standardised(self, row: Array) -> Array:
        """Descriptors within [-3, 3]; what is missing counts as average."""
        return np.clip(np.nan_to_num((row - self.centre) / self.scale, nan=0.0), -3, 3)


def fit_linear(x: Array, y: Array) -> Linear:
    """Ridge regression over data sets, its strength and `sd` by leave-one-out."""
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    with np.errstate(invalid="ignore"):
        centre = np.array([_mean(column) for column in x.T])
        scale = np.array([_spread(column) for column in x.T])
    if len(y) == 0:
        return Linear(
            centre=centre, scale=scale, weights=np.zeros(len(centre)), intercept=0.0, sd=4.0
        )
    z = np.clip(np.nan_to_num((x - centre) / scale, nan=0.0), -3, 3)
    middle = float(y.mean())
    best = (
        float(np.sqrt(np.mean((y - middle) ** 2) * (1 + 2 / len(y)))) + 1e-3,
        np.zeros(z.shape[1]),
    )
    for ridge in RIDGES:
        inverse = np.linalg.inv(z.T @ z + ridge * np.eye(z.shape[1]))
        hat = z @ inverse @ z.T + 1 / len(y)
        weights = inverse @ z.T @ (y - middle)
        error = (y - middle - z @ weights) / np.maximum(1 - np.diag(hat), 0.05)
        sd = float(np.sqrt(np.mean(error**2)))
        if sd < best[0]:
            best = (sd, weights)
    return Linear(centre=centre, scale=scale, weights=best[1], intercept=middle, sd=best[0])


def _mean(column: Array) -> float:
    known = column[np.isfinite(column)]
    return float(known.mean()) if len(known) else 0.0


def _spread(column: Array) -> float:
    """Deviation; 1 for what hardly varies, or another data set would be many deviations away."""
    known = column[np.isfinite(column)]
    spread = float(known.std()) if len(known) else 0.0
    return spread if spread > CONSTANT else 1.0

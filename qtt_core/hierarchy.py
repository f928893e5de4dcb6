"""Linear models of many data sets whose weights have one distribution: what varies, and together.

    y(x, d) = phi(x) . w_d + noise,    w_d ~ N(W z_d, S)

    phi   1, columns, their squares and products (`Basis`)
    z_d   1 and the standardised descriptors of data set d
    W     learned: how descriptors move weights, and so which configurations are good where
    S     learned: which weights move together where the descriptors are alike

Trees (`forest`) find thresholds; this model extrapolates, and its S is a kernel: after a few
results on a new data set it says what they mean for other configurations. The normal hierarchical
model of Lindley and Smith (1972), by EM (Dempster, Laird, Rubin 1977).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtt_core.encoding import Array

NUMERIC_LIMIT = 12
"""Columns of more than two values that enter products at most; those that explain most."""
ROUNDS = 20
DATA_SETS_OF_PRIOR = 20.0
"""The prior of S weighs as many data sets."""
WEIGHT_VARIANCE, LEVEL_VARIANCE = 0.02, 1.0
"""Prior variance of a weight, and of a data set's level, in squared logits."""
DESCRIPTOR_RIDGE = 10.0
"""A descriptor must earn its influence: as if that many data sets had shown none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """phi: feature k is the product of two columns less its mean; column -1 is the constant 1."""

    pairs: NDArray[np.intp]
    """(K, 2)"""
    centre: Array
    """(K,)"""

    def __call__(self, x: Array) -> Array:
        """Rows (n, D) -> features (n, K)."""
        padded = np.hstack([x, np.ones((len(x), 1))])
        return np.asarray(padded[:, self.pairs[:, 0]] * padded[:, self.pairs[:, 1]] - self.centre)


def narrow(x: Array, usable: Sequence[int]) -> Basis:
    """The constant, columns and squares; `usable`: columns to read."""
    numeric = _numeric(x, usable)
    return _basis(x, [(i, -1) for i in usable] + [(i, i) for i in numeric])


def wide(x: Array, usable: Sequence[int], y: Array) -> Basis:
    """`narrow`, products of numeric columns, and of the one that matters most with all others.

    `y` (n,), finite, says which ones matter.
    """
    numeric = sorted(_numeric(x, usable), key=lambda i: (-_explained(x[:, i], y), i))
    numeric = numeric[:NUMERIC_LIMIT]
    pairs = [(i, j) for k, i in enumerate(numeric) for j in numeric[:k]]
    pairs += [(numeric[0], i) for i in usable if numeric and i not in numeric]
    squares = [(i, i) for i in numeric]
    return _basis(x, [*((i, -1) for i in usable), *squares, *pairs])


def _basis(x: Array, pairs: Sequence[tuple[int, int]]) -> Basis:
    every = np.array([(-1, -1), *pairs], dtype=np.intp).reshape(-1, 2)
    raw = Basis(pairs=every, centre=np.zeros(len(every)))
    centre = raw(x).mean(0)
    centre[0] = 0.0
    return Basis(pairs=every, centre=centre)


def _numeric(x: Array, usable: Sequence[int]) -> list[int]:
    return [i for i in usable if len(np.unique(x[:, i])) > 2]


def _explained(column: Array, y: Array) -> float:
    """Share of the variance of y that a parabola in one column explains."""
    design = np.stack([np.ones_like(column), column, column**2], axis=1)
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(1 - left.var() / max(float(y.var()), 1e-12))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """What EM found."""

    weights: Array
    """W, (1 + M, K)"""
    covariance: Array
    """S, (K, K)"""
    noise: float
    """Variance."""

    def factor(self) -> Array:
        """L with L Lt = S, (K, K): phi L are features whose inner product is the kernel phi S phit.

        By eigenvectors: S may be singular up to rounding.
        """
        values, vectors = np.linalg.eigh(self.covariance)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def fit_hierarchy(phi: Array, y: Array, task: NDArray[np.intp], z: Array) -> Hierarchy:
    """EM from the prior.

    phi (n, K), first column 1; y (n,); task (n,): indices of data sets; z (tasks, M): descriptors,
    standardised, 0 where missing.
    """
    present = [int(i) for i in np.unique(task)]
    sums = [_Sums.of(phi[task == i], y[task == i]) for i in present]
    design = np.hstack([np.ones((len(present), 1)), z[present]])
    ridge = np.diag([0.1, *[DESCRIPTOR_RIDGE] * z.shape[1]])
    start = np.full(phi.shape[1], WEIGHT_VARIANCE)
    start[0] = LEVEL_VARIANCE
    found = Hierarchy(
        weights=np.zeros((design.shape[1], phi.shape[1])), covariance=np.diag(start), noise=0.1
    )
    for _ in range(ROUNDS):
        found = _round(found, sums, design, ridge, start)
    return found


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sufficient statistics of one data set."""

    gram: Array
    cross: Array
    squares: float
    count: int

    @staticmethod
    def of(phi: Array, y: Array) -> _Sums:
        return _Sums(phi.T @ phi, phi.T @ y, float(y @ y), len(y))


def _round(
    now: Hierarchy, sums: Sequence[_Sums], design: Array, ridge: Array, start: Array
) -> Hierarchy:
    """One expectation and one maximisation."""
    precision = np.linalg.inv(now.covariance)
    expected = design @ now.weights
    means, spread, error = [], np.zeros_like(precision), 0.0
    for one, mean in zip(sums, expected, strict=True):
        posterior = np.linalg.inv(precision + one.gram / now.noise)
        w = posterior @ (one.cross / now.noise + precision @ mean)
        error += one.squares - 2 * w @ one.cross + w @ one.gram @ w
        error += float(np.sum(one.gram * posterior))
        means.append(w)
        spread += posterior
    found = np.array(means)
    weights = np.linalg.solve(design.T @ design + ridge, design.T @ found)
    apart = found - design @ weights
    total = spread + apart.T @ apart + DATA_SETS_OF_PRIOR * np.diag(start)
    return Hierarchy(
        weights=weights,
        covariance=total / (len(sums) + DATA_SETS_OF_PRIOR),
        noise=max(float(error) / sum(one.count for one in sums), 1e-4),
    )

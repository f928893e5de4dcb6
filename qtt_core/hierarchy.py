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
from qtt_core.gaussian import by_rows

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
    centre = raw(x).mean(0) if len(x) else np.zeros(len(every))
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
class Products:
    """What is expected of rows: phi(x) . W z, the level of the data set left out."""

    pairs: NDArray[np.intp]
    centre: Array
    weights: Array
    """W, (1 + M, K)"""

    def __call__(self, x: Array, z: Array) -> Array:
        """Rows (n, D), descriptors (M,) -> (n,), each the same whichever others are asked with."""
        phi = Basis(pairs=self.pairs, centre=self.centre)(x)
        return by_rows(phi, (np.concatenate([[1.0], z]) @ self.weights)[:, None])[:, 0]


def fit_products(
    x: Array, usable: Sequence[int], y: Array, task: NDArray[np.intp], z: Array
) -> Products:
    """From rows (n, D) with y (n,), centred in each data set; z (tasks, M) as `fit_hierarchy`."""
    basis = wide(x, usable, y)
    weights = fit_hierarchy(basis(x), y, task, z).weights
    weights[:, 0] = 0.0
    return Products(pairs=basis.pairs, centre=basis.centre, weights=weights)


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
    """EM from the prior; without rows, the prior.

    phi (n, K), first column 1; y (n,); task (n,): indices of data sets; z (tasks, M): descriptors,
    standardised, 0 where missing.
    """
    present = [int(i) for i in np.unique(task)]
    runs = [_Runs.of(phi[task == i], y[task == i]) for i in present]
    design = np.hstack([np.ones((len(present), 1)), z[present]])
    ridge = np.diag([0.1, *[DESCRIPTOR_RIDGE] * z.shape[1]])
    start = np.full(phi.shape[1], WEIGHT_VARIANCE)
    start[0] = LEVEL_VARIANCE
    found = Hierarchy(
        weights=np.zeros((design.shape[1], phi.shape[1])), covariance=np.diag(start), noise=0.1
    )
    for _ in range(ROUNDS if present else 0):
        found = _round(found, runs, design, ridge, start)
    return found


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs of one data set, as at most K equations that say the same of its weights."""

    phi: Array
    y: Array
    rest: float
    """Sum of squares that no weights explain."""
    count: int

    @staticmethod
    def of(phi: Array, y: Array) -> _Runs:
        if len(y) <= phi.shape[1]:
            return _Runs(phi, y, 0.0, len(y))
        q, r = np.linalg.qr(phi)
        short = q.T @ y
        return _Runs(r, short, max(float(y @ y - short @ short), 0.0), len(y))


def _round(
    now: Hierarchy, runs: Sequence[_Runs], design: Array, ridge: Array, start: Array
) -> Hierarchy:
    """One expectation and one maximisation."""
    expected = design @ now.weights
    means, spread, error = [], np.zeros_like(now.covariance), 0.0
    for one, mean in zip(runs, expected, strict=True):
        cross = one.phi @ now.covariance
        inside = cross @ one.phi.T + now.noise * np.eye(len(one.y))
        gain = np.linalg.solve(inside, cross).T
        w = mean + gain @ (one.y - one.phi @ mean)
        posterior = now.covariance - gain @ cross
        error += one.rest + float(np.sum((one.y - one.phi @ w) ** 2))
        error += float(np.sum((one.phi @ posterior) * one.phi))
        means.append(w)
        spread += posterior
    found = np.array(means)
    weights = np.linalg.solve(design.T @ design + ridge, design.T @ found)
    apart = found - design @ weights
    total = spread + apart.T @ apart + DATA_SETS_OF_PRIOR * np.diag(start)
    return Hierarchy(
        weights=weights,
        covariance=(total + total.T) / 2 / (len(runs) + DATA_SETS_OF_PRIOR),
        noise=max(error / sum(one.count for one in runs), 1e-4),
    )

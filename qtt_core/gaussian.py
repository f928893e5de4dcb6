"""Exact Gaussian process algebra in float64: a Cholesky factor that never fails, and a posterior.

    K    (n, n)   covariance of the observations, noise included     y  (n,)  observations
    Ks   (n, m)   covariance with the candidates                     kss (m,) their prior variance

Rasmussen and Williams, Gaussian Processes for Machine Learning, algorithm 2.1.
"""

from __future__ import annotations

import logging

import numpy as np
from scipy.linalg import (  # type: ignore[import-untyped]  # SciPy ships no types
    cholesky,
    solve_triangular,
)

from qtt_core.encoding import Array

log = logging.getLogger(__name__)

JITTERS = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)
"""Tried in turn, relative to the mean diagonal; the last makes any covariance positive definite."""


def factor(covariance: Array) -> Array:
    """Lower Cholesky factor, (n, n); with jitter where it needs it, diagonal as a last resort."""
    scale = float(np.mean(np.diag(covariance))) if len(covariance) else 1.0
    for jitter in JITTERS:
        jittered = covariance.copy()
        jittered[np.diag_indices(len(covariance))] += jitter * scale
        try:
            lower = cholesky(jittered, lower=True, overwrite_a=True)
        except (np.linalg.LinAlgError, ValueError):
            continue
        if np.all(np.isfinite(lower)):
            return np.asarray(lower)
    log.warning(
        "a covariance of %d rows has no Cholesky factor; treated as diagonal", len(covariance)
    )
    fallback = scale if np.isfinite(scale) else 1.0
    diagonal = np.nan_to_num(np.diag(covariance), nan=fallback, posinf=fallback)
    return np.diag(np.sqrt(np.maximum(diagonal, 1e-6)))


def extend(lower: Array, cross: Array, corner: Array) -> Array | None:
    """The factor of [[K, cross], [cross', corner]] from that of K; cross (n, k), corner (k, k).

    O(n² k) instead of O((n + k)³). None where that needs jitter: factor the whole then.
    """
    below = solve_triangular(lower, cross, lower=True, check_finite=False).T
    try:
        last = cholesky(corner - below @ below.T, lower=True)
    except (np.linalg.LinAlgError, ValueError):
        return None
    n = len(lower)
    whole = np.zeros((n + len(corner), n + len(corner)))
    whole[:n, :n], whole[n:, :n], whole[n:, n:] = lower, below, last
    return whole


def posterior(lower: Array, y: Array, cross: Array, prior_variance: Array) -> tuple[Array, Array]:
    """Mean (m,) and variance (m,) of the latent function given y; variances are at least 1e-12."""
    half = solve_triangular(lower, cross, lower=True, check_finite=False)
    mean = half.T @ solve_triangular(lower, y, lower=True, check_finite=False)
    variance = prior_variance - np.einsum("nm,nm->m", half, half)
    return np.asarray(mean), np.maximum(variance, 1e-12)


def by_rows(a: Array, b: Array) -> Array:
    """A @ b, (n, m), each row the same to the last bit whichever other rows are asked with.

    BLAS rounds by shape and alignment; memos are filled one by one in a search and at once in its
    replay.
    """
    found = [np.add.reduce(row[:, None] * b, axis=0) for row in a]
    return np.array(found).reshape(len(a), b.shape[1])

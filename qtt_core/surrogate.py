"""Learning curves of all configurations as one Gaussian process: the default optimizer's model.

Asked by `policy` for the score that each candidate will have reached at its horizon. It is a
freeze-thaw model: one process over (configuration, epoch), so that a started curve, its siblings
and the common course of training all inform a forecast. Works on squashed scores;
never sees seconds.

    u = logit(a), a = (y - 1/C) / (1 - 1/C)          squashed score (10-optimizer 5.3)
    tau(t) = log t / log T in [0, 1],  h = 1 - tau    progress on a logarithmic clock; h = 0 at T
    f(x, t) = A(x) + h B(x) + w_x(tau)                final level, how far below it starts, wiggles
    k(x, x') = sum_g v_g k_g(x, x') + v_D exp(-|phi(x) - phi(x')|^2 / 2) + v_T psi(x) . psi(x')

    k_g   one hyperparameter alone: main effects are learned from few curves
    phi   deep embedding: weighted columns beside a small network (deep kernel learning, Wilson
          et al., AISTATS 2016; DyHPO, arXiv 2202.09774): interactions, once data shows them
    psi   what meta-learning says varies together from data set to data set (`hierarchy`)
    A, B  each = common level + k(x, x') + the configuration's own effect; w: Ornstein-Uhlenbeck
    noise = learned + binomial of n_val; predictions leave it out (epistemic deviation only)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from qtt_core.encoding import Array, Encoder
from qtt_core.gaussian import extend, factor, posterior

MAX_ROWS = 512
"""Observations the process is conditioned on at most; more are thinned, oldest epochs first."""

LOWEST = 0.02
"""Chance-corrected scores below it all count as "at chance": the logit would tear them apart."""

WIGGLE_LENGTH = 0.3
"""Correlation length of a curve's own wiggles, in tau."""

GRID = (0.0, 0.18, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
"""Points of the clock tau at which a configuration's mean course is kept; linear in between."""

RISE_PER_E_FOLD = 0.4
"""Prior: logits won when training is e times as long."""

MAIN_EFFECT_SCALE = 0.6
"""Length scale of a main effect; columns lie in [-1, 1], another category is 1.4 away."""

# Which hyperparameters matter, before anything is known: shares of explained variance in the public
# Quick-Tune micro runs (10-optimizer 10) put model and learning rate first, most others near 1 %.
IMPORTANCE = {
    "model": 0.5,
    "card": 0.5,
    "lr": 1.0,
    "opt": 0.4,
    "drop": 0.2,
    "batch_size": 0.2,
    "weight_decay": 0.1,
    "pct_to_freeze": 0.3,
    "linear_probing": 0.3,
    "derived": 0.2,
}
MINOR = 0.05


@dataclass(frozen=True, slots=True)
class Squash:
    """Scores in [0, 1] <-> logits of the chance-corrected score."""

    chance: float = 0.0
    n_val: float | None = None

    @property
    def highest(self) -> float:
        """The largest chance-corrected score kept apart from 1."""
        return 1.0 - (1e-3 if self.n_val is None else 1 / (2 * max(self.n_val, 2.0)))

    def to_u(self, score: Array) -> Array:
        """Score -> logit, clipped to what n_val can resolve."""
        a = np.clip((score - self.chance) / (1 - self.chance), LOWEST, self.highest)
        return np.asarray(np.log(a / (1 - a)))

    def to_score(self, u: Array) -> Array:
        """Logit -> score."""
        return np.asarray(self.chance + (1 - self.chance) / (1 + np.exp(-u)))

    def slope(self, u: Array) -> Array:
        """D score / d u: what a small step of the logit is worth in score."""
        a = 1 / (1 + np.exp(-u))
        return np.asarray((1 - self.chance) * a * (1 - a))

    def noise(self, u: Array) -> Array:
        """Variance of u from counting n_val images (binomial, delta method); 0 if unknown."""
        if self.n_val is None:
            return np.zeros_like(u)
        y = np.clip(self.to_score(u), 0.5 / self.n_val, 1 - 0.5 / self.n_val)
        variance = y * (1 - y) / self.n_val / np.maximum(self.slope(u), 1e-3) ** 2
        return np.asarray(np.minimum(variance, 1.0))


def squash_of(metafeatures: Mapping[str, float]) -> Squash:
    """Chance level and resolution of a data set, where its descriptors name them."""
    classes = metafeatures.get("num_classes")
    chance = 1 / classes if classes and classes > 1 else 0.0
    return Squash(chance=chance, n_val=metafeatures.get("n_val"))


@dataclass(frozen=True, slots=True)
class Parameters:
    """Everything the process learns; the defaults are its prior, in logits."""

    groups: Array
    """(G,) variance of each main effect."""
    scales: Array
    """(D,) weight of each column in the embedding."""
    hidden: Array
    """(D, H) first layer."""
    head: Array
    """(H, E) second layer."""
    deep: float = 0.5
    transfer: float = 1.0
    level_common: float = 2.0
    level_own: float = 0.3
    slope_common: float = 0.5
    slope_x: float = 0.3
    slope_own: float = 0.2
    wiggle: float = 0.05
    noise: float = 0.02


@dataclass(frozen=True, slots=True)
class Rows:
    """Observations, each (n,): configuration (index into a list), epoch, score u, known noise."""

    index: NDArray[np.intp]
    epoch: Array
    u: Array
    noise: Array


def joined(rows: Rows, more: Rows) -> Rows:
    """Both, in order."""
    names = (field.name for field in fields(Rows))
    return Rows(**{n: np.concatenate([getattr(rows, n), getattr(more, n)]) for n in names})


def groups_of(encoder: Encoder) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """Names of the groups; each column's group (D,), -1 for the (constant) data set columns."""
    names: list[str] = []
    member: list[int] = []
    for column in encoder.columns:
        name = column.split("=")[0].split(":")[0]
        if name == "data":
            member.append(-1)
            continue
        if name not in names:
            names.append(name)
        member.append(names.index(name))
    return tuple(names), np.array(member, dtype=np.intp)


def importance(names: Sequence[str]) -> Array:
    """Prior variance of each group's main effect, (G,); alike where no name is known."""
    if not any(name in IMPORTANCE for name in names):
        return np.full(len(names), 1.5 / max(len(names), 1))
    return np.array([IMPORTANCE.get(name, MINOR) for name in names])


def network_start(columns: int, seed: int, hidden: int = 16, width: int = 4) -> tuple[Array, Array]:
    """Random first and second layer of the embedding's network."""
    rng = np.random.default_rng([seed & (2**63 - 1), columns])
    first = rng.normal(0, 1 / math.sqrt(max(columns, 1)), (columns, hidden))
    return first, rng.normal(0, 0.5 / math.sqrt(hidden), (hidden, width))


def prior_parameters(encoder: Encoder, seed: int) -> Parameters:
    """What is believed before any curve was seen."""
    names, member = groups_of(encoder)
    weights = importance(names)
    scales = np.array([0.0 if g < 0 else math.sqrt(weights[g]) for g in member])
    hidden, head = network_start(len(member), seed)
    return Parameters(
        groups=weights, scales=scales, hidden=hidden * (scales > 0)[:, None], head=head
    )


def main_effects(a: Array, b: Array, member: NDArray[np.intp], count: int) -> Array:
    """exp(-d_g^2 / (2 l^2)) for every group, (G, n, m)."""
    result = np.empty((count, len(a), len(b)))
    for group in range(count):
        columns = np.flatnonzero(member == group)
        result[group] = np.exp(-squared(a[:, columns], b[:, columns]) / (2 * MAIN_EFFECT_SCALE**2))
    return result


def squared(a: Array, b: Array) -> Array:
    """Squared Euclidean distances, (n, m)."""
    distance = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    return np.asarray(np.maximum(distance, 0.0))


def prior_variance(parameters: Parameters, x: Array) -> Array:
    """k(x, x), (n,)."""
    psi = x[:, len(parameters.scales) :]
    still = parameters.deep + float(parameters.groups.sum())
    return np.asarray(still + parameters.transfer * (psi**2).sum(1))


def embed(parameters: Parameters, x: Array) -> Array:
    """phi(x): weighted columns, and the network's outputs beside them; (n, D + E)."""
    deep = np.tanh(x @ parameters.hidden) @ parameters.head
    return np.hstack([x * parameters.scales, deep])


def config_kernel(parameters: Parameters, member: NDArray[np.intp], a: Array, b: Array) -> Array:
    """k(x, x'), (n, m); rows (., D + R): encoded columns, then psi."""
    width = len(parameters.scales)
    total = parameters.transfer * a[:, width:] @ b[:, width:].T
    a, b = a[:, :width], b[:, :width]
    total += parameters.deep * np.exp(-0.5 * squared(embed(parameters, a), embed(parameters, b)))
    for group, weight in enumerate(parameters.groups):
        columns = np.flatnonzero(member == group)
        distance = squared(a[:, columns], b[:, columns])
        total += weight * np.exp(-distance / (2 * MAIN_EFFECT_SCALE**2))
    return np.asarray(total)


def progress(epoch: Array, max_fidelity: int) -> Array:
    """Tau in [0, 1]; 1 at T, also where T = 1."""
    if max_fidelity <= 1:
        return np.ones_like(epoch)
    return np.asarray(np.log(np.maximum(epoch, 1.0)) / math.log(max_fidelity))


def straight(level: Array, max_fidelity: int) -> Array:
    """The mean course of curves that end at `level` (n,), before any was seen; (n, G)."""
    rise = RISE_PER_E_FOLD * math.log(max(max_fidelity, 1))
    return np.asarray(level[:, None] - rise * (1 - np.array(GRID)))


def course(trend: Array, tau: Array) -> Array:
    """The mean course at one point of the clock each, (n,), from its values on GRID (n, G)."""
    grid = np.array(GRID)
    right = np.clip(np.searchsorted(grid, tau, side="left"), 1, len(grid) - 1)
    share = (tau - grid[right - 1]) / (grid[right] - grid[right - 1])
    line = np.arange(len(tau))
    return np.asarray(trend[line, right - 1] * (1 - share) + trend[line, right] * share)


def curve_kernel(p: Parameters, kx: Array, same: Array, tau: Array, other: Array) -> Array:
    """k((x, t), (x', t')), (n, m), from k(x, x'), whether x = x', and both progresses."""
    hh = (1 - tau)[:, None] * (1 - other)[None, :]
    wiggle = p.wiggle * np.exp(-np.abs(tau[:, None] - other[None, :]) / WIGGLE_LENGTH)
    shared = p.level_common + p.slope_common * hh + kx * (1.0 + p.slope_x * hh)
    return np.asarray(shared + same * (p.level_own + p.slope_own * hh + wiggle))


class CurveModel:
    """The process under fixed parameters, conditioned on rows. Immutable once built.

    `x` (c, D + R) are the configurations that the rows refer to; `trend` (c, G) their mean course;
    `own` (c, c) is k between them.
    """

    def __init__(
        self,
        parameters: Parameters,
        member: NDArray[np.intp],
        max_fidelity: int,
        x: Array,
        trend: Array,
        rows: Rows,
    ) -> None:
        self.parameters, self.member, self.max_fidelity = parameters, member, max_fidelity
        self.x, self.rows = x, rows
        self.own = config_kernel(parameters, member, x, x)
        self._trend, self._tau = trend, progress(rows.epoch, max_fidelity)
        self._lower = factor(self._covariance(rows))
        self._residual = rows.u - course(trend[rows.index], self._tau)

    def extended(self, more: Rows) -> CurveModel:
        """The process given further rows of the same configurations, at a fraction of the work."""
        model = copy(self)
        model.rows = joined(self.rows, more)
        tau = progress(more.epoch, self.max_fidelity)
        cross = self._between(self.rows, self._tau, more, tau)
        lower = extend(self._lower, cross, self._covariance(more))
        model._lower = factor(model._covariance(model.rows)) if lower is None else lower
        model._tau = np.concatenate([self._tau, tau])
        residual = more.u - course(self._trend[more.index], tau)
        model._residual = np.concatenate([self._residual, residual])
        return model

    def _between(self, rows: Rows, tau: Array, others: Rows, other: Array) -> Array:
        same = rows.index[:, None] == others.index[None, :]
        kx = self.own[np.ix_(rows.index, others.index)]
        return curve_kernel(self.parameters, kx, same, tau, other)

    def _covariance(self, rows: Rows) -> Array:
        """Of what is observed, noise included."""
        tau = progress(rows.epoch, self.max_fidelity)
        covariance = self._between(rows, tau, rows, tau)
        covariance[np.diag_indices(len(tau))] += self.parameters.noise + rows.noise
        return covariance

    def predict(
        self,
        kx: Array,
        identity: NDArray[np.intp],
        trend: Array,
        diagonal: Array,
        epoch: Array,
    ) -> tuple[Array, Array]:
        """Mean and epistemic deviation of u, each (m,), for configurations at given epochs.

        kx (c, m): k between conditioning configurations and candidates; diagonal (m,): k(x, x);
        identity (m,): the candidate's index among the conditioning configurations, or -1.
        """
        tau = progress(epoch, self.max_fidelity)
        h2 = (1 - tau) ** 2
        p = self.parameters
        level = course(trend, tau)
        variance = p.level_common + p.slope_common * h2 + diagonal * (1 + p.slope_x * h2)
        variance = variance + p.level_own + p.slope_own * h2 + p.wiggle
        if len(self.rows.index) == 0:
            return level, np.sqrt(variance)
        same = self.rows.index[:, None] == identity[None, :]
        cross = curve_kernel(p, kx[self.rows.index], same, self._tau, tau)
        mean, variance = posterior(self._lower, self._residual, cross, variance)
        return level + mean, np.sqrt(variance)

"""Meta-training: from learning curves of many data sets to a transfer prior (10-optimizer 9.4).

Everything that says how good a prediction is comes from data sets that the predictor has not seen:
data sets, never points, are held out. Takes minutes for 13,000 curves on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls  # type: ignore[import-untyped]  # SciPy ships no types
from scipy.stats import rankdata, spearmanr  # type: ignore[import-untyped]  # SciPy ships no types

import qtt_core
from qtt_core import prior as p
from qtt_core.encoding import Array, build_encoder
from qtt_core.errors import Fault, SpecError
from qtt_core.fitting import Curves, fit
from qtt_core.forest import Forest, fit_forest
from qtt_core.hierarchy import Basis, Products, fit_hierarchy, fit_products, narrow
from qtt_core.linear import Linear, fit_linear
from qtt_core.metadataset import CENSORED, DIVERGED, FAILED, OK, MetaDataset
from qtt_core.prior import MetaPrior
from qtt_core.spread import begun, spread
from qtt_core.surrogate import (
    GRID,
    Parameters,
    Rows,
    Squash,
    groups_of,
    prior_parameters,
    squash_of,
    straight,
)

FOLDS = 5
TREES, FOLD_TREES = 100, 40
SECONDS_ROWS_A_LEAF = 3000
"""Leaves of the trees of seconds grow with so many rows, or their file would."""
SMOOTHED = 3
"""Epochs whose mean is the score that a run ended with."""
LEARNING_TASKS, LEARNING_CONFIGS, LEARNING_POINTS = 24, 32, 4
"""Data sets, configurations of each and points of a curve that the process learns from."""
LEARNING_STEPS = 60


Progress = Callable[[str, float], None]
"""Told what is being done, and which share of the work is behind it."""


def metatrain(
    meta: MetaDataset, seed: int = 0, *, name: str = "", progress: Progress = lambda *_: None
) -> MetaPrior:
    """A prior from at least two data sets with runs that were trained to the end.

    Raises: SpecError if there is nothing to learn from.
    """
    progress("reading the curves", 0.0)
    table = _tabulate(meta)
    done = [i for i in range(len(meta.tasks)) if np.any(table.ended & (table.task == i))]
    if len(done) < 2:
        found = f"{len(done)} data sets with finished runs"
        raise SpecError([Fault("meta-data", found, "bring at least two")])
    progress("learning from all data sets", 0.05)
    models = _fit_all(table, np.full(len(table.task), True), seed, TREES)
    held_out = _held_out(table, seed, progress)
    progress("learning what goes together", 0.8)
    encoder = build_encoder(meta.space, meta.hub)
    basis, factor = _learn_transfer(table, held_out)
    progress("learning how curves differ", 0.85)
    parameters, spread = _learn_process(meta, table, held_out, basis(table.x) @ factor, seed)
    return MetaPrior(
        space=meta.space, hub=meta.hub, descriptors=table.descriptors, columns=encoder.columns,
        forests={n: f for n, f in models.forests.items() if f is not None},
        slopes=held_out.slopes, level_products=models.level_products,
        seconds_products=models.seconds_products, narrow=basis, factor=factor,
        difficulty=models.difficulty, pace=models.pace,
        seconds_sd=_deviation(held_out.seconds_error), parameters=parameters, spread=spread,
        span=np.stack([table.x.min(0), table.x.max(0)]),
        name=name or f"{len(meta.tasks)} data sets", card=_card(meta, table, held_out, seed),
    )  # fmt: skip


# --- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """One row a run; NaN where a target is not known."""

    descriptors: tuple[str, ...]
    x: Array
    """(R, .), inputs of the forests."""
    columns: tuple[int, ...]
    """Those of x that belong to configurations."""
    task: NDArray[np.intp]
    end: Array
    """(R,), u of the last epochs."""
    ended: NDArray[np.bool_]
    """(R,), trained to T."""
    standing: Array
    """(R,), rank among the finished runs of the same data set; mean 0, deviation 1.

    Ranks keep the many runs near chance from ruling the fit: on unseen data sets of real runs,
    trees predict them with a rank correlation of .68, logits with .67, both half and half .66."""
    below: Array
    """(R, G), how far below its end a finished curve is at the points of GRID."""
    log_seconds: Array
    finished: Array
    """(R,), 1 trains, 0 fails, NaN unknown."""
    described: Array
    """(tasks, M)"""
    squashes: tuple[Squash, ...]
    u: Array
    """(R, T)"""


def _tabulate(meta: MetaDataset) -> _Table:
    names = meta.tasks
    descriptors = tuple(sorted({k for values in meta.metafeatures.values() for k in values}))
    position = {name: i for i, name in enumerate(names)}
    task = np.array([position[name] for name in meta.datasets], dtype=np.intp)
    blocks: dict[int, Array] = {}
    x = np.empty(0)
    for i, name in enumerate(names):
        mine = np.flatnonzero(task == i)
        configs = [meta.configs[j] for j in mine]
        values = meta.metafeatures[name]
        blocks[i] = p.rows(meta.space, meta.hub, descriptors, configs, values)
        x = np.empty((len(task), blocks[i].shape[1])) if x.size == 0 else x
        x[mine] = blocks[i]
    squashes = tuple(squash_of(meta.metafeatures[name]) for name in names)
    u = np.full(meta.curves.shape, np.nan)
    for i, squash in enumerate(squashes):
        mine = np.flatnonzero(task == i)
        u[mine] = squash.to_u(meta.curves[mine].astype(np.float64))
    states = np.array(meta.states)
    ended = (states == OK) & np.isfinite(u[:, -1])
    end = np.full(len(task), np.nan)
    tail = u[ended, -SMOOTHED:]
    end[ended] = np.nanmean(tail, axis=1)
    seconds = np.log(_median(meta.seconds))
    finished = np.where((states == DIVERGED) | (states == FAILED), 0.0, 1.0)
    finished[states == CENSORED] = np.nan
    described = np.array([p.describe(descriptors, meta.metafeatures[name]) for name in names])
    return _Table(
        descriptors=descriptors, x=x, columns=_own_columns(meta), task=task, end=end, ended=ended,
        standing=_standing(end, ended, task),
        below=_below(u, end, meta.space.max_fidelity), log_seconds=seconds, finished=finished,
        described=described.reshape(len(names), len(descriptors)), squashes=squashes, u=u,
    )  # fmt: skip


def _own_columns(meta: MetaDataset) -> tuple[int, ...]:
    names = build_encoder(meta.space, meta.hub, {"n_train": math.nan}).columns  # as `p.rows` does
    return tuple(i for i, name in enumerate(names) if not name.startswith("data:"))


def _standing(end: Array, ended: NDArray[np.bool_], task: NDArray[np.intp]) -> Array:
    standing = np.full(len(end), np.nan)
    for i in np.unique(task[ended]):
        mine = np.flatnonzero(ended & (task == i))
        standing[mine] = ((rankdata(end[mine]) - 0.5) / len(mine) - 0.5) * math.sqrt(12)
    return standing


def _median(seconds: NDArray[np.float32]) -> Array:
    """Median over the epochs of each row, NaN where none was measured."""
    found = np.full(len(seconds), np.nan)
    some = np.isfinite(seconds).any(axis=1)
    found[some] = np.nanmedian(seconds[some], axis=1)
    return np.where(found > 0, found, np.nan)


def _below(u: Array, end: Array, max_fidelity: int) -> Array:
    """End minus the curve at the points of GRID, by interpolation on the clock; (R, G)."""
    if max_fidelity < 2:
        return np.full((len(u), len(GRID)), np.nan)
    epochs = np.arange(1, max_fidelity + 1)
    tau = np.log(epochs) / math.log(max_fidelity)
    below = np.full((len(u), len(GRID)), np.nan)
    whole = np.flatnonzero(np.isfinite(u).all(axis=1) & np.isfinite(end))
    for i in whole:
        below[i] = end[i] - np.interp(GRID, tau, u[i])
    below[whole, -1] = 0.0  # by definition: what is left is noise
    return below


# --- the predictors ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Models:
    forests: dict[str, Forest | None]
    level_products: Products
    seconds_products: Products
    difficulty: Linear
    pace: Linear


def _fit_all(table: _Table, keep: NDArray[np.bool_], seed: int, trees: int) -> _Models:
    """Everything that is fitted to some of the rows; a forest is None where it saw nothing."""
    tasks = sorted(set(table.task[keep]))
    ended = keep & table.ended
    middle = _by_task(table.end, ended, table.task)
    paced = keep & np.isfinite(table.log_seconds)
    pace = _by_task(table.log_seconds, paced, table.task)
    relative = _centred(table.log_seconds, paced, table.task)
    difficulty = fit_linear(table.described[tasks], middle[tasks])
    rate = fit_linear(table.described[tasks], pace[tasks])
    below = keep & np.isfinite(table.below).all(axis=1)
    forests: dict[str, Forest | None] = {
        "level": _forest(table, ended, table.standing, seed, trees, 3),
        "shape": _forest(table, below, table.below, seed, trees, 5),
        # nearly a look-up table: every column at every split, every row in every tree
        "seconds": _forest(
            table,
            paced,
            relative,
            seed,
            trees,
            1 + int(paced.sum()) // SECONDS_ROWS_A_LEAF,
            columns=1.0,
            bootstrap=False,
        ),
        "finish": None,
    }
    known = keep & np.isfinite(table.finished)
    if known.any() and table.finished[known].min() < 1:
        forests["finish"] = _forest(table, known, table.finished, seed, trees, 8)
    return _Models(
        forests=forests,
        level_products=_products(table, ended, table.standing, difficulty),
        seconds_products=_products(table, paced, relative, rate),
        difficulty=difficulty,
        pace=rate,
    )


def _products(table: _Table, keep: NDArray[np.bool_], y: Array, level: Linear) -> Products:
    z = np.array([level.standardised(row) for row in table.described])
    return fit_products(table.x[keep], table.columns, y[keep], table.task[keep], z)


def _forest(
    table: _Table,
    keep: NDArray[np.bool_],
    y: Array,
    seed: int,
    trees: int,
    leaf: int,
    *,
    columns: float = 0.6,
    bootstrap: bool = True,
) -> Forest | None:
    if not keep.any():
        return None
    return fit_forest(
        table.x[keep], y[keep], seed=seed, trees=trees, leaf=leaf, columns=columns,
        bootstrap=bootstrap,
    )  # fmt: skip


def _by_task(values: Array, keep: NDArray[np.bool_], task: NDArray[np.intp]) -> Array:
    """Mean of each task, (all tasks,); NaN where it has no row."""
    found = np.full(int(task.max()) + 1, np.nan)
    for i in np.unique(task[keep]):
        found[i] = values[keep & (task == i)].mean()
    return found


def _centred(values: Array, keep: NDArray[np.bool_], task: NDArray[np.intp]) -> Array:
    """Less the mean of each data set; NaN where not kept."""
    return np.where(keep, values - _by_task(values, keep, task)[task], np.nan)


# --- data sets never seen --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeldOut:
    """Predictions for each row by models that never saw its data set; NaN where there were none."""

    slopes: Array
    """(2, 2): what one unit of the trees and of the linear model is worth; ends, log seconds."""
    trend: Array
    """(R, G)"""
    seconds_error: Array
    """(R,), of log seconds, the data set's own level removed."""


def _held_out(table: _Table, seed: int, progress: Progress) -> _HeldOut:
    tasks = np.unique(table.task)
    order = np.random.default_rng([seed & (2**63 - 1), 11]).permutation(tasks)
    shape = np.full((len(table.task), len(GRID)), np.nan)
    difficulty = np.full(len(table.task), np.nan)
    levels, paces = (np.full((len(table.task), 2), np.nan) for _ in range(2))
    folds = np.array_split(order, min(FOLDS, len(order)))
    for number, fold in enumerate(folds, start=1):
        progress(f"leaving data sets out, {number} of {len(folds)}", 0.25 + 0.5 * number / FOLDS)
        out = np.flatnonzero(np.isin(table.task, fold))
        models = _fit_all(table, ~np.isin(table.task, fold), seed, FOLD_TREES)
        forest = models.forests["shape"]
        if forest is not None:
            shape[out] = forest.predict(table.x[out])
        for found, name, products, rough in (
            (levels, "level", models.level_products, models.difficulty),
            (paces, "seconds", models.seconds_products, models.pace),
        ):
            found[out] = _both(table, out, models.forests[name], products, rough)
        difficulty[out] = [models.difficulty(table.described[t]) for t in table.task[out]]
    if np.isnan(shape).all():
        shape = -straight(np.zeros(len(shape)), table.u.shape[1])
    slopes = _slopes(levels, table.standing, table.ended, table.task)
    slopes *= _slopes(levels @ slopes[:, None], table.end, table.ended, table.task)[0]
    timed = np.isfinite(table.log_seconds)
    rates = _slopes(paces, table.log_seconds, timed, table.task)
    level = difficulty + levels @ slopes
    error = _centred(paces @ rates - table.log_seconds, timed, table.task)
    return _HeldOut(
        slopes=np.array([slopes, rates]), trend=level[:, None] - shape, seconds_error=error
    )


def _both(
    table: _Table, out: NDArray[np.intp], forest: Forest | None, products: Products, level: Linear
) -> Array:
    """Predictions of trees and of products for some rows, (n, 2)."""
    found = np.full((len(out), 2), np.nan)
    if forest is not None:
        found[:, 0] = forest.predict(table.x[out])[:, 0]
    for task in np.unique(table.task[out]):
        mine = table.task[out] == task
        z = level.standardised(table.described[task])
        found[mine, 1] = products(table.x[out][mine], z)
    return found


def _slopes(predicted: Array, y: Array, known: NDArray[np.bool_], task: NDArray[np.intp]) -> Array:
    """Least squares, not negative, of y on predictions (R, k), centred in data sets."""
    keep = known & np.isfinite(predicted).all(axis=1)
    if not keep.any():
        return np.full(predicted.shape[1], 0.5)
    x = np.stack([_centred(column, keep, task) for column in predicted.T], axis=1)
    return np.asarray(nnls(x[keep], _centred(y, keep, task)[keep])[0])


def _deviation(error: Array) -> float:
    known = error[np.isfinite(error)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else 0.3


def _learn_transfer(table: _Table, held_out: _HeldOut) -> tuple[Basis, Array]:
    """Features of what the trend leaves on data sets never seen, and how they vary together."""
    left = table.end - held_out.trend[:, -1]
    keep = table.ended & np.isfinite(left)
    basis = narrow(table.x[keep], table.columns)
    nothing = np.zeros((len(table.described), 0))
    found = fit_hierarchy(basis(table.x[keep]), left[keep], table.task[keep], nothing)
    return basis, found.factor()


def _learn_process(
    meta: MetaDataset, table: _Table, held_out: _HeldOut, psi: Array, seed: int
) -> tuple[Parameters, float]:
    """What the curve process must expect, fitted to what the trend leaves on unseen data sets.

    And by how much its forecasts of their ends are too sure.
    """
    encoder = build_encoder(meta.space, meta.hub)
    _, member = groups_of(encoder)
    rng = np.random.default_rng([seed & (2**63 - 1), 12])
    tasks = rng.permutation(np.unique(table.task))[:LEARNING_TASKS]
    cut = np.random.default_rng([seed & (2**63 - 1), 13])
    sets, starts = [], []
    for i in tasks:
        usable = np.isfinite(held_out.trend[:, 0]) & np.isfinite(table.u).any(axis=1)
        mine = np.flatnonzero((table.task == i) & usable)
        chosen = np.sort(rng.permutation(mine)[:LEARNING_CONFIGS])
        if len(chosen) < 2:
            continue
        rows = _points(table, chosen, table.squashes[i], rng)
        x = np.hstack([encoder([meta.configs[j] for j in chosen]), psi[chosen]])
        sets.append(Curves(x=x, trend=held_out.trend[chosen], rows=rows))
        starts.append(begun(table.u[chosen], table.squashes[i], cut))
    start = prior_parameters(encoder, seed)
    if not sets:
        return start, 1.0
    full = meta.space.max_fidelity
    found = fit(start, member, sets, max_fidelity=full, steps=LEARNING_STEPS)
    return found, spread(found, member, sets, starts, max_fidelity=full)


def _points(
    table: _Table, chosen: NDArray[np.intp], squash: Squash, rng: np.random.Generator
) -> Rows:
    """A few epochs of each curve: its last one and others, spread on the clock."""
    index, epochs, u = [], [], []
    for k, i in enumerate(chosen):
        known = np.flatnonzero(np.isfinite(table.u[i]))
        wanted = np.unique(np.round(np.geomspace(1, len(known), LEARNING_POINTS)).astype(int) - 1)
        for j in known[wanted]:
            index.append(k)
            epochs.append(float(j + 1))
            u.append(table.u[i, j])
    scores = np.array(u)
    return Rows(
        index=np.array(index, dtype=np.intp), epoch=np.array(epochs), u=scores,
        noise=squash.noise(scores),
    )  # fmt: skip


# --- the card --------------------------------------------------------------------------------


def _card(meta: MetaDataset, table: _Table, held_out: _HeldOut, seed: int) -> dict[str, Any]:
    """What people should know of a prior; figures on data sets its predictors never saw."""
    ranks, errors = [], []
    for i in range(len(meta.tasks)):
        mine = (table.task == i) & table.ended & np.isfinite(held_out.trend[:, -1])
        if mine.sum() >= 5:
            predicted = held_out.trend[mine, -1]
            ranks.append(float(spearmanr(predicted, table.end[mine]).statistic))
            squash = table.squashes[i]
            off = squash.to_score(predicted) - squash.to_score(table.end[mine])
            errors.append(float(np.abs(off).mean()))
    seconds = held_out.seconds_error[np.isfinite(held_out.seconds_error)]
    return {
        "source": meta.source,
        "data": meta.sha,
        "tasks": list(meta.tasks),
        "runs": len(meta.datasets),
        "seed": seed,
        "version": qtt_core.__version__,
        "held_out": {
            "spearman_final_score": _rounded(ranks),
            "mean_error_final_score": _rounded(errors),
            "coverage_of_80_percent": _coverage(table, held_out),
            "median_error_seconds": _rounded([float(np.median(np.abs(np.expm1(seconds))))])
            if len(seconds)
            else None,
        },
    }


def _coverage(table: _Table, held_out: _HeldOut) -> float | None:
    """Share of final scores within the 80 % interval that errors on other data sets suggest."""
    error = held_out.trend[:, -1] - table.end
    known = table.ended & np.isfinite(error)
    inside = []
    for i in np.unique(table.task[known]):
        mine, others = known & (table.task == i), known & (table.task != i)
        if others.sum() >= 10:
            low, high = np.quantile(error[others], (0.1, 0.9))
            inside.append(float(np.mean((low <= error[mine]) & (error[mine] <= high))))
    return _rounded(inside)


def _rounded(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return round(float(np.mean(known)), 4) if known else None

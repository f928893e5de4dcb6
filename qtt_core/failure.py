"""P(finish): the chance that a configuration trains to its end, by its likes.

A Beta-smoothed count: every configuration that ran counts as a success or a failure, weighted by
its similarity to the candidate; before anything failed the answer is the prior rate. Failures
are facts about a configuration (diverged, out of memory, infeasible); broken nodes never reach it.

    X   (n, D)   encoded configurations that ran         y  (n,)  1 = trains, 0 = failed
    w   (m, n)   exp(-d^2 / 2), d over the columns that make training fail
    p   (m,)     (A r + w y) / (A + w 1),    r = (S + sum y) / (S + F + n)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qtt_core.encoding import Array, Encoder
from qtt_core.trials import Trial

CULPRITS: tuple[tuple[str, float], ...] = (
    ("lr", 9.0),  # [-1, 1] over three decades: half a decade counts as one deviation
    ("opt=", 0.7),
    ("model", 2.0),
    ("card:params", 6.0),
    ("batch_size", 1.0),
    ("clip_grad:off", 1.0),
    ("pct_to_freeze", 1.0),
    ("linear_probing", 1.0),
    ("amp", 0.5),
    ("bss_reg", 0.5),
    ("weight_decay", 0.3),
)
"""Columns (by prefix) behind divergence and memory, and the weight of their squared difference."""

PRIOR_SUCCESSES, PRIOR_FAILURES = 9.0, 1.0
"""A tenth of random configurations crash (10-optimizer 5.10)."""
LOCAL_STRENGTH = 1.0
"""How many like configurations outweigh the overall rate."""


def probability_to_finish(
    encoder: Encoder,
    trials: Sequence[Trial],
    started: Array,
    candidates: Array,
    *,
    believed: Array | None = None,
) -> Array:
    """P(finish) of each candidate row, (m,), in (0, 1); `started`: the rows of `trials`, (n, D).

    `believed` (m,): what a meta-learned prior says of each candidate, in place of the overall rate.
    """
    outcomes = np.array([0.0 if trial.failure is not None else 1.0 for trial in trials])
    rate = (PRIOR_SUCCESSES + outcomes.sum()) / (PRIOR_SUCCESSES + PRIOR_FAILURES + len(outcomes))
    base = np.full(len(candidates), rate) if believed is None else believed
    if len(outcomes) == 0:
        return base
    scale = _scale(encoder)
    a, b = candidates * scale, started * scale
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    weights = np.exp(-0.5 * np.maximum(squared, 0.0))
    return np.asarray(
        (LOCAL_STRENGTH * base + weights @ outcomes) / (LOCAL_STRENGTH + weights.sum(1))
    )


def _scale(encoder: Encoder) -> Array:
    """Square roots of the weights by column; a space without known names uses every column."""
    found = [
        next((weight for prefix, weight in CULPRITS if name.startswith(prefix)), 0.0)
        for name in encoder.columns
    ]
    if not any(found):
        found = [0.0 if name.startswith("data:") else 1.0 for name in encoder.columns]
    return np.asarray(np.sqrt(np.array(found)))

"""How much too sure the curve process is of where training ends.

Judged on curves that are known up to a rung, as in a search: neighbouring epochs lead further than
the process believes, which is fitted to points that are spread over whole curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtt_core.encoding import Array
from qtt_core.fitting import Curves
from qtt_core.surrogate import CurveModel, Parameters, Rows, Squash, prior_variance
from qtt_core.trials import RUNGS

SHARE, INSIDE = 0.8, 1.2815515655446004
"""Of a normal distribution, so much lies within so many deviations of its mean."""
BOUNDS = (1.0, 2.5)
"""Never narrower: where few images make large noise, what is off says little of the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Configurations (c,) of a data set as a search knows them, and where training took them."""

    rows: Rows
    """Epochs up to a rung, drawn for each configuration; none of some."""
    epoch: Array
    """(c,) the last one of each."""
    u: Array
    """(c,) its score."""
    noise: Array
    """(c,) the known variance of that."""


def begun(curves: Array, squash: Squash, rng: np.random.Generator) -> Begun:
    """Whole curves u (c, T), NaN where unknown and at least one epoch each, cut at rungs."""
    index, epochs, ends = [], [], []
    for k, curve in enumerate(curves):
        known = np.flatnonzero(np.isfinite(curve))
        upto = int(rng.choice([0, *(rung for rung in RUNGS if rung < len(known))]))
        index += [k] * upto
        epochs += known[:upto].tolist()
        ends.append(int(known[-1]))
    place = np.array(index, dtype=np.intp), np.array(epochs, dtype=np.intp)
    known_epochs = (place[1] + 1).astype(np.float64)
    u, last = curves[place], curves[np.arange(len(curves)), ends]
    return Begun(
        rows=Rows(index=place[0], epoch=known_epochs, u=u, noise=squash.noise(u)),
        epoch=np.array(ends) + 1.0, u=last, noise=squash.noise(last),
    )  # fmt: skip


def spread(
    parameters: Parameters,
    member: NDArray[np.intp],
    sets: Sequence[Curves],
    starts: Sequence[Begun],
    *,
    max_fidelity: int,
) -> float:
    """What deviations must be multiplied by, for 80 % of the ends to lie inside their intervals.

    `sets` lend configurations and mean courses, not their rows.
    """
    off = []
    for one, start in zip(sets, starts, strict=True):
        model = CurveModel(parameters, member, max_fidelity, one.x, one.trend, start.rows)
        mean, sd = model.predict(
            model.own, np.arange(len(one.x)), one.trend, prior_variance(parameters, one.x),
            start.epoch,
        )  # fmt: skip
        off.append(np.abs(start.u - mean) / np.sqrt(sd**2 + start.noise + parameters.noise))
    return float(np.clip(np.quantile(np.concatenate(off), SHARE) / INSIDE, *BOUNDS))

"""How much a candidate is expected to improve on the incumbent, in closed form and in logarithms.

    mean, sd   (n,)   predicted score and its epistemic deviation, noise left out
    best       float or (n,)   incumbent
    z          (mean - best) / sd

Called once an ask over all candidates; decides nothing, keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import erfcx, ndtr  # type: ignore[import-untyped]  # SciPy ships no types

from qtt_core.encoding import Array
from qtt_core.trials import Trial

LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
FAR_TAIL = -1e6
SMALLEST_SD = 1e-9
"""A deviation of zero would make z infinite where mean = best."""


def log_expected_improvement(mean: Array, sd: Array, best: float | Array) -> Array:
    """Log E[max(S - best, 0)] for S ~ N(mean, sd^2), finite wherever its inputs are; (n,).

    Source: Ament et al., LogEI, arXiv 2310.20708, equations 8-10. A direct formula underflows to 0
    for every candidate at once, and argmax then returns index 0.
    """
    sd = np.maximum(sd, SMALLEST_SD)
    return np.asarray(log_h((mean - best) / sd) + np.log(sd))


def log_h(z: Array) -> Array:
    """log(phi(z) + z Phi(z)), to relative precision from z = -1e9 upwards; (n,)."""
    z = np.asarray(z, dtype=np.float64)
    near = np.maximum(z, -1.0)
    direct = np.log(np.exp(-0.5 * near**2 - LOG_ROOT_2PI) + near * ndtr(near))
    tail = np.minimum(z, -1.0)
    middle = np.maximum(tail, FAR_TAIL)
    # phi(z) + z Phi(z) = phi(z) (1 - |z| sqrt(pi/2) erfcx(|z| / sqrt 2)); the bracket goes as 1/z^2
    # and cancels for large |z|: there its series 1/z^2 - 3/z^4 + 15/z^6 - 105/z^8 takes over.
    scaled = -middle * math.sqrt(math.pi / 2) * erfcx(-middle / math.sqrt(2))
    inverse = middle**-2
    series = inverse * (1 - 3 * inverse * (1 - 5 * inverse * (1 - 7 * inverse)))
    bracket = np.where(middle < -100.0, series, np.maximum(1 - scaled, 1e-300))
    lower = -0.5 * middle**2 - LOG_ROOT_2PI + np.log(bracket)
    farthest = -0.5 * tail**2 - LOG_ROOT_2PI - 2 * np.log(-tail)
    return np.asarray(np.where(z > -1.0, direct, np.where(z < FAR_TAIL, farthest, lower)))


def expected_improvement(mean: Array, sd: Array, best: float | Array) -> Array:
    """E[max(S - best, 0)], (n,).

    Source: DyHPO, arXiv 2202.09774, section 4.2; a xi belongs into `best`, so that it enters both
    factors (upstream left it out of the first).
    """
    return np.asarray(np.exp(log_expected_improvement(mean, sd, best)))


def incumbent_at(trials: Sequence[Trial], fidelity: int, rule: str) -> float:
    """The score to beat at an epoch, -inf before the first one.

    `qtt`: the best score seen at any epoch up to it (monotone). `dyhpo`: the best seen at exactly
    that epoch, else the best seen anywhere.
    """
    if rule == "dyhpo":
        exact = [t.scores[fidelity - 1] for t in trials if t.t >= fidelity]
        return max(
            exact, default=max((max(t.scores) for t in trials if t.scores), default=-math.inf)
        )
    return max((max(t.scores[:fidelity]) for t in trials if t.scores), default=-math.inf)


def cooled(alpha: float, spent_share: float) -> float:
    """The cost exponent: alpha at the start, 0 when the budget is spent.

    Source: CArBO (Lee et al., arXiv 2003.10870), cost cooling.
    """
    return max(0.0, alpha * (1 - min(max(spent_share, 0.0), 1.0)))

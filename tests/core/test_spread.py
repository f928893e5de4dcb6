"""Intervals of forecasts hold what they say, on curves that the process itself draws."""

import numpy as np
import pytest
from ConfigSpace import ConfigurationSpace, Float

from qtt_core.encoding import build_encoder
from qtt_core.fitting import Curves
from qtt_core.space import SearchSpace
from qtt_core.spread import begun, spread
from qtt_core.surrogate import (
    Rows,
    Squash,
    config_kernel,
    curve_kernel,
    groups_of,
    prior_parameters,
    progress,
    straight,
)

T, C = 30, 40
CS = ConfigurationSpace()
CS.add(Float("lr", (1e-4, 1.0), log=True))
SPACE = SearchSpace.from_configspace(CS, max_fidelity=T, step=1)
ENCODER = build_encoder(SPACE, None)
PRIOR, (_, MEMBER) = prior_parameters(ENCODER, 0), groups_of(ENCODER)
TREND = straight(np.full(C, 0.5), T)
NOTHING = Rows(
    index=np.array([], dtype=np.intp), epoch=np.array([]), u=np.array([]), noise=np.array([])
)


def drawn(rng, times):
    """(configurations, curves (C, T)): of the process, `times` as far from its mean course."""
    x = ENCODER(SPACE.sample(C, rng))
    index, epoch = np.repeat(np.arange(C), T), np.tile(np.arange(1.0, T + 1), C)
    tau = progress(epoch, T)
    kx = config_kernel(PRIOR, MEMBER, x, x)[np.ix_(index, index)]
    k = curve_kernel(PRIOR, kx, index[:, None] == index[None, :], tau, tau)
    k[np.diag_indices(C * T)] += PRIOR.noise
    off = np.linalg.cholesky(k) @ rng.normal(size=C * T)
    mean = straight(np.full(C * T, 0.5), T)
    at = np.array([np.interp(t, (0.0, 0.18, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0), line)
                   for t, line in zip(tau, mean, strict=True)])  # fmt: skip
    return x, (at + times * off).reshape(C, T)


@pytest.mark.parametrize("times", [1.0, 1.8])
def test_deviations_are_multiplied_by_what_ends_are_off(times):
    rng = np.random.default_rng(3)
    sets, starts = [], []
    for _ in range(6):
        x, curves = drawn(rng, times)
        sets.append(Curves(x=x, trend=TREND, rows=NOTHING))
        starts.append(begun(curves, Squash(), rng))
    found = spread(PRIOR, MEMBER, sets, starts, max_fidelity=T)
    assert found == pytest.approx(times, rel=0.15)


def test_curves_are_cut_at_rungs_and_their_ends_kept():
    curves = np.full((60, 40), np.nan)
    curves[:30, :20] = np.arange(1.0, 21)
    curves[30:, :1] = 7.0
    found = begun(curves, Squash(), np.random.default_rng(0))
    known = [found.rows.epoch[found.rows.index == k].tolist() for k in range(60)]
    assert {len(epochs) for epochs in known[:30]} == {0, 1, 3, 9}
    assert {len(epochs) for epochs in known[30:]} == {0}
    assert all(epochs == list(range(1, len(epochs) + 1)) for epochs in known)
    assert found.epoch.tolist() == [20.0] * 30 + [1.0] * 30
    assert found.u.tolist() == [20.0] * 30 + [7.0] * 30
    assert np.array_equal(found.rows.u, found.rows.epoch)

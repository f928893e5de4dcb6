"""Fits the curve process: maximum a posteriori of all its parameters, network included, in torch.

Called at fixed counts of results, from the ordered history, with nothing carried over from earlier
fits: the same history gives the same parameters. float64, one thread, no global seed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, not in its __all__

from qtt_core.encoding import Array
from qtt_core.surrogate import (
    WIGGLE_LENGTH,
    Parameters,
    Rows,
    course,
    main_effects,
    progress,
)

log = logging.getLogger(__name__)

STEPS = 50
RATE, NETWORK_RATE = 0.08, 0.01
"""Adam's rates for logarithms of parameters and for network weights (10-optimizer 6: one rate for
both never moves the noise)."""

PRIOR_SD = {"groups": 1.0, "scales": 0.5, "noise": 1.0, "level_common": 0.5, "transfer": 0.3}
"""Prior deviation of the logarithm of a parameter, 0.7 where none is given."""
NETWORK_SD = 0.5
"""Prior deviation of a network weight around its start."""
JITTER = 1e-6
SCALARS = tuple(
    f.name for f in fields(Parameters) if f.name not in {"groups", "scales", "hidden", "head"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What one data set shows: configurations (c, D + R), mean courses (c, G), points of them."""

    x: Array
    trend: Array
    rows: Rows


def fit(
    start: Parameters,
    member: NDArray[np.intp],
    sets: Sequence[Curves],
    *,
    max_fidelity: int,
    steps: int = STEPS,
) -> Parameters:
    """Parameters after `steps` of Adam from `start`; `start` itself if the numbers break down.

    One data set in a search; many, that share all parameters, in meta-training.
    """
    problem = _Problem(start, [_Data(start, member, one, max_fidelity) for one in sets])
    try:
        return problem.solve(steps)
    except (LinAlgError, FloatingPointError) as error:
        rows = sum(len(one.rows.u) for one in sets)
        log.warning("fitting %d rows failed (%s); prior parameters stand", rows, error)
        return start


class _Data:
    """Tensors of one data set."""

    def __init__(
        self, start: Parameters, member: NDArray[np.intp], curves: Curves, max_fidelity: int
    ) -> None:
        rows, count = curves.rows, len(start.groups)
        x, psi = np.hsplit(curves.x, [len(start.scales)])
        self.x = torch.from_numpy(x)
        self.transfer = torch.from_numpy(psi @ psi.T)
        self.effects = torch.from_numpy(main_effects(x, x, member, count))
        self.index = torch.from_numpy(rows.index)
        clock = progress(rows.epoch, max_fidelity)
        tau = torch.from_numpy(clock)
        self.hh = torch.outer(1 - tau, 1 - tau)
        self.ou = torch.exp(-(tau[:, None] - tau[None, :]).abs() / WIGGLE_LENGTH)
        self.same = (self.index[:, None] == self.index[None, :]).double()
        self.residual = torch.from_numpy(rows.u - course(curves.trend[rows.index], clock))
        self.noise = torch.from_numpy(rows.noise)


class _Problem:
    """What is learned, and from which data."""

    def __init__(self, start: Parameters, sets: Sequence[_Data]) -> None:
        self.start, self.sets = start, sets
        self.active = torch.from_numpy(start.scales > 0)
        self.logs = {
            name: torch.log(torch.as_tensor(getattr(start, name), dtype=torch.float64))
            for name in ("groups", *SCALARS)
        }
        self.logs["scales"] = torch.log(torch.from_numpy(start.scales[start.scales > 0]))
        self.free = {name: value.clone().requires_grad_() for name, value in self.logs.items()}
        self.layers = {
            name: torch.from_numpy(getattr(start, name).copy()).requires_grad_()
            for name in ("hidden", "head")
        }

    def solve(self, steps: int) -> Parameters:
        optimizer = torch.optim.Adam(
            [
                {"params": list(self.free.values()), "lr": RATE},
                {"params": list(self.layers.values()), "lr": NETWORK_RATE},
            ]
        )
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss {loss.item()}")
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
        return self.result()

    def loss(self) -> torch.Tensor:
        """Negative log marginal likelihood plus the priors' penalties."""
        nll = torch.zeros((), dtype=torch.float64)
        for data in self.sets:
            lower = torch.linalg.cholesky(self.covariance(data))
            alpha = torch.linalg.solve_triangular(lower, data.residual[:, None], upper=False)
            nll = nll + 0.5 * (alpha**2).sum() + lower.diagonal().log().sum()
        for name, value in self.free.items():
            nll = nll + 0.5 * (((value - self.logs[name]) / PRIOR_SD.get(name, 0.7)) ** 2).sum()
        for name, layer in self.layers.items():
            start = torch.from_numpy(getattr(self.start, name))
            nll = nll + 0.5 * (((layer - start) / NETWORK_SD) ** 2).sum()
        return nll

    def covariance(self, data: _Data) -> torch.Tensor:
        value = {name: torch.exp(tensor) for name, tensor in self.free.items()}
        scales = torch.zeros(self.active.shape, dtype=torch.float64)
        scales = scales.masked_scatter(self.active, value["scales"])
        deep = torch.tanh(data.x @ self.layers["hidden"]) @ self.layers["head"]
        phi = torch.cat([data.x * scales, deep], dim=1)
        norm = (phi**2).sum(1)
        distance = (norm[:, None] + norm[None, :] - 2 * phi @ phi.T).clamp_min(0.0)
        kx = torch.tensordot(value["groups"], data.effects, dims=1)
        kx = kx + value["deep"] * torch.exp(-0.5 * distance) + value["transfer"] * data.transfer
        kx = kx[data.index][:, data.index]
        shared = value["level_common"] + value["slope_common"] * data.hh
        shared = shared + kx * (1 + value["slope_x"] * data.hh)
        own = value["level_own"] + value["slope_own"] * data.hh + value["wiggle"] * data.ou
        noise = torch.diag(value["noise"] + data.noise + JITTER)
        covariance: torch.Tensor = shared + data.same * own + noise
        return covariance

    def result(self) -> Parameters:
        value = {name: torch.exp(tensor).detach().numpy() for name, tensor in self.free.items()}
        scales = self.start.scales.copy()
        scales[scales > 0] = value["scales"]
        return replace(
            self.start,
            groups=value["groups"],
            scales=scales,
            hidden=self.layers["hidden"].detach().numpy(),
            head=self.layers["head"].detach().numpy(),
            **{name: float(value[name]) for name in SCALARS},
        )

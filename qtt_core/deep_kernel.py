"""The deep-kernel Gaussian process of the Quick-Tune paper, with its public defects repaired.

Used by `paper_policy`, the faithful reference. One sample is a configuration with the part of its
curve seen so far; its target is the score one step later (10-optimizer 4.1).

    z = (x, prefix y(1..t), mask, t/T)                  an unobserved epoch is masked, never zero
    phi(z) = head(relu([relu(x W_x) | relu(curve W_c)])), 32 dimensions, layer-normalised
    k(z, z') = a exp(-|phi(z) - phi(z')|^2 / (2 l^2)),  mean mu_0, noise variance s
    loss = 1/2 (y - mu_0)' (K + s I)^-1 (y - mu_0) + 1/2 log|K + s I|

Encoder, mu_0, a, l and s are learned together from this data set's results. float64; the epistemic
deviation leaves the noise out (upstream added it and became nearly greedy).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, not in its __all__

from qtt_core.encoding import Array
from qtt_core.gaussian import factor, posterior
from qtt_core.surrogate import squared

log = logging.getLogger(__name__)

WIDTH = 32
CURVE_WIDTH = 16
STEPS = 100
NETWORK_RATE, KERNEL_RATE = 1e-3, 1e-2
"""Two rates: with one the noise never leaves its start (10-optimizer 6)."""
NOISE_START, NOISE_FLOOR = 0.01, 1e-4
JITTER = 1e-6


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs: configurations x (n, D); curves (n, 2T + 1): values, mask, fidelity asked / T."""

    x: Array
    curve: Array


def curve_row(prefix: Sequence[float], fidelity: int, max_fidelity: int) -> Array:
    """A seen prefix and the epoch asked about, (2T + 1,)."""
    row = np.zeros(2 * max_fidelity + 1)
    row[: len(prefix)] = prefix
    row[max_fidelity : max_fidelity + len(prefix)] = 1.0
    row[-1] = fidelity / max_fidelity
    return row


Weights = dict[str, torch.Tensor]


def start(columns: int, curve_columns: int, seed: int) -> Weights:
    """Weights before any training, from an own generator."""
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))

    def layer(rows: int, width: int) -> torch.Tensor:
        weights = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        return weights * math.sqrt(2 / rows)

    return {
        "x": layer(columns, WIDTH),
        "curve": layer(curve_columns, CURVE_WIDTH),
        "head": layer(WIDTH + CURVE_WIDTH, WIDTH),
        "mean": torch.tensor(0.5, dtype=torch.float64),
        "scale": torch.tensor(math.log(0.1), dtype=torch.float64),
        "length": torch.tensor(math.log(4.0), dtype=torch.float64),
        "noise": torch.tensor(math.log(NOISE_START), dtype=torch.float64),
    }


def embedding(weights: Weights, x: torch.Tensor, curve: torch.Tensor) -> torch.Tensor:
    """phi(z), (n, WIDTH)."""
    joint = torch.cat([torch.relu(x @ weights["x"]), torch.relu(curve @ weights["curve"])], dim=1)
    return torch.nn.functional.layer_norm(joint @ weights["head"], (WIDTH,))


def fit(weights: Weights, samples: Samples, y: Array, steps: int = STEPS) -> Weights:
    """Weights after `steps` of Adam on the marginal likelihood; the old ones on a breakdown."""
    free = {name: value.clone().requires_grad_() for name, value in weights.items()}
    network = [free[name] for name in ("x", "curve", "head")]
    kernel = [free[name] for name in ("mean", "scale", "length", "noise")]
    adam = torch.optim.Adam(
        [{"params": network, "lr": NETWORK_RATE}, {"params": kernel, "lr": KERNEL_RATE}]
    )
    x, curve, target = (torch.from_numpy(a) for a in (samples.x, samples.curve, y))
    try:
        for _ in range(steps):
            adam.zero_grad()
            loss = _loss(free, x, curve, target)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss {loss.item()}")
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            adam.step()
    except (LinAlgError, FloatingPointError) as error:
        log.warning("fitting %d samples failed (%s); the start stands", len(y), error)
        return weights
    return {name: value.detach() for name, value in free.items()}


def _loss(
    weights: Weights, x: torch.Tensor, curve: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    phi = embedding(weights, x, curve)
    norm = (phi**2).sum(1)
    distance = (norm[:, None] + norm[None, :] - 2 * phi @ phi.T).clamp_min(0.0)
    kernel = torch.exp(weights["scale"] - 0.5 * distance * torch.exp(-2 * weights["length"]))
    noise = torch.exp(weights["noise"]) + NOISE_FLOOR + JITTER
    lower = torch.linalg.cholesky(kernel + noise * torch.eye(len(target), dtype=torch.float64))
    residual = (target - weights["mean"])[:, None]
    alpha = torch.linalg.solve_triangular(lower, residual, upper=False)
    loss: torch.Tensor = 0.5 * (alpha**2).sum() + lower.diagonal().log().sum()
    return loss / len(target)


class DeepKernel:
    """The process under fixed weights, conditioned on samples. Immutable once built."""

    def __init__(self, weights: Weights, samples: Samples, y: Array) -> None:
        self._weights = weights
        self._phi = self._embed(samples)
        self._mean = float(weights["mean"])
        self._scale = math.exp(float(weights["scale"]))
        self._length = math.exp(float(weights["length"]))
        covariance = self._kernel(self._phi, self._phi)
        covariance[np.diag_indices(len(y))] += math.exp(float(weights["noise"])) + NOISE_FLOOR
        self._lower = factor(covariance)
        self._residual = y - self._mean

    def predict(self, samples: Samples) -> tuple[Array, Array]:
        """Mean and epistemic deviation of the score, each (m,)."""
        prior = np.full(len(samples.x), self._scale)
        if not len(self._residual):
            return np.full(len(samples.x), self._mean), np.sqrt(prior)
        cross = self._kernel(self._phi, self._embed(samples))
        mean, variance = posterior(self._lower, self._residual, cross, prior)
        return self._mean + mean, np.sqrt(variance)

    def _embed(self, samples: Samples) -> Array:
        with torch.no_grad():
            phi = embedding(
                self._weights, torch.from_numpy(samples.x), torch.from_numpy(samples.curve)
            )
        return np.asarray(phi.numpy(), dtype=np.float64)

    def _kernel(self, a: Array, b: Array) -> Array:
        return np.asarray(self._scale * np.exp(-0.5 * squared(a, b) / self._length**2))

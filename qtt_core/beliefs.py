"""What is believed of a configuration before this data set has shown anything.

Cold: model cards and rules of thumb. Warm: a meta-learned prior. `forecast`, `evidence` and
`policy` read both alike; what is measured afterwards corrects them.

    n   configurations        G   points of the clock (surrogate.GRID)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from qtt_core.encoding import Array, Encoder
from qtt_core.hub import Hub
from qtt_core.prior import MetaPrior
from qtt_core.steps import Config
from qtt_core.surrogate import Parameters, groups_of, prior_parameters, straight


class Beliefs(Protocol):
    """Pure functions of configurations."""

    @property
    def informed(self) -> bool:
        """Whether other data sets have spoken."""

    def trend(self, configs: Sequence[Config]) -> Array:
        """Mean course of u, (n, G)."""

    def transfer(self, configs: Sequence[Config]) -> Array | None:
        """Psi of the curve process, (n, R); None: nothing is known."""

    def parameters(self, encoder: Encoder, seed: int) -> Parameters:
        """Of the curve process, before anything was fitted."""

    @property
    def spread(self) -> float:
        """How much too sure the process is of where training ends."""

    def log_seconds(self, configs: Sequence[Config]) -> Array | None:
        """Log seconds of an epoch, (n,); None: nothing is known."""

    @property
    def seconds_sd(self) -> tuple[float, float]:
        """How far the level of `log_seconds` is off on a new data set, and how far single ones."""

    def finish(self, configs: Sequence[Config]) -> Array | None:
        """P(finish), (n,); None: nothing is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdBeliefs:
    """Cards and common sense; flat with `meta_learning` off."""

    hub: Hub | None
    max_fidelity: int
    meta_learning: bool = True
    informed: ClassVar[bool] = False

    def trend(self, configs: Sequence[Config]) -> Array:
        """Curves of one shape that end where card and learning rate say."""
        return straight(self._level(configs), self.max_fidelity)

    def transfer(self, configs: Sequence[Config]) -> Array | None:
        """Nothing."""

    def parameters(self, encoder: Encoder, seed: int) -> Parameters:
        """The process' own prior."""
        return prior_parameters(encoder, seed)

    @property
    def spread(self) -> float:
        """As made-up data sets say (benchmarks/calibration.py)."""
        return 1.2

    def log_seconds(self, configs: Sequence[Config]) -> Array | None:
        """Nothing: the cost model has its own prior by column."""

    @property
    def seconds_sd(self) -> tuple[float, float]:
        """Nothing."""
        return math.inf, math.inf

    def finish(self, configs: Sequence[Config]) -> Array | None:
        """Nothing: the failure model has its own rate."""

    def _level(self, configs: Sequence[Config]) -> Array:
        if not self.meta_learning:
            return np.zeros(len(configs))
        accuracy = {card.name: card.accuracy for card in (self.hub.cards if self.hub else ())}
        known = [value for value in accuracy.values() if value is not None]
        middle = sorted(known)[len(known) // 2] if known else 0.0
        return np.array([_rule_of_thumb(config, accuracy, middle) for config in configs])


def _rule_of_thumb(
    config: Mapping[str, object], accuracy: Mapping[str, float | None], middle: float
) -> float:
    """Logits that a card and common sense are worth.

    Learning rate and optimizer: the means by value over the public Quick-Tune micro runs
    (10-optimizer 10), as a parabola in log10 lr and an offset for plain SGD.
    """
    level = 0.5
    card = accuracy.get(str(config.get("model")))
    if card is not None:
        level += 5.0 * (card - middle)
    lr = config.get("lr")
    if isinstance(lr, float | int) and lr > 0:
        level -= 0.4 * (math.log10(lr) + 3.1) ** 2
    if config.get("opt") == "sgd":
        level -= 0.5
    return level


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmBeliefs:
    """A meta-learned prior, asked about one data set."""

    prior: MetaPrior
    metafeatures: Mapping[str, float]
    informed: ClassVar[bool] = True

    def trend(self, configs: Sequence[Config]) -> Array:
        """The prior's."""
        return self.prior.trend(configs, self.metafeatures)

    def transfer(self, configs: Sequence[Config]) -> Array | None:
        """The prior's."""
        return self.prior.transfer(configs, self.metafeatures)

    def parameters(self, encoder: Encoder, seed: int) -> Parameters:
        """The prior's, by column name; columns it has never seen begin as in a cold start."""
        return adapted(self.prior.parameters, self.prior.columns, encoder, seed)

    @property
    def spread(self) -> float:
        """The prior's."""
        return self.prior.spread

    def log_seconds(self, configs: Sequence[Config]) -> Array | None:
        """The prior's."""
        if "seconds" not in self.prior.forests:
            return None
        return self.prior.log_seconds(configs, self.metafeatures)

    @property
    def seconds_sd(self) -> tuple[float, float]:
        """The prior's."""
        return self.prior.pace.sd, self.prior.seconds_sd

    def finish(self, configs: Sequence[Config]) -> Array | None:
        """The prior's."""
        if "finish" not in self.prior.forests:
            return None
        return self.prior.finish(configs, self.metafeatures)


def adapted(learned: Parameters, columns: Sequence[str], encoder: Encoder, seed: int) -> Parameters:
    """Learned parameters of one encoder, for another that shares column names."""
    if tuple(columns) == encoder.columns:
        return learned
    start = prior_parameters(encoder, seed)
    here, _ = groups_of(encoder)
    there, _ = groups_of(replace(encoder, columns=tuple(columns)))
    known = {name: float(learned.groups[i]) for i, name in enumerate(there)}
    position = {name: i for i, name in enumerate(columns)}
    at = [position.get(name) for name in encoder.columns]
    pairs = list(zip(at, range(len(at)), strict=True))
    return replace(
        learned,
        groups=np.array([known.get(n, g) for n, g in zip(here, start.groups, strict=True)]),
        scales=np.array([start.scales[j] if i is None else learned.scales[i] for i, j in pairs]),
        hidden=np.array([start.hidden[j] if i is None else learned.hidden[i] for i, j in pairs]),
    )

"""Configurations as rows of numbers, by 10-optimizer 3.

A pure function of (space, hub, metafeatures): no statistic is learned from the rows it encodes
and columns never move. Cost, failure and curve models all read these rows. Every hyperparameter
moves at least one column; a test perturbs each (the public tool sliced columns off unseen).

    n   configurations
    D   columns
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtt_core.hub import Hub, ModelCard
from qtt_core.space import SearchSpace
from qtt_core.steps import Config, Scalar

Array = NDArray[np.float64]
Column = tuple[str, Callable[[Config], float]]

LOGARITHMIC = frozenset(
    (
        "lr",
        "weight_decay",
        "sp_reg",
        "delta_reg",
        "bss_reg",
        "cotuning_reg",
        "mixup",
        "cutmix",
        "batch_size",
        "clip_grad",
        "warmup_lr",
    )
)
"""Hyperparameters whose effect goes with the logarithm; zero or off has a flag of its own."""

REFERENCE_PIXELS = 224
LOG_SPAN = 10.0
"""Numbers whose largest exceeds this many times the smallest are read by logarithm."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Named columns and the functions that fill them."""

    columns: tuple[str, ...]
    _functions: tuple[Callable[[Config], float], ...]

    def __call__(self, configs: Sequence[Config]) -> Array:
        """Canonical configurations -> (n, D), finite, roughly within [-1, 1]."""
        rows = [[function(config) for function in self._functions] for config in configs]
        return np.array(rows, dtype=np.float64).reshape(len(configs), len(self.columns))

    def named(self, prefixes: Sequence[str]) -> NDArray[np.intp]:
        """Positions of the columns whose names start with one of the prefixes."""
        found = [i for i, name in enumerate(self.columns) if name.startswith(tuple(prefixes))]
        return np.array(found, dtype=np.intp)


def build_encoder(
    space: SearchSpace,
    hub: Hub | None = None,
    metafeatures: Mapping[str, float] | None = None,
    guests: Sequence[ModelCard] = (),
) -> Encoder:
    """The encoder of a space; without a hub there are no card columns.

    `guests`: cards of models that the hub lacks. They are described by what cards say and move no
    column: a family of their own has none.
    """
    metafeatures = metafeatures or {}
    columns: list[Column] = []
    for name in space.names:
        columns += _hyperparameter(space, name, metafeatures)
    if hub is not None and "model" in space.names:
        columns += _card_columns(hub, guests)
    columns += _derived(hub, metafeatures, guests)
    columns += [
        column for name in sorted(metafeatures) for column in _metafeature(name, metafeatures)
    ]
    return Encoder(tuple(name for name, _ in columns), tuple(function for _, function in columns))


# --- hyperparameters -----------------------------------------------------------------------------


def _hyperparameter(
    space: SearchSpace, name: str, metafeatures: Mapping[str, float]
) -> list[Column]:
    """The columns of one hyperparameter; a fixed one has none."""
    columns = _values(space, name, metafeatures)
    conditional = bool(space.configspace.parent_conditions_of[name])
    return [*columns, _inactive(name)] if columns and conditional else columns


def _values(space: SearchSpace, name: str, metafeatures: Mapping[str, float]) -> list[Column]:
    choices = space.legal(name)
    if choices is None:
        numeric = space.configspace[name]
        low, high = float(numeric.lower), float(numeric.upper)  # type: ignore[attr-defined]  # range
        log = bool(numeric.log)  # type: ignore[attr-defined]  # only ranges have no choices
        return _numeric(name, low, high, log=log, flagged=False)
    if len(choices) < 2:
        return []
    numbers = [float(c) for c in choices if isinstance(c, int | float) and not isinstance(c, bool)]
    rest = [c for c in choices if isinstance(c, bool) or not isinstance(c, int | float)]
    if set(map(_text, choices)) == {"true", "false"}:
        return [(name, lambda config: float(_text(config.get(name)) == "true"))]
    if len(numbers) >= 2 and set(map(_text, rest)) <= {"none"}:
        return _numbers(name, numbers, flagged=bool(rest) or 0.0 in numbers, meta=metafeatures)
    return _one_hot(name, choices)


def _numbers(
    name: str, numbers: Sequence[float], *, flagged: bool, meta: Mapping[str, float]
) -> list[Column]:
    positive = [number for number in numbers if number > 0]
    log = bool(positive) and min(numbers) >= 0
    log = log and (name in LOGARITHMIC or max(positive) / min(positive) > LOG_SPAN)
    low = min(positive) if log else min(numbers)
    columns = _numeric(name, low, max(numbers), log=log, flagged=flagged)
    if name == "batch_size" and "n_train" in meta:
        columns.append(("batch_size:run", _clipped_batch(low, max(numbers), meta["n_train"])))
    return columns


def _numeric(name: str, low: float, high: float, *, log: bool, flagged: bool) -> list[Column]:
    """[-1, 1] over the range (by logarithm), and a flag for zero or off."""

    def position(config: Config) -> float:
        value = _number(config.get(name))
        if value is None or (log and value <= 0):
            return 0.0
        return _scaled(value, low, high, log=log)

    def off(config: Config) -> float:
        value = config.get(name)
        return float(value is not None and not _number(value))

    columns: list[Column] = [(name, position)]
    return [*columns, (f"{name}:off", off)] if flagged else columns


def _scaled(value: float, low: float, high: float, *, log: bool) -> float:
    if high <= low:
        return 0.0
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return 2 * (value - low) / (high - low) - 1


def _clipped_batch(low: float, high: float, n_train: float) -> Callable[[Config], float]:
    """The batch that really runs: never more than the training images."""

    def function(config: Config) -> float:
        batch = _number(config.get("batch_size"))
        limit = max(n_train, 1.0) if math.isfinite(n_train) else math.inf
        return 0.0 if not batch else _scaled(min(batch, limit), low, high, log=True)

    return function


def _one_hot(name: str, choices: Sequence[Scalar]) -> list[Column]:
    def equals(text: str) -> Callable[[Config], float]:
        return lambda config: float(name in config and _text(config[name]) == text)

    return [(f"{name}={_text(choice)}", equals(_text(choice))) for choice in choices]


def _inactive(name: str) -> Column:
    return f"{name}:inactive", lambda config: float(name not in config)


def _text(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _number(value: object) -> float | None:
    """A number, or None for anything else; booleans count as 0 and 1."""
    return float(value) if isinstance(value, int | float) else None


# --- cards, derived quantities, data set --------------------------------------------------


def _card_columns(hub: Hub, guests: Sequence[ModelCard]) -> list[Column]:
    """What the card says: two unseen models with like cards have like rows."""
    cards = {card.name: card for card in (*guests, *hub.cards)}
    facts: dict[str, Callable[[ModelCard], float]] = {
        "card:params": lambda card: math.log10(max(card.params, 1)) / 4 - 1.75,
        "card:gmacs": lambda card: math.log10(max(card.gmacs, 1e-6)) / 2,
        "card:pixels": lambda card: card.input_size / REFERENCE_PIXELS - 1,
        "card:accuracy": lambda card: _logit(card.accuracy) / 2,
        "card:accuracy_missing": lambda card: float(card.accuracy is None),
        "card:batchnorm": lambda card: float(card.batchnorm),
    }
    for family in sorted({card.family for card in hub.cards}):
        facts[f"card:family={family}"] = _is_family(family)

    def of(fact: Callable[[ModelCard], float]) -> Callable[[Config], float]:
        values = {name: fact(card) for name, card in cards.items()}
        return lambda config: values.get(str(config.get("model")), 0.0)

    return [(name, of(fact)) for name, fact in facts.items()]


def _is_family(family: str) -> Callable[[ModelCard], float]:
    return lambda card: float(card.family == family)


def _logit(accuracy: float | None) -> float:
    if accuracy is None:
        return 0.0
    clipped = min(max(accuracy, 1e-3), 1 - 1e-3)
    return math.log(clipped / (1 - clipped))


def _derived(
    hub: Hub | None, metafeatures: Mapping[str, float], guests: Sequence[ModelCard]
) -> list[Column]:
    """Head-only flag, trainable parameters, updates an epoch, learning rate per image."""
    known = hub.cards if hub is not None else ()
    params = {card.name: float(card.params) for card in (*guests, *known)}
    n_train = metafeatures.get("n_train")

    def trainable(config: Config) -> float:
        count = params.get(str(config.get("model")), 1.0)
        return math.log10(1 + count * trainable_share(config)) / 4 - 1.75

    def updates(config: Config) -> float:
        batch = _number(config.get("batch_size"))
        if not batch or not n_train or not math.isfinite(n_train):
            return 0.0
        return math.log10(1 + n_train / batch) / 2 - 1

    def rate(config: Config) -> float:
        lr, batch = _number(config.get("lr")), _number(config.get("batch_size"))
        return 0.0 if not lr or not batch else (math.log10(lr / batch) + 5) / 3

    return [
        ("derived:head_only", lambda config: float(trainable_share(config) == 0.0)),
        ("derived:trainable", trainable),
        ("derived:updates", updates),
        ("derived:lr_per_image", rate),
    ]


def trainable_share(config: Config) -> float:
    """Share of the backbone that trains: 0 with linear probing or everything frozen."""
    if config.get("linear_probing") is True:
        return 0.0
    return 1.0 - (_number(config.get("pct_to_freeze")) or 0.0)


def _metafeature(name: str, metafeatures: Mapping[str, float]) -> list[Column]:
    """One descriptor of the data set: log-scaled above 1, and a flag for missing."""
    value = float(metafeatures[name])
    known = math.isfinite(value)
    scaled = math.copysign(math.log1p(abs(value)) / 5, value) if known else 0.0
    return [
        (f"data:{name}", lambda _: scaled),
        (f"data:{name}:missing", lambda _: float(not known)),
    ]

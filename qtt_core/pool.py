"""The candidates of a search: initial configurations, the default, and a stratified random draw.

Called once when an optimizer is built, and again when candidates near the best are added. A pure
function of (space, seed, options): the same arguments give the same ids.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from qtt_core.errors import SpecError
from qtt_core.hub import Hub
from qtt_core.space import SearchSpace
from qtt_core.steps import Config, canonical_json

OVERSAMPLING = 4
"""Draws per wanted candidate, so that every model finds its share after duplicates went."""


def generator(seed: int, tag: str, counter: int = 0) -> np.random.Generator:
    """An own random stream for each (seed, purpose, counter)."""
    return np.random.default_rng([seed & (2**63 - 1), zlib.crc32(tag.encode()), counter])


def key(config: Config) -> str:
    """What makes two configurations the same candidate."""
    return canonical_json(dict(config))


def initial_candidates(
    space: SearchSpace, initial: Sequence[Config], hub: Hub | None
) -> tuple[list[Config], int]:
    """Candidates that come before the draw, and how many of them the user named.

    Order: the user's initial configurations, the space's default, the default of every other model.
    """
    named = distinct(space.canonical(config) for config in initial)
    anchors = [
        space.default(),
        *(_default_of(space, card.name) for card in (hub.cards if hub else ())),
    ]
    found = distinct([*named, *(config for config in anchors if config is not None)])
    return found, len(named)


def draw(
    space: SearchSpace, *, size: int, rng: np.random.Generator, known: Sequence[Config]
) -> list[Config]:
    """New candidates until `size` are known in all, spread evenly over the models.

    A small space may hold fewer: the draw ends when it finds nothing new.
    """
    wanted = size - len(known)
    if wanted <= 0:
        return []
    seen = {key(config) for config in known}
    fresh = [c for c in distinct(space.sample(OVERSAMPLING * wanted, rng)) if key(c) not in seen]
    return stratified(fresh, wanted)


def stratified(configs: Sequence[Config], size: int) -> list[Config]:
    """At most `size` configurations, one model after the other in turn, first seen first."""
    by_model: dict[object, list[Config]] = {}
    for config in configs:
        by_model.setdefault(config.get("model"), []).append(config)
    queues = sorted(by_model.items(), key=lambda item: str(item[0]))
    longest = max((len(queue) for _, queue in queues), default=0)
    turns = [queue[i] for i in range(longest) for _, queue in queues if i < len(queue)]
    return turns[:size]


def distinct(configs: Iterable[Config]) -> list[Config]:
    """The configurations without repetitions, in order of first appearance."""
    first: dict[str, Config] = {}
    for config in configs:
        first.setdefault(key(config), config)
    return list(first.values())


def _default_of(space: SearchSpace, model: str) -> Config | None:
    """The default configuration with another model; None where the space has no such choice."""
    try:
        return space.canonical({"model": model})
    except SpecError:
        return None

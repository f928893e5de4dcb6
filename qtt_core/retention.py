"""Which checkpoints a run keeps (30-kubernetes 1.2 `checkpoint.retention`, 5.5). Pure.

Paths to delete come from the ledger, never from globbing ages. While a run goes on, the newest
checkpoint of every configuration that may be continued stays whatever the policy says; once it is
over, only what the policy names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import nsmallest

from qtt_core.history import ConfigHistory, Histories
from qtt_core.ledger.events import Done, Event
from qtt_core.results import State
from qtt_core.steps import Recommendation

Kept = tuple[int, int]
"""(config id, epoch of the checkpoint)."""


def committed(events: Iterable[Event]) -> dict[int, tuple[int, ...]]:
    """Config id -> epochs with a committed checkpoint, ascending: one per ended job."""
    found: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, Done) and event.state == State.OK and event.c.isdigit():
            found.setdefault(int(event.c), []).append(event.to)
    return {config: tuple(sorted(set(epochs))) for config, epochs in found.items()}


def best_checkpoint(
    epochs: tuple[int, ...], history: ConfigHistory, wanted: int | None = None
) -> int | None:
    """The committed epoch nearest to the wanted one (default: the best); the later on a tie."""
    target = wanted if wanted is not None else history.best_epoch
    if not epochs or target is None:
        return None
    return min(epochs, key=lambda epoch: (abs(epoch - target), -epoch))


def ranked(histories: Mapping[int, ConfigHistory], count: int) -> list[ConfigHistory]:
    """The best configurations with a score; ties by fewer seconds, then by id."""
    if isinstance(histories, Histories):
        return histories.best(count)
    ranks = nsmallest(count, (h.rank for h in histories.values() if h.rank is not None))
    return [histories[config_id] for _, _, config_id in ranks]


def chosen(
    retention: str,
    top_k: int,
    histories: Mapping[int, ConfigHistory],
    points: Mapping[int, tuple[int, ...]],
    recommendation: Recommendation | None,
) -> frozenset[Kept]:
    """The checkpoints that the policy itself keeps (`All`, `TopK`, `Incumbent` or `None`)."""
    if retention == "All":
        return frozenset((c, epoch) for c, epochs in points.items() for epoch in epochs)
    kept: set[Kept] = set()
    if retention in {"Incumbent", "TopK"} and recommendation is not None:
        c = recommendation.config_id
        epoch = best_checkpoint(points.get(c, ()), histories[c], recommendation.fidelity)
        kept |= {(c, epoch)} if epoch is not None else set()
    if retention == "TopK":
        for history in ranked(histories, top_k):
            epoch = best_checkpoint(points.get(history.config_id, ()), history)
            kept |= {(history.config_id, epoch)} if epoch is not None else set()
    return frozenset(kept)


def garbage(
    kept: frozenset[Kept], points: Mapping[int, tuple[int, ...]], config: int
) -> tuple[str, ...]:
    """Folders of one configuration that its next job may delete: superseded and not kept."""
    return tuple(
        f"c{config}/f{epoch}"
        for epoch in points.get(config, ())[:-1]
        if (config, epoch) not in kept
    )


def final_garbage(kept: frozenset[Kept], points: Mapping[int, tuple[int, ...]]) -> tuple[str, ...]:
    """Folders that may go once the run is over."""
    return tuple(
        f"c{c}/f{epoch}"
        for c, epochs in sorted(points.items())
        for epoch in epochs
        if (c, epoch) not in kept
    )

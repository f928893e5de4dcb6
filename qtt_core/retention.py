"""Which checkpoints a run keeps (30-kubernetes 1.2 `checkpoint.retention`, 5.5). Pure.

Paths to delete come from the ledger, never from globbing ages. While a run goes on, the newest
checkpoint of every configuration that may be continued stays whatever the policy says; once it is
over, only what the policy names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from heapq import nsmallest

from qtt_core.history import ConfigHistory, Histories
from qtt_core.ledger.events import Cancel, Done, Event, Fail, Note, Open, Retry
from qtt_core.results import State
from qtt_core.steps import Recommendation, nonce

Kept = tuple[int, int]
"""(config id, epoch of the checkpoint)."""

_Attempt = tuple[int, int]
"""(target epoch, attempt)."""


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


def survivors(history: ConfigHistory) -> tuple[int, ...]:
    """Checkpoints that no later job has deleted, whatever the policy: the best and the newest."""
    if not history.saved:
        return ()
    best, _ = max(history.saved, key=lambda point: (point[1], -point[0]))
    return tuple(sorted({best, history.saved[-1][0]}))


def recommended(history: ConfigHistory, recommendation: Recommendation) -> int | None:
    """The epoch of the checkpoint that stands for a recommendation."""
    return best_checkpoint(survivors(history), history, recommendation.fidelity)


# --- once nothing continues a configuration -------------------------------------------------------

GARBAGE_NOTE = "garbage"
"""`what` of a note: `new` lists deleted paths as JSON; without it, `old` says why none were."""

FAILURE_LOGS = 20
"""Attempts that ended badly whose logs stay, over the whole run."""


def swept(events: Iterable[Event]) -> tuple[frozenset[str], frozenset[Kept]]:
    """What `garbage` Jobs deleted: paths that are not there, and checkpoints among them.

    A configuration that was opened again afterwards may have files again.
    """
    paths: set[str] = set()
    points: dict[int, set[int]] = {}
    gone: set[Kept] = set()
    for event in events:
        if isinstance(event, Note) and event.what == GARBAGE_NOTE and event.new:
            for path in json.loads(event.new):
                paths.add(path)
                gone |= _points_below(path, points)
        elif isinstance(event, Open) and event.c.isdigit():
            paths = {path for path in paths if _config_of(path) != int(event.c)}
        elif isinstance(event, Done):
            points.setdefault(int(event.c), set()).add(event.to)
            gone.discard((int(event.c), event.to))
    return frozenset(paths), frozenset(gone)


def was_swept(notes: Iterable[Note], c: str, epoch: int) -> bool:
    """Whether the checkpoint that a configuration would go on from may be deleted."""
    wanted = {f"c{c}", f"c{c}/f{epoch}"}
    listed = (note.new for note in notes if note.what == GARBAGE_NOTE and note.new)
    return any(not wanted.isdisjoint(json.loads(paths)) for paths in listed)


def final_garbage(
    kept: Collection[Kept], events: Sequence[Event], only: Collection[int] | None = None
) -> tuple[str, ...]:
    """Folders below a run's that nothing will read again: those of all, or `only` of some configs.

    What a kept checkpoint needs stays, and the logs of the newest failures; a configuration without
    either goes as a whole. Every path comes from a decision in the ledger.
    """
    traces, failures = _traces(events)
    logs = set(failures[-FAILURE_LOGS:])
    found: list[str] = []
    for c, attempts in sorted(traces.items()):
        if only is not None and c not in only:
            continue
        epochs = {epoch for config, epoch in kept if config == c}
        if not epochs and not any(config == c for config, _, _ in logs):
            found.append(f"c{c}")
            continue
        found += _leftovers(c, attempts, epochs, {(to, a) for config, to, a in logs if config == c})
    return tuple(found)


def without(paths: Iterable[str], gone: Collection[str]) -> tuple[str, ...]:
    """The paths that are not deleted yet, alone or with the folder around them."""
    return tuple(p for p in paths if p not in gone and p.split("/", 1)[0] not in gone)


def _leftovers(
    c: int, attempts: Mapping[_Attempt, str], epochs: set[int], logs: set[_Attempt]
) -> Iterator[str]:
    """Inside one configuration: superseded steps, unfinished states, logs that nobody needs."""
    targets = {to for to, _ in attempts}
    for to in sorted(targets - epochs):
        yield f"c{c}/f{to}"
        yield f"c{c}/f{to}.part"
    for (to, a), mark in sorted(attempts.items()):
        yield f"c{c}/.f{to}.a{a}.{mark}"  # as the trainer names what it is writing
        yield f"c{c}/.f{to}.part.a{a}.{mark}"
        if to not in epochs and (to, a) not in logs:
            yield f"c{c}/attempts/f{to}.a{a}"
    if not epochs:
        yield f"c{c}/progress.json"


def _traces(
    events: Iterable[Event],
) -> tuple[dict[int, dict[_Attempt, str]], list[tuple[int, int, int]]]:
    """Config id -> attempt -> nonce of every attempt begun; and the ones that ended badly."""
    decisions: dict[str, str] = {}
    traces: dict[int, dict[_Attempt, str]] = {}
    failures = []
    for event in events:
        if not isinstance(event, Open | Retry | Cancel | Fail) or not event.c.isdigit():
            continue
        c, a = int(event.c), event.a
        if isinstance(event, Open):
            decisions[event.c] = event.h
        if isinstance(event, Open | Retry):
            traces.setdefault(c, {})[event.to, a] = nonce(decisions[event.c], a)
        if not isinstance(event, Open):
            failures.append((c, event.to, a - 1 if isinstance(event, Retry) else a))
    return traces, failures


def _points_below(path: str, points: Mapping[int, Collection[int]]) -> set[Kept]:
    c = _config_of(path)
    return {(c, e) for e in points.get(c, ()) if path in {f"c{c}", f"c{c}/f{e}"}}


def _config_of(path: str) -> int:
    """`c12/f3` -> 12; -1 for a path of no configuration."""
    number = path.split("/", 1)[0].removeprefix("c")
    return int(number) if number.isdecimal() else -1

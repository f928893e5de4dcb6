"""A ledger in memory: the fake that passes `LedgerContract` like the one in Redis.

Planner and turn tests, and the simulated run, use it in place of a server. It states the rules of
the scripts (30-kubernetes 3.2) once more in plain Python, and every event crosses the wire form, so
that nothing survives here that Redis would lose. It keeps nothing on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from qtt_core.errors import LedgerError
from qtt_core.ledger.events import (
    EVALUATION,
    Cancel,
    Close,
    Done,
    Event,
    Fail,
    Note,
    Open,
    Prepared,
    Reopen,
    Retry,
    Run,
    WeightsFetched,
    done_key,
    from_fields,
    is_charged,
    is_evaluation,
    step_targets,
    to_fields,
)
from qtt_core.ledger.fold import step_epochs
from qtt_core.ledger.reply import Reply
from qtt_core.steps import Config, canonical_json

Answer = tuple[Reply, str]


@dataclass(slots=True, kw_only=True)
class OpenRow:
    """One entry of the hash `open`."""

    frm: int
    to: int
    attempt: int
    job: str
    decision: str


@dataclass(slots=True, kw_only=True)
class MemoryStore:
    """What one run's keys hold; shared by the writers of several epochs."""

    log: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    cfg: dict[str, str] = field(default_factory=dict)
    open: dict[str, OpenRow] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    head: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    snapshots: list[tuple[str, str, bytes]] = field(default_factory=list)
    epoch: int = 0
    closed: bool = False
    step: int = 1


def _ticks() -> Callable[[], float]:
    """A clock for tests: one millisecond a write, from a fixed start."""
    ticks = count(1_700_000_000_000)
    return lambda: next(ticks) / 1000


class MemoryLedger:
    """One writer of a run's stream. `clock` gives seconds since 1970 and is read once a write."""

    def __init__(
        self,
        *,
        epoch: int = 1,
        store: MemoryStore | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.epoch = epoch
        self.store = store if store is not None else MemoryStore()
        self.clock = clock if clock is not None else _ticks()

    def writer(self, epoch: int) -> MemoryLedger:
        """Another writer of the same run."""
        return MemoryLedger(epoch=epoch, store=self.store, clock=self.clock)

    async def read(self, after: str = "0-0") -> list[Event]:
        """Events behind a stream id, in order. Raises: LedgerError if that event is gone."""
        start = _order(after)
        if after != "0-0" and after not in (i for i, _ in self.store.log):
            raise LedgerError(f"the store has lost event {after} and what came with it")
        return [from_fields(i, wire) for i, wire in self.store.log if _order(i) > start]

    async def configs(self) -> dict[str, Config]:
        """Config id -> canonical configuration of every opened configuration."""
        return {c: json.loads(text) for c, text in self.store.cfg.items()}

    async def open(self, event: Open, *, config: Config | None, job: str) -> Answer:
        """Record a decision; (reply, stream id or "")."""
        store, c = self.store, event.c
        text = canonical_json(config) if config is not None else ""
        keys = [done_key(c, to) for to in step_targets(event.frm, event.to, store.step)]
        if (stale := self._fenced()) is not None:
            return stale
        if store.closed and not is_evaluation(c):
            return Reply.CLOSED, ""
        if text and store.cfg.get(c, text) != text:
            return Reply.CONFLICT, ""
        if any(key in store.done for key in keys):
            return Reply.DONE, ""
        if c in store.open:
            return Reply.BUSY, ""
        if event.frm != store.head.get(c, 0):
            return Reply.GAP, ""
        if text:
            store.cfg[c] = text
        store.open[c] = OpenRow(
            frm=event.frm, to=event.to, attempt=event.a, job=job, decision=event.h
        )
        self._count(opens=1)
        return Reply.OK, self._append(event)

    async def commit(self, event: Done | Fail | Retry | Cancel, *, job: str = "") -> Answer:
        """Record an end exactly once; `event.a` of a Retry is the new attempt, `job` its Job."""
        store = self.store
        ended = event.a - 1 if isinstance(event, Retry) else event.a
        refusal = self._refused(done_key(event.c, event.to)) or self._not_open(
            event.c, event.to, ended
        )
        if refusal is not None:
            return refusal
        stream_id = self._append(event)
        row = store.open[event.c]
        if is_charged(event.c):
            self._count(charged_ms=_ms(event.dev), overhead_ms=_ms(event.ov), queue_ms=_ms(event.q))
        if isinstance(event, Retry):
            store.open[event.c] = replace(row, attempt=event.a, job=job or row.job)
            self._count(retries=1)
            return Reply.OK, stream_id
        del store.open[event.c]
        if isinstance(event, Cancel):
            self._count(cancels=1)
        else:
            self._settle(event, row, stream_id)
        return Reply.OK, stream_id

    async def note(self, event: Event, *, key: str) -> Answer:
        """Record run, prepared, weights, note, close or reopen once per deduplication key."""
        store = self.store
        pseudo = _pseudo(event)
        refusal = self._refused(key) or (self._not_open(*pseudo) if pseudo is not None else None)
        if refusal is not None:
            return refusal
        stream_id = self._append(event)
        store.done[key] = stream_id
        if pseudo is not None:
            c, to, _ = pseudo
            del store.open[c]
            store.head[c] = to
            store.done[done_key(c, to)] = stream_id
        if isinstance(event, Prepared):
            self._count(charged_ms=_ms(event.dev))
        elif isinstance(event, Run):
            store.step = step_epochs(event)
        elif isinstance(event, Close | Reopen):
            store.closed = isinstance(event, Close)
        return Reply.OK, stream_id

    async def fence(self) -> Reply:
        """Shut out writers of older epochs."""
        refusal = self._fenced()
        self.store.epoch = max(self.store.epoch, self.epoch)
        return refusal[0] if refusal is not None else Reply.OK

    async def counters(self) -> dict[str, int]:
        """Steps, ends and charged milliseconds so far, as dashboards read them."""
        return dict(self.store.counters)

    async def save_snapshot(self, stream_id: str, data: bytes, *, version: str) -> Reply:
        """Keep an optimizer's state as of a stream id, and the one before it."""
        store = self.store
        if (stale := self._fenced()) is not None:
            return stale[0]
        if not store.log or _order(stream_id) > _order(store.log[-1][0]):
            return Reply.UNKNOWN
        store.snapshots = [(stream_id, version, data), *store.snapshots[:1]]
        return Reply.OK

    async def load_snapshots(self) -> Sequence[tuple[str, str, bytes]]:
        """(stream id, version, data), newest first; at most two."""
        return tuple(self.store.snapshots)

    # --- the checks, in the scripts' order ---

    def _fenced(self) -> Answer | None:
        if self.epoch < self.store.epoch:
            return Reply.STALE, ""
        return None

    def _refused(self, key: str) -> Answer | None:
        if (stale := self._fenced()) is not None:
            return stale
        return (Reply.DUP, "") if key in self.store.done else None

    def _not_open(self, c: str, to: int, attempt: int) -> Answer | None:
        row = self.store.open.get(c)
        if row is None or row.to != to:
            return Reply.UNKNOWN, ""
        return (Reply.OLDATTEMPT, "") if row.attempt != attempt else None

    # --- the effects ---

    def _settle(self, event: Done | Fail, row: OpenRow, stream_id: str) -> None:
        store = self.store
        keys, steps = [done_key(event.c, event.to)], 1
        if isinstance(event, Done):
            keys = [done_key(event.c, to) for to in step_targets(row.frm, row.to, store.step)]
            steps = event.steps(row.frm, store.step)
            if event.last_epoch is not None:
                store.head[event.c] = max(store.head.get(event.c, 0), event.last_epoch)
        store.done |= dict.fromkeys(keys, stream_id)
        self._count(steps=steps, **{"dones" if isinstance(event, Done) else "fails": 1})

    def _append(self, event: Event) -> str:
        store = self.store
        store.epoch = max(store.epoch, self.epoch)
        now = int(self.clock() * 1000 + 0.5)
        last, sequence = _order(store.log[-1][0]) if store.log else (0, 0)
        stream_id = f"{now}-0" if now > last else f"{last}-{sequence + 1}"
        store.log.append((stream_id, to_fields(replace(event, ep=self.epoch))))
        return stream_id

    def _count(self, **amounts: int) -> None:
        counters = self.store.counters
        for name, amount in amounts.items():
            counters[name] = counters.get(name, 0) + amount


def _pseudo(event: Event) -> tuple[str, int, int] | None:
    """(pseudo-configuration, target, attempt) that a note ends, None where it ends nothing."""
    if isinstance(event, Prepared | WeightsFetched):
        return event.c, event.to, event.a
    if isinstance(event, Note) and event.what == EVALUATION:
        return event.c, event.to, event.a
    return None


def _ms(seconds: float) -> int:
    return int(seconds * 1000 + 0.5)  # as the scripts round


def _order(stream_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = stream_id.partition("-")
    return int(milliseconds), int(sequence or 0)

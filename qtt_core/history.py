"""What happened to each configuration, folded from the ledger for people and for the optimizer.

Planner, status, leaderboard, report and the optimizer's replay read these records; nobody else
walks the events for curves. Pure: built from (events, configurations), with no cache and no clock.
A gap that was trained again appears once: an epoch counts with the score committed first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qtt_core.errors import LedgerError
from qtt_core.ledger.events import (
    Cancel,
    Done,
    Event,
    Fail,
    Open,
    Prepared,
    Retry,
    Run,
    is_charged,
    is_pseudo,
)
from qtt_core.ledger.fold import step_epochs
from qtt_core.results import State
from qtt_core.steps import Abandon, Config, Observation, OptimizerEvent, Outcome, Proposal, Why


class Standing(StrEnum):
    """Where a configuration stands."""

    OPEN = "open"
    """A decision is open: waiting for a device, or running."""
    PAUSED = "paused"
    """It has results and may be continued."""
    FINISHED = "finished"
    """Trained to full fidelity."""
    DIVERGED = "diverged"
    OOM = "oom"
    INFEASIBLE = "infeasible"
    RETIRED = "retired"
    """Never proposed again, without a word to the models."""
    CANCELLED = "cancelled"
    """Opened, ended untold before its first result; may be proposed again."""

    @property
    def is_closed(self) -> bool:
        """Whether it can never be continued."""
        return self not in {Standing.OPEN, Standing.PAUSED, Standing.CANCELLED}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigHistory:
    """One configuration's past.

    `scores` in [0, 1] and `seconds` belong to `epochs`, oldest first.
    """

    config_id: int
    config: Config
    standing: Standing
    epochs: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    """Training and evaluation seconds per epoch."""
    charged_seconds: float = 0.0
    """Device-seconds of all attempts, fruitless ones too."""
    overhead_seconds: float = 0.0
    queue_seconds: float = 0.0
    steps: int = 0
    """Committed steps; a `fail` counts one."""
    attempts: int = 0
    """Jobs begun, retries included."""
    retries: tuple[str, ...] = ()
    """Reasons of attempts without a result, oldest first."""
    reason: str = ""
    """Why it is closed or was last cancelled; empty otherwise."""
    why: Why | None = None
    """Why it was last opened."""
    target: int = 0
    """`fidelity_to` of the last decision."""
    expected_seconds: float = 0.0
    """Reserved by the last decision."""
    opened_id: str = ""
    """Stream id of its first decision."""
    opened_at: float = 0.0
    ended_at: float = 0.0
    """Time of its newest end; 0 while there is none."""
    checkpoint: str = ""
    """SHA-256 of the newest committed checkpoint."""
    checkpoint_epoch: int = 0
    checkpoint_bytes: int = 0
    saved: tuple[tuple[int, float], ...] = ()
    """(epoch, its score) of every committed checkpoint, oldest first."""
    gpu: str = ""
    memory_mb: int = 0
    effective_batch: int | None = None
    inert: tuple[str, ...] = ()

    @property
    def fidelity(self) -> int:
        """Highest epoch with a score; 0 before the first."""
        return self.epochs[-1] if self.epochs else 0

    @property
    def last_score(self) -> float | None:
        """Score of the newest epoch."""
        return self.scores[-1] if self.scores else None

    @property
    def best_score(self) -> float | None:
        """Best score of any epoch."""
        return max(self.scores, default=None)

    @property
    def best_epoch(self) -> int | None:
        """The first epoch that reached the best score."""
        best = self.best_score
        return None if best is None else self.epochs[self.scores.index(best)]

    @property
    def trained_seconds(self) -> float:
        """Training and evaluation seconds of the committed epochs: what the optimizer was told."""
        return sum(self.seconds)

    @property
    def rank(self) -> tuple[float, float, int] | None:
        """Sorts the best first: by score, then by fewer seconds, then by id; None: no score."""
        best = self.best_score
        return None if best is None else (-best, self.trained_seconds, self.config_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The run right after one end: what was spent, and the best score so far (None before one)."""

    stream_id: str
    time: float
    charged_seconds: float
    steps: int
    best_score: float | None
    config_id: int | None
    """The configuration that holds `best_score`."""
    fidelity: int | None


def histories(events: Iterable[Event], configs: Mapping[str, Config]) -> dict[int, ConfigHistory]:
    """One record per configuration, in the order of their first decision.

    Raises: LedgerError if a configuration was opened but is not in `configs`.
    """
    records = Histories()
    records.take(events, configs)
    return dict(records)


class Histories(Mapping[int, ConfigHistory]):
    """The records of a growing stream: what is taken costs the same however much was taken before.

    Keeps what the status and the garbage of checkpoints ask between two events.
    """

    def __init__(self) -> None:
        self._drafts: dict[str, _Draft] = {}
        self._records: dict[int, ConfigHistory] = {}
        self._order: list[tuple[float, float, int]] = []
        self._step = 1
        self._full: int | None = None
        self.closed = 0
        """Configurations that can never be continued."""
        self.checkpoint_bytes = 0
        """Size of the newest checkpoint of every configuration."""

    def take(self, events: Iterable[Event], configs: Mapping[str, Config]) -> None:
        """Add the events that follow those taken so far.

        Raises: LedgerError if a configuration was opened but is not in `configs`.
        """
        changed: dict[str, _Draft] = {}
        for event in events:
            if isinstance(event, Run):
                self._step, self._full = step_epochs(event), _full_fidelity(event)
            elif isinstance(event, Open) and not is_pseudo(event.c):
                if event.c not in self._drafts:
                    self._drafts[event.c] = _Draft(event, _config_of(event.c, configs))
                changed[event.c] = self._drafts[event.c]
                changed[event.c].on_open(event)
            elif isinstance(event, Done | Fail | Retry | Cancel) and not is_pseudo(event.c):
                changed[event.c] = self._drafts[event.c]
                changed[event.c].on_end(event, self._step, self._full)
        for draft in changed.values():
            self._replace(self._records.get(draft.config_id), draft.freeze())

    def best(self, count: int) -> list[ConfigHistory]:
        """The best configurations: by score, then by fewer seconds, then by id."""
        return [self._records[config_id] for _, _, config_id in self._order[:count]]

    def _replace(self, old: ConfigHistory | None, new: ConfigHistory) -> None:
        if old is not None:
            self.closed -= old.standing.is_closed
            self.checkpoint_bytes -= old.checkpoint_bytes
            if old.rank is not None:
                del self._order[bisect_left(self._order, old.rank)]
        self.closed += new.standing.is_closed
        self.checkpoint_bytes += new.checkpoint_bytes
        if new.rank is not None:
            insort(self._order, new.rank)
        self._records[new.config_id] = new

    def __getitem__(self, config_id: int) -> ConfigHistory:
        return self._records[config_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def closed_configs(histories: Mapping[int, ConfigHistory]) -> int:
    """Configurations that can never be continued."""
    if isinstance(histories, Histories):
        return histories.closed
    return sum(past.standing.is_closed for past in histories.values())


def optimizer_events(
    events: Iterable[Event],
    configs: Mapping[str, Config],
    *,
    told: Mapping[str, int] | None = None,
    charged_devices: float = 1.0,
) -> list[tuple[str, OptimizerEvent]]:
    """What the optimizer is fed for these events, each with its stream id, in ledger order.

    `told`: config id -> highest epoch told before these events, for a tail of the stream; it is
    `LedgerState.heads` of the fold of everything before. Retries, pseudo-configurations and notes
    are not told. `expected_seconds` of a proposal is what its decision reserved, per Job: device-
    seconds over `charged_devices` (`RunSpec.charged_devices`).

    Raises: LedgerError if a configuration was opened but is not in `configs`.
    """
    heads = dict(told or {})
    feed: list[tuple[str, OptimizerEvent]] = []
    for event in events:
        if isinstance(event, Open) and not is_pseudo(event.c):
            feed.append((event.id, _proposal(event, configs, charged_devices)))
        elif isinstance(event, Done):
            head = heads.get(event.c, 0)
            feed.append((event.id, _observation(event, head)))
            heads[event.c] = max(head, event.last_epoch or 0)
        elif isinstance(event, Fail):
            feed.append((event.id, _failure(event)))
        elif isinstance(event, Cancel) and not is_pseudo(event.c):
            feed.append((event.id, _abandoned(event)))
    return feed


def best_so_far(events: Iterable[Event]) -> list[Point]:
    """The best score against what was spent: one point for every event that cost or scored.

    Units: device-seconds charged since the start, steps committed, score in [0, 1].
    """
    points: list[Point] = []
    opened: dict[str, int] = {}
    best: tuple[float, int, int] | None = None
    charged, steps, step = 0.0, 0, 1
    for event in events:
        if isinstance(event, Run):
            step = step_epochs(event)
        elif isinstance(event, Open):
            opened[event.c] = event.frm
        if not isinstance(event, Done | Fail | Retry | Cancel | Prepared):
            continue
        charged += event.dev if is_charged(event.c) else 0.0
        if isinstance(event, Fail):
            steps += 1
        elif isinstance(event, Done):
            steps += event.steps(opened[event.c], step)
            for epoch, score, _ in event.epochs:
                if best is None or score > best[0]:
                    best = score, int(event.c), epoch
        points.append(
            Point(
                stream_id=event.id, time=event.time, charged_seconds=charged, steps=steps,
                best_score=best[0] if best else None, config_id=best[1] if best else None,
                fidelity=best[2] if best else None,
            )
        )  # fmt: skip
    return points


class _Draft:
    """A history while it grows."""

    def __init__(self, event: Open, config: Config) -> None:
        self.config_id = int(event.c)
        self.config = config
        self.standing = Standing.OPEN
        self.curve: list[tuple[int, float, float]] = []
        self.last_open = event
        self.charged = self.overhead = self.queue = self.ended_at = 0.0
        self.steps = self.attempts = 0
        self.retries: list[str] = []
        self.saved: list[tuple[int, float]] = []
        self.reason = ""
        self.facts: dict[str, Any] = {"opened_id": event.id, "opened_at": event.time}

    @property
    def head(self) -> int:
        return self.curve[-1][0] if self.curve else 0

    def on_open(self, event: Open) -> None:
        self.last_open, self.standing, self.reason = event, Standing.OPEN, ""
        self.attempts += 1

    def on_end(self, event: Done | Fail | Retry | Cancel, step: int, full: int | None) -> None:
        self.charged += event.dev
        self.overhead += event.ov
        self.queue += event.q
        self.ended_at = event.time
        if isinstance(event, Retry):
            self.attempts += 1
            self.retries.append(event.reason)
        elif isinstance(event, Done):
            self._on_done(event, step, full)
        elif isinstance(event, Fail):
            self.steps += 1
            self.standing, self.reason = Standing(event.state), event.msg or event.state
            self._facts(event)
        else:
            untold = Standing.PAUSED if self.curve else Standing.CANCELLED
            self.standing = Standing.RETIRED if event.retire else untold
            self.reason = event.reason

    def _on_done(self, event: Done, step: int, full: int | None) -> None:
        self.steps += event.steps(self.last_open.frm, step)
        self.curve += _new_epochs(event, self.head)
        if event.state == Outcome.OK and event.epochs:
            self.saved.append((event.to, event.epochs[-1][1]))
        self._facts(event)
        if event.ck:
            self.facts |= {
                "checkpoint": event.ck,
                "checkpoint_epoch": event.last_epoch or 0,
                "checkpoint_bytes": event.bytes,
            }
        if event.state != Outcome.OK:
            self.standing, self.reason = Standing(event.state), event.msg or event.state
        elif full is not None and self.head >= full:
            self.standing = Standing.FINISHED
        else:
            self.standing = Standing.PAUSED

    def _facts(self, event: Done | Fail) -> None:
        """What the newest job showed; silence does not erase what an earlier one said."""
        known: dict[str, Any] = {"gpu": event.gpu, "memory_mb": event.mem}
        if isinstance(event, Done):
            known |= {"inert": event.inert, "effective_batch": event.eb}
        self.facts |= {name: value for name, value in known.items() if value}

    def freeze(self) -> ConfigHistory:
        return ConfigHistory(
            config_id=self.config_id, config=self.config, standing=self.standing,
            epochs=tuple(epoch for epoch, _, _ in self.curve),
            scores=tuple(score for _, score, _ in self.curve),
            seconds=tuple(seconds for _, _, seconds in self.curve),
            charged_seconds=self.charged, overhead_seconds=self.overhead, queue_seconds=self.queue,
            steps=self.steps, attempts=self.attempts, retries=tuple(self.retries),
            saved=tuple(self.saved),
            reason=self.reason, why=_why(self.last_open), target=self.last_open.to,
            expected_seconds=self.last_open.res, ended_at=self.ended_at, **self.facts,
        )  # fmt: skip


def _new_epochs(event: Done, head: int) -> list[tuple[int, float, float]]:
    """The epochs behind `head`: a gap that was trained again is not told twice."""
    return [entry for entry in event.epochs if entry[0] > head]


def _proposal(event: Open, configs: Mapping[str, Config], charged_devices: float) -> Proposal:
    return Proposal(
        config_id=int(event.c), config=_config_of(event.c, configs), fidelity_from=event.frm,
        fidelity_to=event.to, expected_seconds=event.res / charged_devices, why=_why(event),
    )  # fmt: skip


def _observation(event: Done, head: int) -> Observation:
    fresh = _new_epochs(event, head)
    outcome = Outcome(event.state)
    last = fresh[-1][0] if fresh else head
    return Observation(
        config_id=int(event.c),
        fidelity=last if outcome is Outcome.OK else last + 1,  # diverged: the epoch that failed
        outcome=outcome,
        scores=tuple(score for _, score, _ in fresh),
        seconds=tuple(seconds for _, _, seconds in fresh),
        overhead_seconds=event.ov,
        gpu=event.gpu,
        inert=event.inert,
        effective_batch=event.eb or None,
        memory_mb=event.mem or None,
    )


def _abandoned(event: Cancel) -> Abandon:
    gone = event.retire and event.reason == State.WEIGHTS_UNAVAILABLE  # the hub said 401, 403, 404
    return Abandon(config_id=int(event.c), retire=event.retire, model_gone=gone)


def _failure(event: Fail) -> Observation:
    return Observation(
        config_id=int(event.c), fidelity=event.to, outcome=Outcome(event.state),
        overhead_seconds=event.ov, gpu=event.gpu, memory_mb=event.mem or None,
    )  # fmt: skip


def _why(event: Open) -> Why:
    return Why.from_json(event.why)


def _config_of(c: str, configs: Mapping[str, Config]) -> Config:
    try:
        return configs[c]
    except KeyError:
        raise LedgerError(f"configuration {c} was opened but is not in the ledger's hash") from None


def _full_fidelity(run: Run) -> int | None:
    """T = `fidelity.max` of the manifest, None where the run event does not say it."""
    fidelity = run.spec.get("fidelity")
    return int(fidelity["max"]) if isinstance(fidelity, Mapping) and "max" in fidelity else None

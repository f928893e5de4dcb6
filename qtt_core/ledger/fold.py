"""What a stream of events adds up to: the one function from history to state.

`fold(events)` is pure and total over valid streams; the planner, the status, the reports and the
optimizer's replay all read its result, so that they can never disagree. State is mutable only
inside one call; what comes out is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from qtt_core.errors import LedgerError
from qtt_core.ledger.events import (
    EVALUATION,
    WEIGHTS,
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
    is_charged,
    is_evaluation,
    is_pseudo,
    step_targets,
)
from qtt_core.results import State

APP_REASONS = frozenset({"bug", "badmessage", State.INTERNAL.value})
"""Reasons of `retry` and `cancel` that are faults of the trainer, not of the infrastructure."""

GPU_REASONS = frozenset({State.INFRA_GPU.value})
"""Ends that are a node's fault: the next attempt runs elsewhere for a while."""

DATA_REASONS = frozenset({State.BAD_DATA.value, State.DATASET_CHANGED.value})
RETRY_NOTE, FINETUNE_NOTE, EVALUATE_NOTE = "retry", "finetune", "evaluate"
"""`what` of notes of a person's wishes: go on after failures, train the best, score the kept."""

USER_REASONS = frozenset({"Stopped"})
INVALID_REASONS = frozenset({State.INVALID_CONFIG.value, State.IDENTITY_MISMATCH.value})


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenEntry:
    """A decision that has not ended: at most one per configuration."""

    c: str
    frm: int
    to: int
    attempt: int
    decision: str
    reserved: float
    opened_id: str
    since: float
    """Time of the newest `open` or `retry`: when the present attempt began."""
    why: Mapping[str, Any] = field(default_factory=dict)
    """Of an evaluation: what it scores. Reasons of the others stay in the stream."""
    retries: tuple[str, ...] = ()
    """Reasons of the attempts that ended without a result, oldest first."""
    charged: float = 0.0
    """Device-seconds of those attempts."""


class StepKeys(Set[tuple[str, int]]):
    """(c, absolute target epoch) of every committed step, grouped by c.

    A run of 10^5 steps adds to it with every result: a changed one shares all but the sets of the
    configurations that were added to.
    """

    __slots__ = ("_targets",)

    def __init__(self, keys: Iterable[tuple[str, int]] = ()) -> None:
        self._targets: dict[str, frozenset[int]] = {}
        if isinstance(keys, StepKeys):
            self._targets = dict(keys._targets)
        else:
            for c, to in keys:
                self.add(c, (to,))

    def add(self, c: str, targets: Iterable[int]) -> None:
        """Add to a set that nobody else sees yet."""
        self._targets[c] = self._targets.get(c, frozenset()).union(targets)

    def __contains__(self, key: object) -> bool:
        c, to = key if isinstance(key, tuple) else (None, None)
        return to in self._targets.get(c, ())

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((c, to) for c, targets in self._targets.items() for to in targets)

    def __len__(self) -> int:
        return sum(map(len, self._targets.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """Everything the planner may know about a run's past."""

    last_id: str = "0-0"
    epoch: int = 0
    run: Run | None = None
    prepared: Prepared | None = None
    weights: WeightsFetched | None = None
    weights_missing: str = ""
    """Why no weights were fetched, in the trainer's words; empty again once a person has looked."""
    closed: Close | None = None
    open: Mapping[str, OpenEntry] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    """Config id -> highest committed epoch. Pseudo-configurations are not listed."""
    step_keys: Set[tuple[str, int]] = frozenset()
    """(config or pseudo-configuration, absolute target epoch) of every committed step."""
    attempts: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """(c, target epoch) of cancelled decisions -> the first attempt number not used yet."""
    retired: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    """Config id -> why it is closed: diverged, oom, infeasible, or a cancel's reason (retired)."""
    steps: int = 0
    """Committed steps of `fidelity.step` epochs, `fail` included as one."""
    results: int = 0
    """Jobs that ended with a result: `done` and `fail` events."""
    charged_seconds: float = 0.0
    overhead_seconds: float = 0.0
    """Of the charged ones: of attempts with a result, neither training nor evaluation."""
    wasted_seconds: float = 0.0
    """Of the charged ones: of attempts without a result."""
    queue_seconds: float = 0.0
    infra_retries: int = 0
    cancelled_in_a_row: int = 0
    """Cancels for used-up infrastructure retries since the last `done` or `fail`."""
    invalid_in_a_row: int = 0
    """Cancels with exit 64 since the last `done` or `fail`."""
    bugs_in_a_row: int = 0
    """Configurations retired for a fault of the trainer since the last `done` or `fail`."""
    dataset_changed: str = ""
    """What the trainer said when it found other data than `prepare`; empty while they agree."""
    recheck: bool = False
    """A person asked to read a data set again that changed, or whose models lacked weights."""
    bad_nodes: Mapping[str, float] = field(default_factory=dict)
    """Node -> time of its newest device fault."""
    notes: tuple[Note, ...] = ()
    last_end: float = 0.0
    """Time of the newest `done`, `fail`, `retry` or `cancel`."""
    first_time: float = 0.0


def fold(events: Iterable[Event], state: LedgerState | None = None) -> LedgerState:
    """Events, in stream order, added onto a state: folding b onto the fold of a is folding a + b.

    Δ, the epochs of a step, is `spec.fidelity.step` of the `run` event (1 where it is silent).

    Raises: LedgerError if an event contradicts the state (an end without an open entry, an attempt
    that was never opened); the scripts make that impossible, a damaged store does not.
    """
    folder = _Folder(state or LedgerState())
    for event in events:
        folder.take(event)
    return folder.freeze()


def step_epochs(run: Run | None) -> int:
    """Δ = `fidelity.step` of the run, 1 where it is silent."""
    fidelity = run.spec.get("fidelity") if run is not None else None
    step = fidelity.get("step", 1) if isinstance(fidelity, Mapping) else 1
    return max(1, int(step))


class _Folder:
    """The state while a fold runs: plain dicts and counters, one method per kind of event."""

    def __init__(self, state: LedgerState) -> None:
        self.step = step_epochs(state.run)
        self.last_id, self.epoch = state.last_id, state.epoch
        self.run, self.prepared, self.weights = state.run, state.prepared, state.weights
        self.weights_missing = state.weights_missing
        self.closed = state.closed
        self.open = dict(state.open)
        self.heads = dict(state.heads)
        self.step_keys = StepKeys(state.step_keys)
        self.attempts = dict(state.attempts)
        self.retired = set(state.retired)
        self.failed = dict(state.failed)
        self.steps, self.results = state.steps, state.results
        self.charged, self.overhead, self.queue = (
            state.charged_seconds, state.overhead_seconds, state.queue_seconds,
        )  # fmt: skip
        self.wasted = state.wasted_seconds
        self.infra_retries = state.infra_retries
        self.cancelled, self.invalid = state.cancelled_in_a_row, state.invalid_in_a_row
        self.bugs = state.bugs_in_a_row
        self.dataset_changed, self.recheck = state.dataset_changed, state.recheck
        self.bad_nodes = dict(state.bad_nodes)
        self.notes = list(state.notes)
        self.last_end, self.first_time = state.last_end, state.first_time
        self.order = position(state.last_id)

    def take(self, event: Event) -> None:
        if event.id:  # an event that was never written has none
            order = position(event.id)
            if order <= self.order:
                raise LedgerError(f"event {event.id} comes after {self.last_id}")
            self.last_id, self.order = event.id, order
            self.first_time = self.first_time or event.time
        self.epoch = max(self.epoch, event.ep)
        handler = _HANDLERS.get(type(event))
        if handler is None:
            raise LedgerError(f"event {event.id}: no rule for {type(event).__name__}")
        handler(self, event)

    def freeze(self) -> LedgerState:
        return LedgerState(
            last_id=self.last_id, epoch=self.epoch, run=self.run, prepared=self.prepared,
            weights=self.weights, weights_missing=self.weights_missing,
            closed=self.closed, open=self.open, heads=self.heads,
            step_keys=self.step_keys, attempts=self.attempts,
            dataset_changed=self.dataset_changed, recheck=self.recheck,
            bad_nodes=self.bad_nodes, retired=frozenset(self.retired),
            failed=self.failed, steps=self.steps, results=self.results,
            charged_seconds=self.charged, overhead_seconds=self.overhead,
            wasted_seconds=self.wasted, queue_seconds=self.queue, infra_retries=self.infra_retries,
            cancelled_in_a_row=self.cancelled, invalid_in_a_row=self.invalid,
            bugs_in_a_row=self.bugs, notes=tuple(self.notes), last_end=self.last_end,
            first_time=self.first_time,
        )  # fmt: skip

    # --- one method per kind ---

    def on_run(self, event: Run) -> None:
        if self.run is not None:
            raise LedgerError(f"event {event.id}: a second run event")
        self.run, self.step = event, step_epochs(event)

    def on_open(self, event: Open) -> None:
        c = event.c
        if c in self.open:
            raise LedgerError(f"event {event.id}: {c} is open since {self.open[c].opened_id}")
        if self.closed is not None and not is_evaluation(c):
            raise LedgerError(f"event {event.id}: {c} opened on a closed run")
        head = event.frm if is_pseudo(c) else self.heads.get(c, 0)
        if event.to <= event.frm or event.frm != head:
            raise LedgerError(
                f"event {event.id}: {c} opened {event.frm} -> {event.to}, head is {head}"
            )
        self.open[c] = OpenEntry(
            c=c, frm=event.frm, to=event.to, attempt=event.a, decision=event.h,
            reserved=event.res, opened_id=event.id, since=event.time,
            why=event.why if is_evaluation(c) else {},
        )  # fmt: skip

    def on_done(self, event: Done) -> None:
        entry = self._end(event)
        c = event.c
        self.step_keys.add(c, step_targets(entry.frm, entry.to, self.step))
        self.steps += event.steps(entry.frm, self.step)
        if event.last_epoch is not None:
            self.heads[c] = max(self.heads.get(c, 0), event.last_epoch)
        if event.state != State.OK:
            self.failed[c] = event.state
        self.results += 1
        self.cancelled = self.invalid = self.bugs = 0

    def on_fail(self, event: Fail) -> None:
        self._end(event)
        self.step_keys.add(event.c, (event.to,))
        self.steps += 1
        self.failed[event.c] = event.state
        self.results += 1
        self.cancelled = self.invalid = self.bugs = 0

    def on_retry(self, event: Retry) -> None:
        entry = self._entry(event.id, event.c, event.to, event.a - 1)
        self._charge(event)
        self.open[event.c] = replace(
            entry, attempt=event.a, since=event.time, retries=(*entry.retries, event.reason),
            charged=entry.charged + event.dev,
        )  # fmt: skip
        self.infra_retries += event.reason not in APP_REASONS | USER_REASONS
        if event.reason in GPU_REASONS and event.node:
            self.bad_nodes[event.node] = event.time

    def on_cancel(self, event: Cancel) -> None:
        self._end(event)
        self.attempts[event.c, event.to] = event.a + 1
        if is_evaluation(event.c):
            return  # says nothing about the search
        if event.c == WEIGHTS:
            self.weights_missing = event.msg or event.reason
            return
        if event.reason == State.DATASET_CHANGED:
            self.dataset_changed, self.recheck = event.msg or event.reason, False
        if event.retire:
            self.retired.add(event.c)
            self.failed[event.c] = event.reason
        if event.reason in INVALID_REASONS or (
            event.retire and event.reason == State.WEIGHTS_UNAVAILABLE  # the hub said 401, 403, 404
        ):
            self.invalid += 1
        elif event.reason in APP_REASONS:
            self.bugs += 1
        elif event.reason not in DATA_REASONS | USER_REASONS:
            self.cancelled += 1

    def on_prepared(self, event: Prepared) -> None:
        self._close_pseudo(event.id, event.c, event.to, event.a)
        self.charged += event.dev
        self.prepared = event
        self.dataset_changed, self.recheck = "", False
        self.cancelled = self.invalid = self.bugs = 0

    def on_weights(self, event: WeightsFetched) -> None:
        self._close_pseudo(event.id, event.c, event.to, event.a)
        self.weights, self.weights_missing = event, ""

    def on_note(self, event: Note) -> None:
        if event.what == EVALUATION:
            self._close_pseudo(event.id, event.c, event.to, event.a)
        if event.what == RETRY_NOTE:
            self._looked_at()
        self.notes.append(event)

    def on_close(self, event: Close) -> None:
        self.closed = event

    def on_reopen(self, _event: Reopen) -> None:
        self.closed = None
        self._looked_at()

    def _looked_at(self) -> None:
        """A person has looked: failures in a row begin anew."""
        self.cancelled = self.invalid = self.bugs = 0
        self.weights_missing = ""
        lacking = self.prepared is not None and bool(self.prepared.missing_weights)
        self.recheck = bool(self.dataset_changed) or lacking

    # --- what they share ---

    def _entry(self, stream_id: str, c: str, to: int, attempt: int) -> OpenEntry:
        entry = self.open.get(c)
        if entry is None or entry.to != to:
            raise LedgerError(f"event {stream_id}: {c} -> {to} ended but was not open")
        if entry.attempt != attempt:
            raise LedgerError(
                f"event {stream_id}: {c} -> {to} ended attempt {attempt}, not {entry.attempt}"
            )
        return entry

    def _end(self, event: Done | Fail | Cancel) -> OpenEntry:
        entry = self._entry(event.id, event.c, event.to, event.a)
        self._charge(event)
        del self.open[event.c]
        return entry

    def _close_pseudo(self, stream_id: str, c: str, to: int, attempt: int) -> None:
        self._entry(stream_id, c, to, attempt)
        del self.open[c]
        self.step_keys.add(c, (to,))

    def _charge(self, event: Done | Fail | Retry | Cancel) -> None:
        self.last_end = event.time or self.last_end
        if is_charged(event.c):
            self.charged += event.dev
            self.overhead += event.ov
            self.wasted += 0.0 if isinstance(event, Done) else event.dev
            self.queue += event.q


_HANDLERS: Mapping[type[Event], Callable[..., None]] = {
    Run: _Folder.on_run,
    Prepared: _Folder.on_prepared,
    WeightsFetched: _Folder.on_weights,
    Open: _Folder.on_open,
    Done: _Folder.on_done,
    Fail: _Folder.on_fail,
    Retry: _Folder.on_retry,
    Cancel: _Folder.on_cancel,
    Note: _Folder.on_note,
    Close: _Folder.on_close,
    Reopen: _Folder.on_reopen,
}


def position(stream_id: str) -> tuple[int, int]:
    """A stream id as (milliseconds, sequence), which sorts; ids as text do not."""
    milliseconds, _, sequence = stream_id.partition("-")
    try:
        return int(milliseconds), int(sequence or 0)
    except ValueError as error:
        raise LedgerError(f"{stream_id!r} is no stream id") from error

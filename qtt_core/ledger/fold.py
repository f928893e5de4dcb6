"""What a stream of events adds up to: the one function from history to state.

`fold(events)` is pure and total over valid streams; the planner, the status, the reports and the
optimizer's replay all read its result, so that they can never disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qtt_core.ledger.events import Close, Event, Note, Prepared, Run, WeightsFetched


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
    retries: tuple[str, ...] = ()
    """Reasons of the attempts that ended without a result, oldest first."""
    charged: float = 0.0
    """Device-seconds of those attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """Everything the planner may know about a run's past."""

    last_id: str = "0-0"
    epoch: int = 0
    run: Run | None = None
    prepared: Prepared | None = None
    weights: WeightsFetched | None = None
    closed: Close | None = None
    open: Mapping[str, OpenEntry] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    """Config id -> highest committed epoch."""
    step_keys: frozenset[tuple[str, int]] = frozenset()
    """(config, absolute target epoch) of every committed step."""
    retired: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    """Config id -> why it is closed: diverged, oom, infeasible, or a cancel's reason (retired)."""
    steps: int = 0
    """Committed steps of `fidelity.step` epochs, `fail` included as one."""
    charged_seconds: float = 0.0
    overhead_seconds: float = 0.0
    queue_seconds: float = 0.0
    infra_retries: int = 0
    cancelled_in_a_row: int = 0
    """Cancels for used-up infrastructure retries since the last `done` or `fail`."""
    invalid_in_a_row: int = 0
    """Cancels with exit 64 since the last `done` or `fail`."""
    notes: tuple[Note, ...] = ()
    last_end: float = 0.0
    """Time of the newest `done`, `fail`, `retry` or `cancel`."""
    first_time: float = 0.0


def fold(events: Iterable[Event], state: LedgerState | None = None, *, step_epochs: int = 1) -> LedgerState:
    """Fold events, in stream order, onto a state.

    Raises: LedgerError if an event contradicts the state (an end without an open entry, an attempt
    that was never opened); the scripts make that impossible, a damaged store does not.
    """
    raise NotImplementedError

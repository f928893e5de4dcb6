"""How far a run is, and when it will end at its present pace. Pure.

The pace is that of the last ends by the wall clock, so that waiting for quota or images counts and
a pause of last week does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtt_core.ledger.events import Done, Event, Fail
from qtt_core.ledger.fold import LedgerState, step_epochs
from qtt_core.spec import RunSpec

RECENT = 100
"""Events that make the pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`shares`: kind of limit -> used part of it; `seconds_left` None: there is no pace."""

    shares: Mapping[str, float]
    seconds_left: float | None

    @property
    def ratio(self) -> float:
        """Used part of the limit that is nearest, at most 1."""
        return min(1.0, max(self.shares.values(), default=0.0))


def progress(spec: RunSpec, state: LedgerState, events: Sequence[Event], now: float) -> Progress:
    """Shares of every limit that is set, and the time until the first of them is reached."""
    budget, passed = spec.budget, max(0.0, now - state.first_time) if state.first_time else 0.0
    steps, seconds, since = _recent(events, step_epochs(state.run))
    waited = max(1e-3, now - since)
    shares, left = {}, []
    if budget.max_steps:
        shares["steps"] = state.steps / budget.max_steps
        if steps:
            left.append((budget.max_steps - state.steps) * waited / steps)
    if budget.max_gpu_seconds:
        shares["gpu_seconds"] = state.charged_seconds / budget.max_gpu_seconds
        if seconds > 0:
            left.append((budget.max_gpu_seconds - state.charged_seconds) * waited / seconds)
    if budget.max_wallclock:
        shares["wallclock"] = passed / budget.max_wallclock
        left.append(budget.max_wallclock - passed)
    paused = spec.suspend or state.closed is not None or not state.first_time
    return Progress(shares=shares, seconds_left=None if paused or not left else max(0.0, min(left)))


def _recent(events: Sequence[Event], step: int) -> tuple[int, float, float]:
    """(steps, device-seconds, time of the first) of the newest events."""
    newest = events[-RECENT:]
    ends = [event for event in newest if isinstance(event, Done | Fail)]
    steps = sum(_steps(event, step) for event in ends)
    since = newest[0].time if newest else 0.0
    return steps, sum(event.dev for event in ends), since


def _steps(event: Done | Fail, step: int) -> int:
    return max(1, -(-len(event.epochs) // step)) if isinstance(event, Done) else 1

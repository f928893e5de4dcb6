"""Signals and the wall clock of a job: flags that the training loop reads, and the way out.

Installed before anything else: a Python process that is PID 1 ignores SIGTERM until it has a
handler.
The first signal asks for an orderly end (checkpoint, exit 75); the second one leaves at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from qtt_core.results import EXIT_RETRY, State
from qtt_trainer.endings import EndedError

GRACE_SECONDS = 30.0
"""Between the wall limit and leaving at once: time for the checkpoint."""

_REASONS = {
    State.PREEMPTED: "asked to stop by a signal",
    State.TIMEOUT: "the wall limit was reached",
}


class Stop:
    """Whether the job was asked to stop, and why. One per process; `install` makes it live."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.nothing_to_save = False
        """Leave at the first signal: an orderly end would save nothing."""
        self.on_leave: Callable[[State, str], None] = lambda state, reason: None
        """Called before leaving at once; must only write small files."""

    def install(self) -> None:
        """Catch SIGTERM, SIGINT and the wall clock's SIGALRM."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_alarm)

    def limit(self, wall_s: float | None, *, elapsed: float = 0.0) -> None:
        """Ask for a stop `wall_s` seconds after the job's start, of which `elapsed` are gone."""
        if wall_s is not None:
            # The smallest timer is 1 ms: 0 would switch it off.
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, wall_s - elapsed))

    def disarm(self) -> None:
        """No more alarms: the job's end is being written."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def check(self) -> None:
        """Raise EndedError when a stop was asked for."""
        if self.state is not None:
            raise self.ended()

    def ended(self) -> EndedError:
        """The end that was asked for."""
        state = self.state or State.PREEMPTED
        return EndedError(state, _REASONS[state])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.state is not None or self.nothing_to_save:
            self._leave(State.PREEMPTED, f"left at once ({signal.Signals(number).name})")
        self.state = State.PREEMPTED

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self.nothing_to_save:
            self._leave(State.TIMEOUT, _REASONS[State.TIMEOUT])
        if self.state is not None:
            self._leave(State.TIMEOUT, f"no orderly end within {GRACE_SECONDS:.0f} s of the limit")
        self.state = State.TIMEOUT
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def _leave(self, state: State, reason: str) -> None:
        """End the process from inside a signal handler: no unwinding, the last commit stands."""
        try:
            self.on_leave(state, reason)
        finally:
            os._exit(EXIT_RETRY)

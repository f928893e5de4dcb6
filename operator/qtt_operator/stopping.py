"""How a local run comes to stand still, and what Ctrl-C means while it goes on.

The first Ctrl-C (or SIGTERM) drains: running steps end, nothing new is opened. A second one ends
the running steps too; their trainers save what they have. A third one is Python's own.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

from qtt_core.ledger.events import Cancel, Close, Event, Retry
from qtt_core.results import State
from qtt_operator.exits import BUG, COMPLETE, DATA, FAILED, INTERRUPTED, IO_ERROR
from qtt_operator.names import COMPLETE_REASONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a local run stands still: a reason of the conditions or our own word, and what to do."""

    reason: str
    message: str
    code: int
    complete: bool = False


class Urgency(IntEnum):
    """How the run should stop."""

    GO_ON = 0
    DRAIN = 1
    STOP = 2


class Stopper:
    """Counts the user's signals; `wake` is set at each."""

    def __init__(self, wake: asyncio.Event) -> None:
        self.urgency = Urgency.GO_ON
        self.ending: Ending | None = None
        self._wake = wake

    def press(self) -> None:
        """One more signal."""
        self.ask(
            Ending(
                reason="Interrupted",
                message="interrupted; the same command resumes",
                code=INTERRUPTED,
            )
        )
        if self.urgency is Urgency.STOP:
            _restore(asyncio.get_running_loop())

    def ask(self, ending: Ending) -> None:
        """Stop for this reason; asked again, stop at once. The first reason stays."""
        self.urgency = Urgency(min(self.urgency + 1, Urgency.STOP))
        self.ending = self.ending or ending
        self._wake.set()

    def drain(self, ending: Ending) -> None:
        """Let running steps end and open nothing new; asked again, nothing more happens."""
        if self.urgency is Urgency.GO_ON:
            self.ask(ending)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_to(press: Callable[[], None]) -> Iterator[None]:
    """Route Ctrl-C and SIGTERM to `press` while the run goes on."""
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, press)
    try:
        yield
    finally:
        _restore(loop)


def _restore(loop: asyncio.AbstractEventLoop) -> None:
    for number in _SIGNALS:
        loop.remove_signal_handler(number)


def ending_of(close: Close) -> Ending:
    """What the close of a run means for the exit code."""
    if close.reason in COMPLETE_REASONS:
        return Ending(reason=close.reason, message=close.msg, code=COMPLETE, complete=True)
    code = DATA if close.reason == "BadData" else FAILED
    return Ending(reason=close.reason, message=close.msg, code=code)


def held_ending(reason: str, message: str) -> Ending:
    """What it means that a run may not open anything and nothing is left to end."""
    codes = {"DiskFull": IO_ERROR, "DatasetChanged": DATA, "OptimizerUnhealthy": BUG}
    code = codes.get(reason, INTERRUPTED)
    text = f"{message}; the same command tries again" if code == INTERRUPTED else message
    return Ending(reason=reason, message=text, code=code)


def suspended_ending() -> Ending:
    """The manifest itself says `suspend: true`."""
    text = "spec.suspend is true; set it to false and run the same command"
    return Ending(reason="Suspended", message=text, code=INTERRUPTED)


def disk_full(events: Iterable[Event]) -> Ending | None:
    """A disk-full end among these events: retrying fills the log, freeing space helps."""
    for event in events:
        if isinstance(event, Retry | Cancel) and event.reason == State.DISK_FULL.value:
            message = f"{event.msg or 'no space left'}; free some, the same command resumes"
            return Ending(reason="DiskFull", message=message, code=IO_ERROR)
    return None

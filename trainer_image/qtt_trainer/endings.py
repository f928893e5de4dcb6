"""How a job ends: one exception that carries the state, and the table from errors to states.

Used by every command of the trainer; the outermost `process` turns it into files and an exit code.
It must not import torch: a bad job is answered before anything heavy is loaded.
"""

from __future__ import annotations

import errno
import traceback
from typing import Any

from qtt_core.errors import DataError, QuickTuneError, SpecError
from qtt_core.results import EXIT_CODES, State

REASON_BYTES = 1000
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
VOLUME_ERRNOS = frozenset({errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT})

RETRYABLE = frozenset(
    state for state, code in EXIT_CODES.items() if code == EXIT_CODES[State.PREEMPTED]
)


class EndedError(QuickTuneError):
    """The job ends here, with a state that says whose fault it is; no traceback is due."""

    def __init__(self, state: State, reason: str, *, exit_code: int | None = None) -> None:
        self.facts: dict[str, Any] = {}
        """Further fields for `result.json`, as far as the job got."""
        self.state = state
        self.reason = reason
        self.exit_code = EXIT_CODES[state] if exit_code is None else exit_code
        super().__init__(f"{state.value}: {reason}")


def classify(error: BaseException) -> EndedError:
    """The end that an error means (20-trainer 6); anything unknown is a bug, exit 70."""
    if isinstance(error, EndedError):
        return error
    if isinstance(error, SpecError):
        return EndedError(State.INVALID_CONFIG, str(error))
    if isinstance(error, DataError):
        return EndedError(getattr(error, "state", State.BAD_DATA), str(error))
    if isinstance(error, OSError) and error.errno in FULL_ERRNOS:
        return EndedError(State.DISK_FULL, f"no space left: {error}")
    if isinstance(error, OSError) and error.errno in VOLUME_ERRNOS:
        return EndedError(State.INFRA_STORAGE, f"the volume failed: {error}")
    return _by_text(error) or EndedError(State.INTERNAL, traceback_tail(error))


def _by_text(error: BaseException) -> EndedError | None:
    """Errors that libraries raise as plain RuntimeError, told apart by their text."""
    text = str(error)
    if "DataLoader worker" in text and "exited unexpectedly" in text:
        return EndedError(State.INFRA_WORKER, text)
    if "CUDA error" in text or type(error).__name__ == "AcceleratorError":
        return EndedError(State.INFRA_GPU, text)
    return None


def traceback_tail(error: BaseException) -> str:
    """The last kilobyte of the traceback: the frames next to the fault."""
    text = "".join(traceback.format_exception(error)).strip()
    return text[-REASON_BYTES:]

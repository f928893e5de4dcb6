"""Which error ends `qtt` with which exit code: the one table, as in `sysexits.h`.

0 Complete   1 Failed   64 manifest or usage   65 data   69 Redis, cluster or hub unreachable
70 bug   74 disk full or I/O   75 interrupted, resumable
"""

from __future__ import annotations

from qtt_core.errors import (
    ClusterError,
    DataError,
    QuickTuneError,
    RunLockedError,
    SpecDriftError,
    SpecError,
    StaleEpochError,
    StoreError,
    StoreUnavailableError,
    UnknownConfigurationError,
    VolumeError,
)

COMPLETE, FAILED = 0, 1
USAGE, DATA, UNAVAILABLE, BUG, IO_ERROR, INTERRUPTED = 64, 65, 69, 70, 74, 75

MEANINGS = {
    COMPLETE: "the run is Complete, or the verb did its work",
    FAILED: "the run Failed; the reason is printed",
    USAGE: "manifest or command line: every fault with field, value and remedy",
    DATA: "images that cannot be trained on, weights that are damaged",
    UNAVAILABLE: "Redis, a cluster or a hub of weights cannot be reached",
    BUG: "a bug; --debug shows the traceback",
    IO_ERROR: "disk full or I/O error; nothing recorded is lost",
    INTERRUPTED: "interrupted or busy; the same command resumes",
}

_CODES: tuple[tuple[type[BaseException], int], ...] = (  # the first that fits, narrow before wide
    (SpecError, USAGE),
    (SpecDriftError, USAGE),
    (UnknownConfigurationError, USAGE),
    (DataError, DATA),
    (StaleEpochError, INTERRUPTED),
    (StoreUnavailableError, UNAVAILABLE),
    (StoreError, UNAVAILABLE),
    (ClusterError, UNAVAILABLE),
    (VolumeError, IO_ERROR),
    (RunLockedError, INTERRUPTED),
    (QuickTuneError, BUG),
    (KeyboardInterrupt, INTERRUPTED),
    (BrokenPipeError, COMPLETE),
    (OSError, IO_ERROR),
)


def exit_code(error: BaseException) -> int:
    """The code that an error which nobody handled ends the process with."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), BUG)

"""The log of an attempt: what a job prints, kept beside its result (20-trainer 5.2).

A cold process writes to its own stdout *and* the file; a warm parent's child writes to the file
only, because the parent's stdout carries its protocol. The file keeps about the last MiB.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

LIMIT_BYTES = 1 << 20
_SLACK = 1.25


def cap_log(path: Path, limit: int = LIMIT_BYTES) -> None:
    """Cut a log to its last `limit` bytes once it is a quarter longer; the writers append."""
    with contextlib.suppress(OSError), path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size <= limit * _SLACK:
            return
        file.seek(size - limit)
        tail = file.read()
        tail = tail[tail.find(b"\n") + 1 :]
        file.seek(0)
        file.truncate()
        file.write(b"[earlier lines were cut]\n" + tail)


class _Tee(io.TextIOBase):
    """Text to two places; a log that cannot be written (disk full) never ends the job."""

    def __init__(self, console: TextIO, log: TextIO) -> None:
        self._console, self._log = console, log

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._log.write(text)
            self._log.flush()
        return self._console.write(text)

    def flush(self) -> None:
        self._console.flush()

    def fileno(self) -> int:
        return self._console.fileno()


@contextlib.contextmanager
def teed_log(path: Path | None) -> Iterator[Callable[[], None]]:
    """Copy stdout and stderr to a log while inside; yields a function that caps the file."""
    log = _open(path)
    if log is None or path is None:
        _log_to(sys.stderr)
        yield lambda: None
        return
    console = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Tee(console[0], log), _Tee(console[1], log)
    _log_to(sys.stderr)
    try:
        yield lambda: cap_log(path)
    finally:
        sys.stdout, sys.stderr = console
        _log_to(sys.stderr)
        with contextlib.suppress(OSError):
            log.close()
        cap_log(path)


def redirect_to_log(path: Path | None) -> None:
    """Point file descriptors 1 and 2 at a log, C code's output included; for a forked child."""
    target = os.devnull
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            target = str(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        descriptor = os.open(target, flags, 0o644)
    except OSError:
        descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # a descriptor
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  # a descriptor
    _log_to(sys.stderr)


def _open(path: Path | None) -> TextIO | None:
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", buffering=1, errors="backslashreplace")
    except OSError:
        return None


def _log_to(stream: TextIO | _Tee) -> None:
    """One handler for everything; warnings of libraries come through it too."""
    logging.basicConfig(
        stream=stream,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.captureWarnings(True)
    logging.getLogger("timm").setLevel(logging.WARNING)

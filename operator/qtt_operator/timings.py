"""Monotonic times of a run's jobs and turns, as JSON lines: where the time between jobs went.

`benchmarks/overhead.py` reads it: own overhead of a step = from the end of a job on a slot to the
start of the next one there. A trace that cannot be written is dropped; the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class Trace:
    """Appends to one file; `now` is monotonic, `wall` for people."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO | None = None
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", buffering=1)

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """One line: the event, the time, and its facts."""
        if self._file is None:
            return
        line = {"event": event, "now": round(time.monotonic(), 6), "wall": round(time.time(), 3)}
        with contextlib.suppress(OSError, ValueError):
            self._file.write(json.dumps({**line, **facts}) + "\n")

    def close(self) -> None:
        """End the trace."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

"""What a command is given beside its job: the stop flag, progress, and the age of the process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtt_trainer.stopping import Stop


def _nothing() -> None:
    return None


@dataclass(slots=True, kw_only=True)
class Context:
    """The surroundings of one job.

    `born`: monotonic time at which this process (or this fork) began; `channel`: a warm parent's
    pipe for progress.
    """

    stop: Stop
    born: float
    channel: Callable[[Mapping[str, Any]], None] | None = None
    housekeep: Callable[[], None] = field(default=_nothing)
    """Called now and then while the job runs; caps the log."""
    progress: int = 0
    """Updates that this attempt has saved: what a retry does not have to train again."""

    def age(self) -> float:
        """Seconds since the process began."""
        return time.monotonic() - self.born


def process_birth() -> float:
    """Monotonic time at which this process was started, interpreter start-up included.

    From /proc on Linux, in clock ticks since boot; elsewhere now.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return since_boot - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic()

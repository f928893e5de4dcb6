"""Small facts about processes: who is alive, since when, and the end of a whole group.

A process id alone is no identity: the kernel hands it out again. What may outlive this process is
therefore remembered with its start time, which is compared before a signal is sent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When a living process began, in the kernel's ticks since boot; None if dead or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the command name in parentheses may hold spaces and parentheses itself
    fields = text.rpartition(")")[2].split()
    state, ticks = fields[0], fields[19]
    return None if state in "ZX" else int(ticks)


def is_same(pid: int, ticks: int) -> bool:
    """Whether the process that had this id and start time still lives."""
    return start_ticks(pid) == ticks


def signal_group(pgid: int, number: signal.Signals) -> None:
    """Signal a process group; one that is gone already is fine."""
    if pgid > 1:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pgid, number)


def end_groups(leaders: Iterable[tuple[int, int]], patience_seconds: float = 5.0) -> int:
    """Kill the groups of (leader's id, start ticks) that still live, and wait until they are gone.

    Returns: how many were alive. The wait polls: these are not our children.
    """
    living = [(pid, ticks) for pid, ticks in leaders if is_same(pid, ticks)]
    for pid, _ in living:
        signal_group(pid, signal.SIGKILL)
    deadline = time.monotonic() + patience_seconds
    while any(is_same(pid, ticks) for pid, ticks in living) and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(living)


def oom_kills() -> int:
    """Processes the kernel has killed for lack of memory since boot, here or in our container.

    A job that vanished by SIGKILL while this number rose was killed for memory.
    """
    total = 0
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    total += int(value)
    return total

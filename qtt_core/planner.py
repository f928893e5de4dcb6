"""`decide`: from what is known to what to do next. Pure: no clock, no I/O, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JobPhase(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """How a job's trainer process ended, as the back end saw it.

    `exit_code` None = killed by `signal` or never seen to end; `message` is the termination message;
    `reason`: the back end's own word (`OOMKilled`, `DeadlineExceeded`, `RunnerLost`, `Vanished`, …).
    Units: seconds of device time held, and seconds waited before it.
    """

    exit_code: int | None
    signal: int | None = None
    message: str = ""
    reason: str = ""
    device_seconds: float = 0.0
    queue_seconds: float = 0.0
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedJob:
    """One job, by the decision it belongs to. `c` as in the ledger: config id text or pseudo-configuration."""

    name: str
    kind: str
    c: str
    to: int
    attempt: int
    phase: JobPhase
    created_at: float
    started_at: float | None = None
    end: JobEnd | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """All jobs of the run; `synced_at`: when the list was last known to be complete."""

    jobs: tuple[ObservedJob, ...] = ()
    synced_at: float = 0.0
    devices: int = 1
    """How many jobs the back end can run at once (locally: the device slots)."""

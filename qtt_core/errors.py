"""Every error of the project, one root; leaves say whose fault it is and whether a retry helps.

QuickTuneError
├── SpecError                 the user's input: all faults at once, each with field, value, remedy
│   └── NotFoundError           what a manifest names is not there; it may come without an edit
├── DataError                 the user's images
├── SpecDriftError            a manifest changed under a started run
├── UnknownConfigurationError a config id nobody proposed
├── ObservationError          a result the optimizer cannot accept
├── MessageError              a termination message that is missing, stale or out of range
├── LedgerError               events that contradict each other
│   └── NewerSchemaError      written by a newer version
├── StoreError                Redis
│   ├── StoreUnavailableError   unreachable; a retry helps
│   └── StaleEpochError         another process has taken over; stop writing
├── OptimizerError            a worker that died, timed out or answered nonsense
├── ClusterError              the Kubernetes API refused a call
│   └── ClusterUnavailableError unreachable or overloaded; a retry helps
├── VolumeError               disk full or I/O on the state folder
└── RunLockedError            another process runs this run
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class QuickTuneError(Exception):
    """Root of all errors that this project raises on purpose."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with an input: where, what, and what would be right."""

    field: str
    value: object
    expected: str

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.value)}; {self.expected}"


class _Absent:
    """The value of a field that is not there."""

    def __repr__(self) -> str:
        return "missing"


ABSENT = _Absent()


def _shown(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class SpecError(QuickTuneError):
    """Input that cannot be used; carries every fault found, not only the first."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults: tuple[Fault, ...] = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class NotFoundError(SpecError):
    """A manifest names what is not there; it may appear without an edit."""


class DataError(QuickTuneError):
    """Images or folders that cannot be trained on; the message names what and where."""


class SpecDriftError(QuickTuneError):
    """The manifest's immutable fields differ from those the run was started with."""

    def __init__(self, fields: Sequence[str], remedy: str) -> None:
        self.fields = tuple(fields)
        super().__init__(f"changed under a started run: {', '.join(fields)}; {remedy}")


class UnknownConfigurationError(QuickTuneError):
    """A config id that this optimizer never proposed."""


class ObservationError(QuickTuneError):
    """A result out of range, out of order or not finite; never clamped, never guessed."""


class MessageError(QuickTuneError):
    """A termination message that cannot be trusted."""


class LedgerError(QuickTuneError):
    """Events that contradict each other."""


class NewerSchemaError(LedgerError):
    """The ledger was written by a newer version of this project."""


class StoreError(QuickTuneError):
    """Redis refused or failed."""


class StoreUnavailableError(StoreError):
    """Redis cannot be used; nothing was lost, a retry helps. `reason`: of `StoreAvailable`."""

    def __init__(self, message: str = "", *, reason: str = "Unreachable") -> None:
        self.reason = reason
        super().__init__(message)


class StaleEpochError(StoreError):
    """A newer writer has fenced this one off; it must stop."""


class OptimizerError(QuickTuneError):
    """An optimizer worker died, timed out or answered nonsense.

    `reason`: of the condition `OptimizerHealthy`: Timeout, OutOfMemory or Failed.
    """

    def __init__(self, message: str = "", *, reason: str = "Failed") -> None:
        self.reason = reason
        super().__init__(message)


class ClusterError(QuickTuneError):
    """The Kubernetes API refused a call; `status` is the HTTP code, 0 where none came."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        self.status = status
        self.reason = reason
        super().__init__(message)


class ClusterUnavailableError(ClusterError):
    """The API server is away or overloaded; nothing was lost, a retry helps."""


class VolumeError(QuickTuneError):
    """The state folder cannot be written: disk full or I/O error."""


class RunLockedError(QuickTuneError):
    """Another process on this machine is running the same run."""

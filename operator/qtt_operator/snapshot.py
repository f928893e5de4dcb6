"""What a person sees of a run at one moment: plain data between the runner and its views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qtt_core.history import ConfigHistory
from qtt_core.ledger.fold import LedgerState
from qtt_core.plan import Phase
from qtt_core.spec import RunSpec
from qtt_core.steps import Recommendation
from qtt_operator.local_backend import RunningStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of a run; `now` in seconds since 1970."""

    name: str
    spec: RunSpec
    phase: Phase
    state: LedgerState
    histories: Mapping[int, ConfigHistory]
    running: tuple[RunningStep, ...]
    recommendation: Recommendation | None
    now: float
    slots: int
    models: int
    doing: str = ""
    """What the runner itself waits for, such as `asking the optimizer`."""
    draining: bool = False
    trouble: str = ""
    """Why nothing moves; empty when all is well."""

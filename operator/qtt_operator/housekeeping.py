"""What a local run keeps beside its turns: kept checkpoints, status.yaml, histories once folded.

Derived from the ledger alone; losing any of it costs nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from qtt_core.errors import VolumeError
from qtt_core.history import Histories
from qtt_core.plan import Phase, Plan
from qtt_core.retention import chosen, garbage
from qtt_operator.run_folder import write_atomically
from qtt_operator.status import build_status
from qtt_operator.turn import RunContext

log = logging.getLogger(__name__)


class Housekeeping:
    """Keeps what is folded from the events, since several readers ask between two events."""

    def __init__(self, status_file: Path) -> None:
        self._status_file = status_file
        self._folded = 0
        self._histories = Histories()
        self._written: dict[str, Any] = {}
        self._failing = False

    def histories(self, context: RunContext) -> Histories:
        """Every configuration's past, as of the last event read."""
        fresh = context.events[self._folded :]
        if fresh:
            self._folded = len(context.events)
            self._histories.take(fresh, context.configs)
        return self._histories

    def garbage(self, context: RunContext, c: str) -> tuple[str, ...]:
        """Folders that the next job of a configuration may delete.

        Beside what the policy names, every configuration keeps its best checkpoint (the
        leaderboard's) and its newest (it goes on from there).
        """
        past, config_id = self.histories(context), int(c)
        if config_id not in past:
            return ()
        policy = context.run.spec.checkpoint
        retention, top_k = (policy.retention, policy.top_k) if policy else ("Incumbent", 3)
        saved = past[config_id].saved
        points = {config_id: tuple(epoch for epoch, _ in saved)}
        kept = set(chosen(retention, top_k, past, points, context.recommendation))
        best = max(saved, key=lambda point: (point[1], -point[0]), default=None)
        if best is not None:
            kept.add((config_id, best[0]))
        return garbage(frozenset(kept), points, config_id)

    def write_status(self, context: RunContext, plan: Plan) -> None:
        """Replace status.yaml if it changed; a full disk is reported once, the run goes on."""
        status = self.status(context, plan.phase, plan.held)
        if status == self._written:
            return
        try:
            write_atomically(self._status_file, yaml.safe_dump(status, sort_keys=False))
        except VolumeError as error:
            if not self._failing:
                log.error("%s", error)
            self._failing = True
        else:
            self._written, self._failing = status, False

    def status(
        self, context: RunContext, phase: Phase, held: tuple[str, str] | None
    ) -> dict[str, Any]:
        """The run's `.status`."""
        return build_status(
            spec=context.run.spec,
            identity=context.run.identity,
            ledger=context.state,
            histories=self.histories(context),
            observed=context.observed,
            phase=phase,
            held=held,
            recommendation=context.recommendation,
            now=context.clock(),
            previous=self._written.get("conditions", ()),
        )

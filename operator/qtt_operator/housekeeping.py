"""What a local run keeps beside its turns: kept checkpoints, status.yaml, histories once folded.

Derived from the ledger alone; losing any of it costs nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from qtt_core.errors import VolumeError
from qtt_core.history import ConfigHistory, Histories
from qtt_core.plan import Candidate, Phase, Plan
from qtt_core.retention import chosen, garbage, survivors
from qtt_operator.failpoints import reached
from qtt_operator.names import checkpoint_folder
from qtt_operator.progress import progress
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
        if saved:
            kept.add((config_id, _best_epoch(past[config_id])))
        return garbage(frozenset(kept), points, config_id)

    def candidates(self, context: RunContext, best: str = "") -> tuple[Candidate, ...]:
        """Configurations with a score, best first; `best` is a folder known to be kept.

        A run that is over keeps what its policy names, any other one each configuration's best.
        """
        past = self.histories(context)
        order = past.best(len(past))
        points = {h.config_id: survivors(h) for h in order}
        policy = context.run.spec.checkpoint
        retention, top_k = (policy.retention, policy.top_k) if policy else ("Incumbent", 3)
        kept = chosen(retention, top_k, past, points, context.recommendation)
        folders = {checkpoint_folder(str(c), epoch) for c, epoch in kept} | {best}
        if context.state.closed is None:
            folders |= {checkpoint_folder(str(h.config_id), _best_epoch(h)) for h in order}
        return tuple(_candidate(history, folders) for history in order)

    def write_status(self, context: RunContext, plan: Plan) -> None:
        """Replace status.yaml if it changed; a full disk is reported once, the run goes on."""
        status = self.status(context, plan.phase, plan.held)
        if status == self._written:
            return
        try:
            write_atomically(self._status_file, yaml.safe_dump(status, sort_keys=False))
            reached("status")
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
            seconds_left=progress(
                context.run.spec, context.state, context.events, context.clock()
            ).seconds_left,
            previous=self._written.get("conditions", ()),
        )


def _best_epoch(history: ConfigHistory) -> int:
    """Of the best-scored checkpoint, the earlier of equals; 0 where there is none."""
    best = max(history.saved, key=lambda point: (point[1], -point[0]), default=(0, 0.0))
    return best[0]


def _candidate(history: ConfigHistory, folders: set[str]) -> Candidate:
    """`folders`: the checkpoints that are kept, of all configurations."""
    by_score = sorted(history.saved, key=lambda point: (-point[1], point[0]))
    mine = [checkpoint_folder(str(history.config_id), epoch) for epoch, _ in by_score]
    return Candidate(
        config_id=history.config_id, config=history.config, fidelity=history.fidelity,
        score=history.best_score or 0.0, closed=history.standing.is_closed,
        seconds_per_epoch=history.trained_seconds / max(1, len(history.epochs)),
        checkpoint=next((folder for folder in mine if folder in folders), ""),
    )  # fmt: skip

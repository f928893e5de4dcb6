"""Which checkpoints a cluster's volume may lose, and the Jobs that look after it. Pure.

A step deletes what its own configuration no longer needs (`job.gc`). What no next step will delete,
of closed configurations and at the end of the run, goes by a `garbage` Job; results that the store
has lost come back by a `recovery` Job (30-kubernetes 3.3, 5.2, 5.5).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtt_core.history import Histories, Standing
from qtt_core.ledger.events import Event, Note
from qtt_core.ledger.fold import LedgerState
from qtt_core.plan import CreateJob
from qtt_core.retention import (
    GARBAGE_NOTE,
    Kept,
    best_checkpoint,
    chosen,
    final_garbage,
    ranked,
    survivors,
    swept,
    without,
)
from qtt_core.spec import RunSpec
from qtt_core.steps import Best, Recommendation, canonical_json
from qtt_operator.lost_results import RECOVERY_NOTE

CHORE_SECONDS = 600.0
"""A chore that has not ended by then is given up; the run goes on without it."""

BEST_NOTE = "best"
"""`what` of a note: `new` is the recommendation that a run ended with, as JSON."""

TRIES = 3
"""Chores of a kind that may fail in a row."""

BATCH = 16
"""Configurations that closed and whose files are worth a Job while the run goes on."""

PATHS_A_JOB = 2000
"""They travel in one environment variable, of at most 128 KiB."""

SPARE = 5
"""Of closed configurations, those this near the top keep a checkpoint: they may yet be chosen."""

RELATIONS = "relationship"
"""The trainer's cache of co-tuning, of no use to anybody after the run."""

_FOLDER = re.compile(r"c([0-9]+)/f([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the choice rests on. `best`: `.status.best` as last written, {} without one."""

    spec: RunSpec
    events: Sequence[Event]
    past: Histories
    recommendation: Recommendation | None
    best: Mapping[str, Any]


def kept_at_end(facts: Facts) -> frozenset[Kept]:
    """The checkpoints that stay once the run is over: what the policy promises.

    A process that has not loaded the optimizer knows no recommendation: then the checkpoint that
    the status names stays, else the best-scored one.
    """
    _, gone = swept(facts.events)
    points = _points(facts, gone)
    policy = facts.spec.checkpoint
    retention, top_k = (policy.retention, policy.top_k) if policy else ("Incumbent", 3)
    kept = chosen(retention, top_k, facts.past, points, facts.recommendation)
    if facts.recommendation is None and retention in {"Incumbent", "TopK"}:
        kept |= _named(facts.best, points) or _best_scored(facts.past, points)
    return kept


def kept_meanwhile(facts: Facts) -> frozenset[Kept]:
    """What stays while the run goes on, beside configurations that may be continued."""
    points = _points(facts, swept(facts.events)[1])
    policy = facts.spec.checkpoint
    top = max(SPARE, policy.top_k if policy else 0)
    near = {(h.config_id, epoch) for h in ranked(facts.past, top)
            for epoch in points.get(h.config_id, ())}  # fmt: skip
    return kept_at_end(facts) | near


def garbage_now(facts: Facts) -> tuple[str, ...]:
    """Folders of closed configurations to delete while the run goes on; few are not worth a Job."""
    closed = {c for c, past in facts.past.items() if past.standing.is_closed}
    if len(closed) < BATCH:
        return ()
    paths = final_garbage(kept_meanwhile(facts), facts.events, only=closed)
    found = without(paths, swept(facts.events)[0])
    return found if sum("/" not in path for path in found) >= BATCH else ()


def garbage_at_end(facts: Facts) -> tuple[str, ...]:
    """Everything that the policy does not keep and that is not deleted yet."""
    paths = (*final_garbage(kept_at_end(facts), facts.events), RELATIONS)
    return without(paths, swept(facts.events)[0])


def least_promising(facts: Facts, volumes: Collection[str]) -> list[str]:
    """One configuration to give its volume up for a new one; should it go on, it begins anew.

    The worst of those that wait, never one that the policy would keep; none if there is no other.
    """
    spared = {c for c, _ in kept_at_end(facts)}
    order = [h.config_id for h in ranked(facts.past, len(facts.past))]
    unscored = [c for c in facts.past if c not in order]
    waiting = [c for c in (*order, *unscored) if str(c) in volumes and c not in spared]
    idle = [c for c in waiting if facts.past[c].standing is not Standing.OPEN]
    return [str(c) for c in idle[-1:]]


def best_note(recommendation: Recommendation) -> Note:
    """What the run ended with, for a process that did not load the optimizer."""
    return Note(what=BEST_NOTE, new=canonical_json(recommendation.to_json()))


def recorded_best(ledger: LedgerState) -> Recommendation | None:
    """The newest recommendation that was recorded at an end of the run."""
    found = [note.new for note in ledger.notes if note.what == BEST_NOTE]
    if not found:
        return None
    raw = json.loads(found[-1])
    return Recommendation(**{**raw, "best_observed": Best(**raw["best_observed"])})


def chore_number(ledger: LedgerState, kind: str) -> int:
    """How many chores of a kind ended before: the `n` of `<run>-gc-<n>`."""
    what = _NOTE[kind]
    return sum(1 for note in ledger.notes if note.what == what)


def gave_up(ledger: LedgerState, kind: str) -> bool:
    """Whether the newest chores of a kind failed too often to try again."""
    mine = [note for note in ledger.notes if note.what == _NOTE[kind]]
    return len(mine) >= TRIES and all(not note.new for note in mine[-TRIES:])


def chore_name(run: str, kind: str, number: int) -> str:
    """`birds-gc-0`, `birds-recovery-2`."""
    return f"{run}-{'gc' if kind == 'garbage' else kind}-{number}"


def chore_order(uid: str, kind: str, number: int) -> CreateJob:
    """The order of a chore of a run; it belongs to no decision of the ledger."""
    return CreateJob(
        kind=kind, c="", frm=0, to=0, attempt=0, decision=f"{uid}-{kind}-{number}",
        timeout_seconds=CHORE_SECONDS,
    )  # fmt: skip


_NOTE = {"garbage": GARBAGE_NOTE, "recovery": RECOVERY_NOTE}


def _points(facts: Facts, gone: frozenset[Kept]) -> dict[int, tuple[int, ...]]:
    """Checkpoints that exist: under `All` every one, else those that steps leave."""
    policy = facts.spec.checkpoint
    every = policy is not None and policy.retention == "All"
    return {
        c: tuple(
            epoch
            for epoch in ([e for e, _ in past.saved] if every else survivors(past))
            if (c, epoch) not in gone
        )
        for c, past in facts.past.items()
    }


def _named(best: Mapping[str, Any], points: Mapping[int, Sequence[int]]) -> frozenset[Kept]:
    match = _FOLDER.fullmatch(str(best.get("checkpoint", "")))
    if match is None:
        return frozenset()
    c, epoch = int(match[1]), int(match[2])
    return frozenset({(c, epoch)} if epoch in points.get(c, ()) else ())


def _best_scored(past: Histories, points: Mapping[int, tuple[int, ...]]) -> frozenset[Kept]:
    for history in ranked(past, len(past)):
        epoch = best_checkpoint(points.get(history.config_id, ()), history)
        if epoch is not None:
            return frozenset({(history.config_id, epoch)})
    return frozenset()

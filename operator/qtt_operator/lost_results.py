"""From what a volume tells to the events that the ledger lost (30-kubernetes 3.3, row 12). Pure.

A `recovery` Job reads `result.json` files and says which epochs lie behind those that the ledger
knows. Each becomes the end of the decision that is open, or a decision of its own with its end.
What does not fit onto the ledger is left out: a lost step is trained again, a wrong one never told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtt_core.ledger.events import Done, Event, Fail, Note, Open
from qtt_core.ledger.fold import LedgerState, OpenEntry
from qtt_core.plan import Identity
from qtt_core.results import State
from qtt_core.spec import RunSpec
from qtt_core.steps import Config, Why, decision_hash, digest

log = logging.getLogger(__name__)

RECOVERY_NOTE = "recovery"
"""`what` of a note: `new` = {told, more} as JSON; without it, `old` says why nothing was told."""

Row = tuple[int, float, float]
"""(absolute epoch, score in [0, 1], seconds)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """One end to record, and before it the decision if that is lost, too."""

    opened: Open | None
    config: Config | None
    end: Done | Fail


def is_exhausted(events: Sequence[Event]) -> bool:
    """Whether the volume was read to its end since the last thing that happened."""
    for event in reversed(events):
        if isinstance(event, Note) and event.what == RECOVERY_NOTE and event.new:
            return not json.loads(event.new)["more"]
        if not isinstance(event, Note):
            return False
    return False


def known_heads(ledger: LedgerState, configs: Mapping[str, Config]) -> dict[str, int]:
    """Config id -> newest epoch of every configuration in the ledger."""
    return {c: ledger.heads.get(c, 0) for c in configs}


def recovered(
    entry: Mapping[str, Any],
    ledger: LedgerState,
    spec: RunSpec,
    identity: Identity,
    configs: Mapping[str, Config],
) -> list[Recovered]:
    """What to record for one configuration that a volume told of; nothing if it does not fit."""
    try:
        return _recovered(entry, ledger, spec, identity, configs)
    except (KeyError, TypeError, ValueError) as error:
        log.warning("a result on the volume cannot be used: %s", error)
        return []


def _recovered(
    entry: Mapping[str, Any],
    ledger: LedgerState,
    spec: RunSpec,
    identity: Identity,
    configs: Mapping[str, Config],
) -> list[Recovered]:
    """Raises: KeyError, TypeError, ValueError for what the ledger could not take."""
    c, state, to = str(int(entry["c"])), State(entry["state"]), int(entry["to"])
    if c in ledger.failed or not 1 <= to <= spec.fidelity.max:
        return []
    config = configs.get(c) or entry["config"]
    rows, open_entry = _rows(entry, ledger.heads.get(c, 0), spec), ledger.open.get(c)
    found: list[Recovered] = []
    if open_entry is not None and (to <= open_entry.to or _reaches(rows, open_entry.to)):
        mine = [row for row in rows if row[0] <= open_entry.to]
        whole = to == open_entry.to
        if not whole and not _reaches(mine, open_entry.to):
            return []  # it goes on from its checkpoint by itself
        end = _end(open_entry, mine, entry if whole else {}, state if whole else State.OK, spec)
        found.append(Recovered(opened=None, config=None, end=end))
        rows = [row for row in rows if row[0] > open_entry.to]
        if whole:
            return found
    elif open_entry is not None:
        return []
    frm = max(ledger.heads.get(c, 0), found[-1].end.to if found else 0)
    opened = _opened(c, frm, to, config, ledger, identity)
    entry_of = OpenEntry(
        c=c, frm=frm, to=to, attempt=opened.a, decision=opened.h, reserved=0.0, opened_id="",
        since=0.0,
    )  # fmt: skip
    end = _end(entry_of, rows, entry, state, spec)
    return [*found, Recovered(opened=opened, config=config, end=end)]


def _rows(entry: Mapping[str, Any], head: int, spec: RunSpec) -> list[Row]:
    """Scores behind the head, in order and in range. Raises: ValueError."""
    rows: list[Row] = []
    for epoch, value, seconds in entry["epochs"]:
        if epoch <= head:
            continue
        if epoch != head + len(rows) + 1:
            raise ValueError(f"epoch {epoch} does not follow {head + len(rows)}")
        if not spec.metric.in_range(value) or seconds < 0:
            raise ValueError(f"epoch {epoch}: {spec.metric.name} {value}, {seconds} s")
        rows.append((int(epoch), spec.metric.to_score(float(value)), float(seconds)))
    return rows


def _end(
    opened: OpenEntry, rows: Sequence[Row], entry: Mapping[str, Any], state: State, spec: RunSpec
) -> Done | Fail:
    """The end of a decision; what is told about the newest one alone stands in `entry`."""
    trained = sum(seconds for _, _, seconds in rows)
    held = max(trained, float(entry.get("held", 0.0)))
    dev = held * spec.charged_devices
    if state in {State.OOM, State.INFEASIBLE}:
        reason = str(entry.get("reason", ""))
        return Fail(
            c=opened.c, to=opened.to, a=opened.attempt, state=state.value, dev=dev, msg=reason
        )
    if state is State.OK and not _reaches(rows, opened.to):
        raise ValueError(f"the curve ends before epoch {opened.to}")
    return Done(
        c=opened.c, to=opened.to, a=opened.attempt, state=state.value, epochs=tuple(rows), dev=dev,
        ov=held - trained, ck=str(entry.get("ck", "")), bytes=int(entry.get("bytes", 0)),
    )  # fmt: skip


def _opened(
    c: str, frm: int, to: int, config: Config, ledger: LedgerState, identity: Identity
) -> Open:
    """A decision for a result whose own is lost: nobody knows any more who took it, or why."""
    if not frm < to:
        raise ValueError(f"epoch {to} is not behind {frm}")
    decision = decision_hash(
        uid=identity.uid, config=int(c), fidelity_from=frm, fidelity_to=to,
        config_digest=digest(dict(config)), space_sha=identity.space_sha, seed=identity.seed,
        position=RECOVERY_NOTE,
    )  # fmt: skip
    return Open(
        c=c, frm=frm, to=to, a=ledger.attempts.get((c, to), 0), h=decision, res=0.0,
        why=Why(rule=RECOVERY_NOTE).to_json(), ver=identity.version,
    )  # fmt: skip


def _reaches(rows: Sequence[Row], epoch: int) -> bool:
    return bool(rows) and rows[-1][0] >= epoch

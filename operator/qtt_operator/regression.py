"""When the store knows less than it did: a tail lost in a crash, a restore, an empty server.

Jobs are the second witness. Each carries its whole decision, so that a decision the ledger has lost
is written again and its result collected as usual; a result whose record was lost is committed
again from the pod. The status is the tripwire: it never counts more steps than the ledger did.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qtt_core.errors import LedgerError
from qtt_core.ledger.events import Event, Note, Open, Reopen, from_fields
from qtt_core.ledger.fold import RETRY_NOTE, LedgerState
from qtt_core.ledger.reply import Reply
from qtt_core.steps import Config
from qtt_operator.active_run import ActiveRun
from qtt_operator.cluster import JOBS, Cluster, Object
from qtt_operator.names import (
    ATTEMPT_LABEL,
    COMPLETE_REASONS,
    DECISION_ANNOTATION,
    OPEN_ANNOTATION,
    SEQUENCE_ANNOTATION,
    TRAINER,
)

log = logging.getLogger(__name__)

RETRY_ANNOTATION = "quicktune.dev/retry"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A Job whose decision is not in the ledger; `opened` as it was once written."""

    job: str
    opened: Open


def missing_steps(state: LedgerState, status: Mapping[str, Any]) -> int:
    """Steps that the status has counted and the ledger does not know; 0 when all is well."""
    counted = int((status.get("consumed") or {}).get("steps") or 0)
    return max(0, counted - state.steps)


def lost_decisions(jobs: Iterable[Object], events: Sequence[Event]) -> list[Lost]:
    """Jobs that carry a decision the ledger lacks, in the order in which they were decided."""
    known = {event.h for event in events if isinstance(event, Open)}
    found = []
    for job in jobs:
        notes = job["metadata"].get("annotations") or {}
        if notes.get(DECISION_ANNOTATION) in known or OPEN_ANNOTATION not in notes:
            continue
        try:
            fields = json.loads(notes[OPEN_ANNOTATION])
            opened = from_fields(notes[SEQUENCE_ANNOTATION], fields)
        except (KeyError, ValueError, TypeError, LedgerError) as error:
            log.warning("%s: its decision cannot be read: %s", job["metadata"]["name"], error)
            continue
        if isinstance(opened, Open) and opened.h == notes.get(DECISION_ANNOTATION):
            attempt = int(job["metadata"]["labels"][ATTEMPT_LABEL])
            found.append(Lost(job=job["metadata"]["name"], opened=replace(opened, a=attempt)))
    return sorted(found, key=lambda lost: _order(lost.opened.id))


async def open_again(run: ActiveRun, cluster: Cluster) -> int:
    """Write lost decisions again; how many were taken. The next turn collects their results."""
    taken = 0
    for lost in lost_decisions(run.backend.all_jobs(), run.context.events):
        config = await _config_of(cluster, run.backend.namespace, lost)
        event = replace(lost.opened, id="", ep=0)
        reply, _ = await run.context.ledger.open(event, config=config, job=lost.job)
        if reply is Reply.OK:
            taken += 1
            log.warning("%s: its decision was lost in the store and is recorded again", lost.job)
    return taken


async def retry(run: ActiveRun, token: str) -> bool:
    """Act on a person's `retry` annotation, once per token: forgive failures, reopen a failed run.

    Returns: whether the token is new.
    """
    state, ledger = run.context.state, run.context.ledger
    if state.run is None or any(n.what == RETRY_NOTE and n.old == token for n in state.notes):
        return False
    note = Note(what=RETRY_NOTE, old=token, new="annotation")
    reply, _ = await ledger.note(note, key=f"{RETRY_NOTE}-{token}")
    if reply is not Reply.OK:
        return False
    closed = state.closed
    if closed is not None and closed.reason not in COMPLETE_REASONS:
        await ledger.note(Reopen(reason="Retried"), key=f"reopen-{closed.id}")
    return True


async def _config_of(cluster: Cluster, namespace: str, lost: Lost) -> Config | None:
    """The configuration, from the job document in the Job; None for a pseudo-configuration."""
    if not lost.opened.c.isdigit():
        return None
    job = await cluster.get(JOBS, namespace, lost.job)
    if job is None:
        return None
    for container in job["spec"]["template"]["spec"]["containers"]:
        for variable in container.get("env") or () if container["name"] == TRAINER else ():
            if variable["name"] == "QTT_STEP":
                config: Config = json.loads(variable["value"])["config"]
                return config
    return None


def _order(stream_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = stream_id.partition("-")
    return int(milliseconds or 0), int(sequence or 0)

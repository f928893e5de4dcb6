"""The `.status` of a TuningRun: what `status` computes, and what only a cluster knows. Pure.

Conditions are merged by type onto the ones that are there: a time moves only with its status, each
carries the generation it was computed from, none is ever removed, and texts are cut so that the
whole stays within a few KiB whatever happened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from qtt_operator.conditions import Truth
from qtt_operator.job_ends import seconds
from qtt_operator.names import RUN_UID_LABEL

Condition = dict[str, Any]
Status = dict[str, Any]

MESSAGE_LENGTH = 1024
TERMINAL = ("Complete", "Failed")


def with_conditions(
    previous: Sequence[Condition], truths: Sequence[Truth], *, generation: int, now: float
) -> list[Condition]:
    """The conditions after these truths; of one type the last truth counts."""
    merged = {condition["type"]: condition for condition in previous}
    for truth in {truth.type: truth for truth in truths}.values():
        old = merged.get(truth.type, {})
        same = old.get("status") == str(truth.status)
        merged[truth.type] = {
            "type": truth.type,
            "status": str(truth.status),
            "reason": truth.reason,
            "message": truth.message[:MESSAGE_LENGTH],
            "observedGeneration": generation,
            "lastTransitionTime": old["lastTransitionTime"] if same else timestamp(now),
        }
    return list(merged.values())


def cluster_status(
    status: Status,
    truths: Sequence[Truth],
    *,
    previous: Sequence[Condition],
    uid: str,
    generation: int,
    now: float,
    store: str,
) -> Status:
    """A computed status with the cluster's fields; its own conditions come before `truths`."""
    own = [
        Truth(
            type=c["type"], status=c["status"] == "True", reason=c["reason"], message=c["message"]
        )
        for c in status.get("conditions", ())
    ]
    now_true = {truth.type for truth in own}
    over = [
        Truth(type=kind, status=False, reason="Reopened")
        for kind in TERMINAL
        if is_true(previous, kind) and kind not in now_true
    ]
    if is_true(previous, "Suspended") and "Suspended" not in now_true:
        over.append(Truth(type="Suspended", status=False, reason="UserRequested"))
    return status | {
        "conditions": with_conditions(
            previous, [*own, *over, *truths], generation=generation, now=now
        ),
        "observedGeneration": generation,
        "selector": f"{RUN_UID_LABEL}={uid}",
        "storeRef": store,
    }


def is_true(conditions: Sequence[Mapping[str, Any]], kind: str) -> bool:
    """Whether a condition is there and True."""
    return any(c["type"] == kind and c["status"] == "True" for c in conditions)


def ended(found: Mapping[str, Any]) -> bool:
    """Whether a TuningRun's status says that it ended, as of its present spec."""
    status = found.get("status") or {}
    return any(
        c["type"] in TERMINAL
        and c["status"] == "True"
        and c.get("observedGeneration") == found["metadata"].get("generation")
        for c in status.get("conditions") or ()
    )


def told_ended(status: Mapping[str, Any]) -> float | None:
    """When a status first said that its run is over, as seconds since 1970; None: it does not.

    The end itself may be minutes older: volumes are cleaned in between. A time to live that began
    with it could delete a run before anybody saw it Complete.
    """
    ends = [c for c in status.get("conditions") or () if c["type"] in TERMINAL]
    return max(
        (seconds(c["lastTransitionTime"]) or 0.0 for c in ends if c["status"] == "True"),
        default=None,
    )


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> Status:
    """The smallest merge patch from one status to another; {} where nothing differs."""
    patch: Status = {name: None for name in old.keys() - new.keys()}
    for name, value in new.items():
        known = old.get(name)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            inner = merge_patch(known, value)
            if inner:
                patch[name] = inner
        elif value != known:
            patch[name] = value
    return patch


def news(old: Sequence[Condition], new: Sequence[Condition]) -> list[Condition]:
    """Conditions whose status or reason changed: worth a write at once, and an Event."""
    known = {c["type"]: (c["status"], c["reason"]) for c in old}
    return [c for c in new if known.get(c["type"]) != (c["status"], c["reason"])]


def size_bytes(status: Mapping[str, Any]) -> int:
    """The status as the API server is sent it."""
    return len(json.dumps(status, separators=(",", ":")).encode())


def timestamp(moment: float) -> str:
    """Seconds since 1970 as the API writes times."""
    return datetime.fromtimestamp(moment, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

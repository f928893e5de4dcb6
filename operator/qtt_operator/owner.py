"""Whose the objects are that we make: a TuningRun by identity, its labels, its reference. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qtt_core.spec import TuningRun
from qtt_operator.names import GROUP, RUN_LABEL, RUN_UID_LABEL

Object = dict[str, Any]

MANAGED = {
    "app.kubernetes.io/name": "quicktune-step",
    "app.kubernetes.io/managed-by": "quicktune-operator",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunObject:
    """The TuningRun as Jobs need it: parsed, and its identity on the server."""

    run: TuningRun
    uid: str


def owner_labels(owner: RunObject) -> dict[str, str]:
    """Labels of everything we make for a run."""
    return {**MANAGED, RUN_LABEL: owner.run.name, RUN_UID_LABEL: owner.uid}


def owner_reference(owner: RunObject) -> Object:
    """Jobs go with their TuningRun; blocking its deletion would need rights on finalizers."""
    return {
        "apiVersion": f"{GROUP}/v1alpha1", "kind": "TuningRun", "name": owner.run.name,
        "uid": owner.uid, "controller": True, "blockOwnerDeletion": False,
    }  # fmt: skip

"""What a Job says of the decision behind it: the second witness of a store that has lost its tail.

Every Job carries the `open` event it was made for, and its configuration in the trainer's document.
Pure.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qtt_core.errors import LedgerError
from qtt_core.ledger.events import Open, from_fields, is_pseudo
from qtt_core.plan import OpenStep
from qtt_core.steps import Config
from qtt_operator.names import (
    ATTEMPT_LABEL,
    DECISION_ANNOTATION,
    OPEN_ANNOTATION,
    SEQUENCE_ANNOTATION,
    TRAINER,
)

log = logging.getLogger(__name__)

Object = Mapping[str, Any]


def decision_of(job: Object) -> str:
    """The hash of the decision a Job was made for, empty where it carries none."""
    notes = job["metadata"].get("annotations") or {}
    return str(notes.get(DECISION_ANNOTATION, "")) if OPEN_ANNOTATION in notes else ""


def opening_of(job: Object) -> OpenStep | None:
    """The decision as it was once recorded, read from a whole Job; None if it cannot be used."""
    notes, labels = job["metadata"]["annotations"], job["metadata"]["labels"]
    try:
        event = from_fields(notes[SEQUENCE_ANNOTATION], json.loads(notes[OPEN_ANNOTATION]))
        config = None if isinstance(event, Open) and is_pseudo(event.c) else _config(job)
        if not isinstance(event, Open) or event.h != notes[DECISION_ANNOTATION]:
            raise LedgerError("it is another one")
        return OpenStep(event=replace(event, a=int(labels[ATTEMPT_LABEL])), config=config)
    except (KeyError, StopIteration, ValueError, TypeError, LedgerError) as error:
        log.warning("%s: its decision cannot be read: %s", job["metadata"]["name"], error)
        return None


def _config(job: Object) -> Config:
    containers = job["spec"]["template"]["spec"]["containers"]
    trainer = next(c for c in containers if c["name"] == TRAINER)
    document = next(v["value"] for v in trainer["env"] if v["name"] == "QTT_STEP")
    config: Config = json.loads(document)["config"]
    return config

"""What the ledger records: one frozen type per event, and their flat wire form.

A run is an append-only stream (30-kubernetes 3.2). On the wire an event is a flat mapping of
strings with its kind under `k`; its identity and time are the stream id
(`<milliseconds>-<sequence>`), which the store assigns. This module parses and writes; it never
talks to a store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

from qtt_core.errors import LedgerError, NewerSchemaError
from qtt_core.results import State
from qtt_core.steps import canonical_json, step_key

SCHEMA = 1
"""Version of the stream; recorded in every `run` event, refused when newer."""

PREPARE, WEIGHTS = "prepare", "weights"
"""Names of the pseudo-configurations (a third family is `eval-<digest>`)."""

EVALUATION_PREFIX = "eval-"
EVALUATION = "evaluation"
"""`what` of the note that ends an evaluation."""


def is_pseudo(c: str) -> bool:
    """Whether `c` names work that is no configuration: `prepare`, `weights`, `eval-<digest>`."""
    return not c.isdecimal()


def is_evaluation(c: str) -> bool:
    """Whether `c` is an evaluation; these may be opened on a closed run."""
    return c.startswith(EVALUATION_PREFIX)


def is_charged(c: str) -> bool:
    """Whether device time of `c` counts against the budget: configurations and `prepare` do."""
    return not is_pseudo(c) or c == PREPARE


def done_key(c: str, to: int) -> str:
    """The deduplication key of a step: `c12-f3`, `prepare-f1`."""
    return step_key(c if is_pseudo(c) else int(c), to)


def step_targets(frm: int, to: int, step: int) -> tuple[int, ...]:
    """Absolute target epochs of the ⌈(to - from)/Δ⌉ steps of a job; the last one may be shorter."""
    return (*range(frm + step, to, step), to)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Common to all events: `id` is the stream id ("" until written), `ep` the writer's epoch."""

    kind: ClassVar[str] = ""
    id: str = ""
    ep: int = 0

    @property
    def time(self) -> float:
        """Seconds since 1970, from the stream id."""
        return int(self.id.split("-")[0]) / 1000 if self.id else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Event):
    """The first event: what this run is. `spec` is the normalised manifest spec as JSON.

    `files`: field -> digest of the file that it names (`spec.search.hubRef`). `prior`: name and
    digest of the prior (`catalogue.PriorRef`), empty where the search starts cold.
    """

    kind: ClassVar[str] = "run"
    name: str
    spec_hash: str
    seed: int
    algorithm: str
    version: str
    space_hash: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    prior: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Event):
    """The data set was read: ends the pseudo-configuration `prepare`."""

    kind: ClassVar[str] = "prepared"
    c: str = PREPARE
    to: int = 1
    a: int = 0
    fingerprint: str
    n_train: int
    n_val: int
    classes: int
    metafeatures: Mapping[str, float] = field(default_factory=dict)
    excluded: Mapping[str, int] = field(default_factory=dict)
    missing_weights: tuple[str, ...] = ()
    digest: str = ""
    warnings: tuple[str, ...] = ()
    dev: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFetched(Event):
    """A claim was filled with weights: ends the pseudo-configuration `weights`."""

    kind: ClassVar[str] = "weights"
    c: str = WEIGHTS
    to: int = 1
    a: int = 0
    claim: str
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Event):
    """A decision, recorded before anything runs.

    `c` is a config id as text, or a pseudo-configuration; `h` the decision hash; `res` reserved
    device-seconds.
    """

    kind: ClassVar[str] = "open"
    c: str
    frm: int
    to: int
    h: str
    res: float
    a: int = 0
    why: Mapping[str, Any] = field(default_factory=dict)
    ver: str = ""
    tpl: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Event):
    """A step ended with a result. `epochs`: (absolute epoch, score in [0, 1], seconds).

    `to` is the open decision's, also when a diverged step stopped before it.
    """

    kind: ClassVar[str] = "done"
    c: str
    to: int
    a: int
    state: str
    epochs: tuple[tuple[int, float, float], ...]
    dev: float
    ov: float = 0.0
    q: float = 0.0
    mem: int = 0
    gpu: str = ""
    inert: tuple[str, ...] = ()
    eb: int = 0
    ck: str = ""
    bytes: int = 0
    msg: str = ""

    @property
    def last_epoch(self) -> int | None:
        """The newest epoch with a score; None when the first one failed."""
        return self.epochs[-1][0] if self.epochs else None

    def steps(self, frm: int, step: int) -> int:
        """Steps of Δ = `step` epochs this result consumed, from the decision's `frm`.

        A diverged one consumed every step up to and with the failed epoch, at least one.
        """
        last = self.to
        if self.state == State.DIVERGED:
            last = min(self.to, max(frm, self.last_epoch or 0) + 1)
        return len(step_targets(frm, last, step))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail(Event):
    """A fact about the configuration that is no score: `oom` or `infeasible`."""

    kind: ClassVar[str] = "fail"
    c: str
    to: int
    a: int
    state: str
    dev: float
    ov: float = 0.0
    q: float = 0.0
    mem: int = 0
    gpu: str = ""
    msg: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry(Event):
    """Attempt `a - 1` ended without a result; `a` is the attempt that follows. Never told."""

    kind: ClassVar[str] = "retry"
    c: str
    to: int
    a: int
    reason: str
    dev: float
    ov: float = 0.0
    q: float = 0.0
    node: str = ""
    msg: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Event):
    """The open entry ends untold; `retire` = the configuration is never proposed again."""

    kind: ClassVar[str] = "cancel"
    c: str
    to: int
    a: int
    reason: str
    retire: bool = False
    dev: float = 0.0
    ov: float = 0.0
    q: float = 0.0
    msg: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Event):
    """Something that is no step: a budget edit, an annotation token, an evaluation.

    `what` = "evaluation" ends attempt `a` of the pseudo-configuration `c` (`eval-<digest>`); its
    result is JSON in `new`. Other notes leave `c` empty.
    """

    kind: ClassVar[str] = "note"
    what: str
    old: str = ""
    new: str = ""
    c: str = ""
    to: int = 1
    a: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Close(Event):
    """The run ended; `reason` is one of the reasons of the conditions Complete and Failed.

    `budget`: the limits it had then, by their names in the manifest.
    """

    kind: ClassVar[str] = "close"
    reason: str
    msg: str = ""
    budget: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reopen(Event):
    """A closed run goes on (a budget was raised, a failed run is tried again)."""

    kind: ClassVar[str] = "reopen"
    reason: str


KINDS: Mapping[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        Run, Prepared, WeightsFetched, Open, Done, Fail, Retry, Cancel, Note, Close, Reopen,
    )
}  # fmt: skip

_WIRE = {"frm": "from"}  # a Python keyword on the wire
_JSON_TYPES = ("Mapping", "tuple")


def to_fields(event: Event) -> dict[str, str]:
    """Flat strings for the store; the id is the store's.

    Values equal to their default are left out: a default is part of the schema and never changes.
    The schema number itself is always written.
    """
    wire = {"k": event.kind}
    for spec in fields(event):
        value = getattr(event, spec.name)
        if spec.name == "id" or (_is_default(spec, value) and spec.name != "schema"):
            continue
        name = _WIRE.get(spec.name, spec.name)
        kind = str(spec.type)
        if kind.startswith(_JSON_TYPES):
            wire[name] = canonical_json(value)
        elif kind == "bool":
            wire[name] = "1" if value else "0"
        else:
            wire[name] = repr(float(value)) if kind == "float" else str(value)
    return wire


def from_fields(stream_id: str, wire: Mapping[str, str]) -> Event:
    """The inverse of `to_fields`.

    Raises: NewerSchemaError for an unknown kind or a newer `run`; LedgerError for a malformed one.
    """
    kind = wire.get("k", "")
    cls = KINDS.get(kind)
    if cls is None:
        raise NewerSchemaError(
            f"event {stream_id}: unknown kind {kind!r}; upgrade to read this ledger"
        )
    values: dict[str, Any] = {"id": stream_id}
    try:
        for spec in fields(cls):
            name = _WIRE.get(spec.name, spec.name)
            if spec.name != "id" and name in wire:
                values[spec.name] = _read(str(spec.type), wire[name])
        event = cls(**values)
    except (TypeError, ValueError) as error:
        raise LedgerError(f"event {stream_id} ({kind}) is malformed: {error}") from error
    if isinstance(event, Run) and event.schema > SCHEMA:
        raise NewerSchemaError(f"ledger schema {event.schema} is newer than {SCHEMA}; upgrade")
    return event


def _is_default(spec: Field[Any], value: object) -> bool:
    if spec.default_factory is not MISSING:
        return bool(value == spec.default_factory())
    return spec.default is not MISSING and bool(value == spec.default)


def _read(kind: str, text: str) -> object:
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text)
    if kind == "bool":
        return text == "1"
    if kind.startswith("tuple"):
        return tuple(tuple(item) if isinstance(item, list) else item for item in json.loads(text))
    return json.loads(text) if kind.startswith("Mapping") else text

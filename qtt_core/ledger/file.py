"""A run's ledger as a file: JSON lines, a header, then one event a line (`qtt ledger export`).

The header has schema, name, configurations, the number of events, and hub and space where the
manifest refers to them: with the file nothing else is needed to learn from the run. The same
ledger is the same bytes, wherever it was read from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtt_core.errors import Fault, LedgerError, NewerSchemaError, SpecError
from qtt_core.ledger.events import SCHEMA, Event, from_fields, to_fields
from qtt_core.ledger.fold import position
from qtt_core.steps import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """A run's whole ledger; `hub` and `space` as JSON where the manifest refers to them."""

    name: str
    uid: str
    configs: Mapping[str, Config]
    events: Sequence[Event]
    hub: Mapping[str, Any] | None = None
    space: str = ""

    def lines(self) -> list[str]:
        """JSON lines, header first."""
        header = {
            "k": "header", "schema": SCHEMA, "uid": self.uid, "name": self.name,
            "events": len(self.events),
            "configs": {
                c: dict(sorted(self.configs[c].items())) for c in sorted(self.configs, key=_number)
            },
            "hub": None if self.hub is None else dict(self.hub), "space": self.space,
        }  # fmt: skip
        told = ({"id": event.id, **to_fields(event)} for event in self.events)
        return [json.dumps(line, allow_nan=False) for line in (header, *told)]


def _number(c: str) -> tuple[int, str]:
    """Configurations in order of their numbers: a store hands them out in any order."""
    return (int(c) if c.isdecimal() else -1, c)


def parse_ledger(lines: Iterable[str], where: str) -> Ledger:
    """The inverse of `Ledger.lines`.

    Raises: SpecError naming the line, also for a file of fewer or more events than its header says;
    NewerSchemaError.
    """
    header: dict[str, Any] | None = None
    events: list[Event] = []
    for number, text in enumerate(lines, start=1):
        try:
            raw = json.loads(text)
            if header is None:
                header = _header(raw)
            else:
                events.append(_event(raw, events))
        except (ValueError, KeyError, AttributeError, TypeError, LedgerError) as error:
            if isinstance(error, NewerSchemaError):
                raise
            remedy = f"is no line of `qtt ledger export`: {error}"
            raise SpecError([Fault(f"{where}:{number}", text[:80], remedy)]) from error
    if header is None:
        raise SpecError([Fault(where, "empty", "is no file of `qtt ledger export`")])
    if len(events) != header["events"]:
        remedy = f"its header says {header['events']}: the file was cut; export it again"
        raise SpecError([Fault(where, f"{len(events)} events", remedy)])
    return Ledger(
        name=str(header["name"]), uid=str(header["uid"]), configs=header["configs"],
        events=events, hub=header.get("hub"), space=str(header.get("space") or ""),
    )  # fmt: skip


def _header(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw.get("k") != "header":
        raise ValueError("the first line is no header")
    schema = int(raw["schema"])
    if schema > SCHEMA:
        raise NewerSchemaError(f"ledger schema {schema} is newer than {SCHEMA}; upgrade")
    if schema != SCHEMA:
        raise ValueError(f"schema {schema} is unknown, this version reads {SCHEMA}")
    configs = {str(c): dict(config) for c, config in raw["configs"].items()}
    return {**raw, "configs": configs, "events": int(raw["events"])}


def _event(raw: dict[str, Any], before: Sequence[Event]) -> Event:
    event = from_fields(str(raw.pop("id")), raw)
    last = before[-1].id if before else "0-0"
    if position(event.id) <= position(last):
        raise ValueError(f"event {event.id} comes after {last}")
    return event


def read_ledger(path: Path) -> Ledger:
    """A ledger file. Raises: OSError; as `parse_ledger`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        remedy = f"is no file of `qtt ledger export`: {error}"
        raise SpecError([Fault(str(path), "no text", remedy)]) from error
    return parse_ledger(text.splitlines(), str(path))

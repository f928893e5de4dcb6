"""Fields described as data: kind, bounds, default, meaning. Read by parser, CRD and documentation.

A `Field` says what a value may be and what it is for, once. `read_section` turns a mapping into
checked values; `fill` puts the defaults in as an API server does. Nothing here knows a manifest.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qtt_core.errors import ABSENT
from qtt_core.fields import Fields

INT32, INT64 = 2**31 - 1, 2**63 - 1


class Kind(enum.Enum):
    """What a value is. ANY is kept as it comes."""

    BOOLEAN = enum.auto()
    INTEGER = enum.auto()
    TEXT = enum.auto()
    DECIMAL = enum.auto()
    """A number in a quoted string."""
    DURATION = enum.auto()
    """Go's form, such as 4h30m."""
    QUANTITY = enum.auto()
    """Kubernetes' form, such as 200Gi."""
    TIME = enum.auto()
    INT_OR_TEXT = enum.auto()
    LIST = enum.auto()
    MAP = enum.auto()
    SECTION = enum.auto()
    ANY = enum.auto()


class Reach(enum.Enum):
    """Where a field acts."""

    EVERYWHERE = ""
    CLUSTER = "○"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field. `low` and `high` bound a number, the length of a text, the size of a list or map.

    `fixed`: may not change once a run has started; a fixed section fixes all that is in it.
    """

    kind: Kind
    about: str
    default: Any = None
    """What the API server fills in; None: nothing."""
    required: bool = False
    fixed: bool = False
    reach: Reach = Reach.EVERYWHERE
    choices: tuple[str, ...] = ()
    low: int | None = None
    high: int | None = None
    pattern: str = ""
    """A text must match it whole."""
    forbidden: str = ""
    """A text must not contain a match of it."""
    hint: str = ""
    """The remedy where `pattern` or `forbidden` refuses."""
    unique: bool = False
    """No item of a list stands twice."""
    keys: tuple[str, ...] = ()
    """The fields that tell a list's items apart."""
    item: Field | None = None
    """Of each value of a list or map."""
    fields: Mapping[str, Field] = field(default_factory=dict)
    """Of a section."""


def boolean(about: str, **more: Any) -> Field:
    """True or false."""
    return Field(kind=Kind.BOOLEAN, about=about, **more)


def integer(about: str, low: int, high: int, **more: Any) -> Field:
    """An integer within [low, high]."""
    return Field(kind=Kind.INTEGER, about=about, low=low, high=high, **more)


def text(about: str, high: int = 253, *, low: int = 1, **more: Any) -> Field:
    """A string of `low` to `high` characters."""
    return Field(kind=Kind.TEXT, about=about, low=low, high=high, **more)


def choice(about: str, *choices: str, **more: Any) -> Field:
    """One of some words."""
    return Field(kind=Kind.TEXT, about=about, choices=choices, **more)


def decimal(about: str, **more: Any) -> Field:
    """A quoted decimal."""
    return Field(kind=Kind.DECIMAL, about=about, **more)


def duration(about: str, **more: Any) -> Field:
    """A positive Go duration."""
    return Field(kind=Kind.DURATION, about=about, **more)


def sequence(about: str, item: Field, high: int, **more: Any) -> Field:
    """A list of at most `high` items."""
    return Field(kind=Kind.LIST, about=about, item=item, high=high, **more)


def mapping(about: str, item: Field, high: int = 64, **more: Any) -> Field:
    """Names of the user's own, at most `high`."""
    return Field(kind=Kind.MAP, about=about, item=item, high=high, **more)


def section(about: str, fields: Mapping[str, Field], **more: Any) -> Field:
    """A mapping of known fields. Its `default` is what stands there when it is left out."""
    return Field(kind=Kind.SECTION, about=about, fields=fields, **more)


def walk(whole: Field, path: str) -> Iterator[tuple[str, Field]]:
    """Every field below a section with its dotted path, in order, sections before their fields."""
    for name, part in whole.fields.items():
        yield f"{path}.{name}", part
        yield from walk(part, f"{path}.{name}")


# --- defaults ------------------------------------------------------------------------------------


def fill(whole: Field, given: Mapping[str, Any]) -> dict[str, Any]:
    """A section as an API server stores it: nulls dropped, defaults filled in.

    Null means absent everywhere but inside what is kept as it comes (`Kind.ANY`); it makes no
    unknown field known.
    """
    values = {
        name: _without_nulls(value, whole.fields.get(name))
        for name, value in given.items()
        if value is not None or name not in whole.fields  # an unknown field is one even as null
    }
    for name, part in whole.fields.items():
        if part.default is not None:
            values.setdefault(name, part.default)
        if part.fields and isinstance(values.get(name), Mapping):
            values[name] = fill(part, values[name])
    return values


def _without_nulls(value: object, part: Field | None) -> Any:
    if isinstance(value, Mapping) and not (part and part.kind in {Kind.ANY, Kind.SECTION}):
        return {key: _without_nulls(v, None) for key, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item, None) for item in value]
    return value


# --- reading -------------------------------------------------------------------------------------


def read_section(fields: Fields, whole: Field) -> dict[str, Any]:
    """Checked values of a section: field name -> value, None where it is absent.

    Decimals are floats, durations seconds, lists tuples, a section inside is None or such a dict.
    Faults, unknown fields among them, are noted in `fields`; a faulty value gives way to the
    default.
    """
    values = {name: _read(fields, name, part) for name, part in whole.fields.items()}
    fields.refuse_unknown()
    return values


def _read(fields: Fields, name: str, part: Field) -> Any:
    if not fields.has(name):
        fields.raw(name)
        if part.required:
            fields.fault(name, ABSENT, "is required")
        return None
    reader = _READERS.get(part.kind)
    return reader(fields, name, part) if reader else fields.raw(name)


def _read_integer(fields: Fields, name: str, part: Field) -> int:
    fallback = part.default if part.default is not None else part.low
    return fields.integer(name, fallback or 0, low=part.low, high=part.high)


def _read_text(fields: Fields, name: str, part: Field) -> str | None:
    value = fields.raw(name)
    fault = text_fault(value, part)
    if fault or not isinstance(value, str):
        fields.fault(name, value, fault)
        return part.default if isinstance(part.default, str) else None
    return value


def text_fault(value: object, part: Field) -> str:
    """The remedy of a value that is no such text, or nothing."""
    if not isinstance(value, str):
        return part.hint or "use a string (quote it)"
    if part.choices:
        return "" if value in part.choices else f"use one of {', '.join(part.choices)}"
    if part.high is not None and not (part.low or 0) <= len(value) <= part.high:
        return f"use {part.low} to {part.high} characters" if part.low else _at_most(part)
    if part.pattern and not re.fullmatch(part.pattern, value):
        return part.hint
    return part.hint if part.forbidden and re.search(part.forbidden, value) else ""


def _at_most(part: Field) -> str:
    return f"use at most {part.high} characters"


QUANTITY = r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+(\.[0-9]*)?)?"
"""An amount as Kubernetes writes it."""


def _read_quantity(fields: Fields, name: str, part: Field) -> object:
    value = fields.raw(name)
    is_text = isinstance(value, str) and re.fullmatch(QUANTITY, value)
    if not is_text and (isinstance(value, bool) or not isinstance(value, int)):
        fields.fault(name, value, "use a quantity such as 200Gi")
    return value


def _read_list(fields: Fields, name: str, part: Field) -> tuple[Any, ...]:
    assert part.item is not None
    assert part.high is not None
    items: list[Any] = []
    given = fields.items(name, longest=part.high)
    if part.low and isinstance(fields.raw(name), list) and not fields.raw(name):
        fields.fault(name, [], "name at least one")
    for i, raw in enumerate(given):
        noted = len(fields.faults)
        value = _read(_one(fields, f"{name}[{i}]", raw), f"{name}[{i}]", part.item)
        if raw is None:
            fields.fault(f"{name}[{i}]", raw, "is empty; leave it out")
        elif part.unique and value in items:
            fields.fault(f"{name}[{i}]", raw, "stands twice; name each once")
        elif len(fields.faults) == noted:
            items.append(value)
    return tuple(items)


def _read_map(fields: Fields, name: str, part: Field) -> dict[str, Any]:
    assert part.item is not None
    assert part.high is not None
    values: dict[str, Any] = {}
    for key, raw in fields.mapping(name, longest=part.high).items():
        inner = Fields({key: raw}, fields.at(name), fields.faults)
        noted = len(fields.faults)
        if part.item.kind is Kind.TEXT and isinstance(raw, bool | int | float):
            shown = str(raw).lower() if isinstance(raw, bool) else raw
            inner.fault(key, raw, f'quote the value: "{shown}"')
        value = _read(inner, key, part.item) if len(fields.faults) == noted else None
        if len(fields.faults) == noted and value is not None:
            values[key] = value
    return values


def _one(fields: Fields, name: str, value: object) -> Fields:
    """A value that has no name of its own, as a field."""
    return Fields({name: value}, fields.path, fields.faults)


_READERS: Mapping[Kind, Callable[[Fields, str, Field], Any]] = {
    Kind.BOOLEAN: lambda fields, name, part: fields.boolean(name, bool(part.default)),
    Kind.INTEGER: _read_integer,
    Kind.TEXT: _read_text,
    Kind.DECIMAL: lambda fields, name, part: fields.decimal(name),
    Kind.DURATION: lambda fields, name, part: fields.duration(name),
    Kind.QUANTITY: _read_quantity,
    Kind.LIST: _read_list,
    Kind.MAP: _read_map,
    Kind.SECTION: lambda fields, name, part: read_section(fields.child(name), part),
}
"""The other kinds are judged by whoever uses them."""

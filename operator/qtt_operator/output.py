"""Prints rows as a table, JSON, YAML or CSV: one place for every verb's `-o`.

Tables are for people and leave things out; the other three carry every field under stable names.
Returns text; writing it is the command line's matter.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = ("table", "json", "yaml", "csv")

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table: its title, and how a record becomes its cell."""

    title: str
    cell: Callable[[Record], str]
    right: bool = False
    style: str = ""
    flexible: bool = False
    """May be cut when the terminal is narrow; the others never are."""


def render(
    records: Sequence[Record],
    form: str,
    columns: Sequence[Column] = (),
    *,
    title: str = "",
    width: int | None = None,
    colour: bool = False,
    empty: str = "nothing yet",
) -> str:
    """Records in one of `FORMATS`. `width`: of the terminal; None = as wide as it needs."""
    if form == "json":
        return json.dumps([dict(record) for record in records], indent=2, allow_nan=False) + "\n"
    if form == "yaml":
        import yaml

        plain = json.loads(json.dumps([dict(record) for record in records], allow_nan=False))
        return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    if form == "csv":
        return _csv(records)
    return _table(records, columns, title=title, width=width, colour=colour, empty=empty)


def render_one(record: Record, form: str) -> str:
    """A single object: JSON and YAML without a list around it, CSV as field,value lines."""
    if form == "json":
        return json.dumps(dict(record), indent=2, allow_nan=False) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("field", "value"))
        writer.writerows((name, _flat(value)) for name, value in record.items())
        return out.getvalue()
    import yaml

    plain = json.loads(json.dumps(dict(record), allow_nan=False))
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _csv(records: Sequence[Record]) -> str:
    """One line a record; nested values as JSON; hyperparameters also as columns of their own."""
    flat = [_spread(record) for record in records]
    names = list(dict.fromkeys(name for record in flat for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _spread(record: Record) -> dict[str, object]:
    spread: dict[str, object] = {}
    for name, value in record.items():
        if name == "hyperparameters" and isinstance(value, Mapping):
            spread |= {f"hp.{key}": _flat(item) for key, item in value.items()}
        else:
            spread[name] = _flat(value)
    return spread


def _flat(value: object) -> object:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, allow_nan=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else value


FLEXIBLE_WIDTH, GAP = 8, 3


def _widths(columns: Sequence[Column], records: Sequence[Record]) -> list[int]:
    """Characters that each column needs to show every cell whole."""
    return [
        max(len(column.title), *(len(column.cell(record)) for record in records))
        for column in columns
    ]


def _fitting(
    columns: Sequence[Column], records: Sequence[Record], width: int | None
) -> Sequence[Column]:
    """The columns a terminal has room for, from the left: a missing one beats a cut number."""
    kept = list(columns)
    while width is not None and len(kept) > 1:
        needed = [
            min(size, FLEXIBLE_WIDTH) if column.flexible else size
            for column, size in zip(kept, _widths(kept, records), strict=True)
        ]
        if sum(needed) + GAP * len(kept) <= width:
            break
        kept.pop()
    return kept


def _table(
    records: Sequence[Record],
    columns: Sequence[Column],
    *,
    title: str,
    width: int | None,
    colour: bool,
    empty: str,
) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not records:
        return f"{empty}\n"
    columns = _fitting(columns, records, width)
    cells = [[column.cell(record) for column in columns] for record in records]
    natural = _widths(columns, records)
    headed = any(column.title for column in columns)
    table = Table(
        box=SIMPLE_HEAD if headed else None,
        show_header=headed,
        title=title or None,
        title_justify="left",
        pad_edge=False,
    )
    for column, needed in zip(columns, natural, strict=True):
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            style=column.style or None,
            no_wrap=True,
            overflow="ellipsis",
            ratio=None,
            min_width=min(needed, FLEXIBLE_WIDTH) if column.flexible else needed,
        )
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    out = io.StringIO()
    # not a terminal: as wide as the widest line, never cut (it may go through grep)
    room = width or sum(natural) + GAP * len(columns)
    console = Console(
        file=out, width=max(room, 40), force_terminal=colour, no_color=not colour, highlight=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"

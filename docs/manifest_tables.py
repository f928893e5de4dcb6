"""Writes the tables of docs/manifest.md from `qtt_core.spec_schema`; run by `make crds`.

A table stands between `<!-- fields of SECTION… -->` and `<!-- end -->`; all else is kept.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from qtt_core.schema import INT32, Field, Kind, Reach, walk
from qtt_core.spec_schema import SPEC
from qtt_core.steps import METRICS

PAGE = Path(__file__).with_name("manifest.md")
BLOCK = re.compile(r"(<!-- fields of (?P<sections>[^>]*) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = "| Field | Value | Default | Fixed | Meaning |\n|---|---|---|---|---|\n"

FIELDS = dict(walk(SPEC, "spec"))
NAMES = {
    *METRICS,
    *(path.removeprefix("spec.") for path in FIELDS),
    *(path.rpartition(".")[2] for path in FIELDS),
    *(choice for part in FIELDS.values() for choice in part.choices),
}
VALUES = {
    Kind.BOOLEAN: "boolean",
    Kind.DECIMAL: "decimal",
    Kind.DURATION: "duration",
    Kind.QUANTITY: "quantity",
    Kind.INT_OR_TEXT: "≥ 1 or `Auto`",
    Kind.SECTION: "section",
    Kind.ANY: "a pod's spec",
}


def page(text: str) -> str:
    """The page with its tables made anew."""
    return BLOCK.sub(lambda m: m[1] + _table(m["sections"].split()) + m[3], text)


def _table(sections: list[str]) -> str:
    """The fields of some sections; of `spec` itself the first level only."""
    rows = []
    for path, part in FIELDS.items():
        parent, _, _ = path.rpartition(".")
        if parent in sections or (sections != ["spec"] and path.startswith(_below(sections))):
            rows.append(_row(path, part))
    return HEAD + "".join(rows)


def _below(sections: list[str]) -> tuple[str, ...]:
    return tuple(f"{section}." for section in sections)


def _row(path: str, part: Field) -> str:
    reach = _reach(path)
    name = f"`{path.removeprefix('spec.')}`" + (f" {reach.value}" if reach.value else "")
    fixed = "yes" if any(FIELDS[owner].fixed for owner in _owners(path)) else ""
    about = _marked(part.about.rstrip(".").replace("|", "\\|"))
    cells = (name, _value(part), _default(path, part), fixed, about)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n"


def _marked(text: str) -> str:
    """Names of fields, choices and metrics in the type of code; plain words stay as they are."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"\w+(\.\w+)*", _code, part) for part in parts[::2]]
    return "`".join(parts)


def _code(match: re.Match[str]) -> str:
    word = match[0]
    is_plain = word.isalpha() and word[1:].islower()
    return word if is_plain or word not in NAMES else f"`{word}`"


def _owners(path: str) -> list[str]:
    """The field and the sections that it lies in."""
    names = path.split(".")
    return [".".join(names[:i]) for i in range(2, len(names) + 1)]


def _reach(path: str) -> Reach:
    marked = [FIELDS[owner].reach for owner in _owners(path)]
    return next((reach for reach in marked if reach is not Reach.EVERYWHERE), Reach.EVERYWHERE)


def _value(part: Field) -> str:
    if part.choices:
        return ", ".join(f"`{choice}`" for choice in part.choices)
    if part.kind is Kind.INTEGER:
        assert part.high is not None
        return f"≥ {part.low}" if part.high >= INT32 else f"{part.low} … {part.high}"
    if part.kind is Kind.TEXT:
        return "relative path" if part.forbidden and "path" in part.hint[:20] else "text"
    if part.item is not None:
        inner = "text" if part.item.kind is Kind.TEXT else _value(part.item)
        return f"list of {inner}" if part.kind is Kind.LIST else f"name: {inner}"
    return VALUES[part.kind]


def _default(path: str, part: Field) -> str:
    """The default; of a field that is needed in its section: what stands where that is absent."""
    section, _, name = path.rpartition(".")
    whole = FIELDS[section].default if section in FIELDS else None
    default = part.default if part.default is not None else (whole or {}).get(name)
    if default is None or part.kind is Kind.SECTION:
        return "required" if part.required else ""
    plain = isinstance(default, str) and default.isidentifier()
    return f"`{default if plain else json.dumps(default)}`"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

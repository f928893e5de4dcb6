"""Reads a manifest file as YAML: every mistake a Fault with line and column, never a traceback.

Plain safe YAML with three differences from PyYAML's own loader, all towards what `kubectl` does:
a key that stands twice is a fault, `1e-3` is a number, dates and `4:30` stay text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node

from qtt_core.errors import Fault, SpecError
from qtt_core.fields import raise_faults
from qtt_core.spec import KIND

LARGEST_BYTES = 1 << 20
LARGEST_VALUES = 100_000
"""More values than this come from aliases of aliases, not from a person."""

_INT = r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)"
_FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_MERGE_TAG = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe loader that notes keys that stand twice; `where` names the file."""

    def __init__(self, text: str, where: str, faults: list[Fault]) -> None:
        super().__init__(text)
        self.where = where
        self.faults = faults

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class, after a look for double keys."""
        if isinstance(node, MappingNode):
            self._note_double_keys(node)
        return super().construct_mapping(node, deep=deep)

    def _note_double_keys(self, node: MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key.value, str) or key.tag == _MERGE_TAG:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                place = _place(self.where, key)
                first = f"stands twice, first in line {lines[key.value]}; keep one"
                fault = Fault(place, key.value, first)
                if fault not in self.faults:
                    self.faults.append(fault)
            lines.setdefault(key.value, line)


_OWN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_TAGS]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (("int", _INT), ("float", _FLOAT)):  # the first that matches wins
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list("-+.0123456789")
    )


def read_manifest(path: Path) -> object:
    """The one document of a manifest file, as Python values.

    Raises: SpecError for a file that cannot be read, broken YAML (with line and column), keys that
    stand twice, more or fewer than one document.
    """
    document, faults = scan_manifest(path)
    raise_faults(faults)
    return document


def scan_manifest(path: Path) -> tuple[object, list[Fault]]:
    """As `read_manifest`, but keys that stand twice are returned: the rest can still be checked."""
    return scan_text(_text(path), str(path))


def scan_text(text: str, where: str) -> tuple[object, list[Fault]]:
    """The one TuningRun of a YAML text and its double keys; `where` names the text in faults.

    Raises: SpecError if there is no such document.
    """
    faults: list[Fault] = []
    try:
        documents = [item for item in _documents(text, where, faults) if item is not None]
    except yaml.MarkedYAMLError as error:
        raise SpecError([*faults, _syntax(error, where)]) from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise SpecError([*faults, Fault(where, _first_line(error), "is no YAML")]) from error
    if len(documents) > 1:  # beside a run, what `kubectl apply` makes with it: claims, a Job
        documents = [item for item in documents if _is_run(item)] or documents
    if len(documents) != 1:
        found = f"{len(documents)} documents" if documents else "an empty file"
        raise SpecError([*faults, Fault(where, found, "put exactly one TuningRun into a file")])
    if _is_endless(documents[0]):
        problem = f"expand to over {LARGEST_VALUES} values; write them out"
        raise SpecError([*faults, Fault(where, "aliases", problem)])
    return documents[0], faults


def _is_run(document: object) -> bool:
    return isinstance(document, dict) and document.get("kind") == KIND


def _documents(text: str, where: str, faults: list[Fault]) -> list[object]:
    loader = _Loader(text, where, faults)
    try:
        documents = []
        while loader.check_data():  # type: ignore[no-untyped-call]  # PyYAML's stubs lack it
            documents.append(loader.get_data())
        return documents
    finally:
        loader.dispose()


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise SpecError([Fault(str(path), f"{path.stat().st_size} bytes", "is no manifest")])
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise SpecError([Fault(str(path), "no such file", "name a manifest")]) from error
    except OSError as error:
        raise SpecError([Fault(str(path), error.strerror, "cannot be read")]) from error
    except UnicodeDecodeError as error:
        raise SpecError([Fault(str(path), f"byte {error.start}", "save it as UTF-8")]) from error


def _syntax(error: yaml.MarkedYAMLError, where: str) -> Fault:
    mark = error.problem_mark or error.context_mark
    place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
    problem = error.problem or error.context or "broken YAML"
    if "\\t" in problem or (mark and _at(mark) == "\t"):
        return Fault(place, "a tab", "YAML is indented with spaces")
    context = f" {error.context}" if error.context else ""
    return Fault(place, problem, f"fix the YAML here{f' ({context.strip()})' if context else ''}")


def _at(mark: yaml.Mark) -> str:
    """The character a mark points at."""
    buffer = getattr(mark, "buffer", None) or ""
    return buffer[mark.pointer : mark.pointer + 1]


def _place(where: str, node: Node) -> str:
    return f"{where}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_endless(value: object) -> bool:
    """Whether aliases make a small file large: the values are counted as often as they are used."""
    waiting, count = [value], 0
    while waiting:
        count += 1
        if count > LARGEST_VALUES:
            return True
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set):
            waiting.extend(item)
    return False

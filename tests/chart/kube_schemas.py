"""Strict JSON schemas of Kubernetes' objects, from the OpenAPI document of its Go module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUMBER_OR_STRING = {"type": ["string", "integer", "number"]}


def write_schemas(swagger: Path, folder: Path) -> None:
    """One file `KIND-GROUP-VERSION.json` for each kind, complete, as kubeconform looks for it."""
    definitions: dict[str, Any] = json.loads(swagger.read_text())["definitions"]
    for name, definition in definitions.items():
        for kind in definition.get("x-kubernetes-group-version-kind", ()):
            if name.rpartition(".")[2] != kind["kind"]:
                continue  # List, DeleteOptions and their like stand for every group
            used = {n: _strict(definitions[n]) for n in _reached(name, definitions)}
            group = kind["group"].partition(".")[0]
            stem = "-".join(part for part in (kind["kind"].lower(), group, kind["version"]) if part)
            schema = {"$ref": f"#/definitions/{name}", "definitions": used}
            (folder / f"{stem}.json").write_text(json.dumps(schema))


def _reached(name: str, definitions: dict[str, Any]) -> set[str]:
    """A definition and all that it refers to."""
    found, waiting = {name}, [name]
    while waiting:
        fresh = set(_references(definitions[waiting.pop()])) - found
        found |= fresh
        waiting += fresh
    return found


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].rpartition("/")[2]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _strict(definition: dict[str, Any]) -> dict[str, Any]:
    """A field that is not described is an error; a quantity may be a number."""
    if definition.get("format") == "int-or-string" or "Quantity is a" in str(
        definition.get("description")
    ):
        return NUMBER_OR_STRING
    if "properties" in definition:
        return {**definition, "additionalProperties": False}
    return definition

"""What the two images install beside us, as a CycloneDX document, out of installed metadata.

Name, version, licence and dependencies of every distribution that the extras `operator`, `trainer`
and `local` reach. The packages of the base images are not listed: they are the builder's choice.
The library that writes such documents installs 44 MB; its validator accepted what this writes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qtt_core

NAME = "quicktune-operator"
EXTRAS = frozenset({"operator", "trainer", "local"})

Json = dict[str, Any]


def needed(found: Distribution, extras: Iterable[str]) -> dict[str, set[str]]:
    """What a distribution with some extras asks for here: name -> extras of it."""
    asked: dict[str, set[str]] = {}
    for text in found.requires or ():
        wish = Requirement(text)
        marker = wish.marker
        if marker is None or any(marker.evaluate({"extra": x}) for x in ("", *extras)):
            asked.setdefault(canonicalize_name(wish.name), set()).update(wish.extras)
    return asked


def closure() -> dict[str, set[str]]:
    """Every installed distribution that ours reaches -> the names of those it asks for."""
    extras: dict[str, set[str]] = {NAME: set(EXTRAS)}
    edges: dict[str, set[str]] = {}
    waiting = [NAME]
    while waiting:
        name = waiting.pop()
        try:
            asked = needed(distribution(name), extras[name])
        except PackageNotFoundError:  # another platform's, or the base's own
            continue
        edges[name] = {*asked}
        for other, wished in asked.items():
            known = extras.setdefault(other, set())
            if other not in edges or not wished <= known:
                known |= wished
                waiting.append(other)
    return {name: {other for other in found if other in edges} for name, found in edges.items()}


def licence(found: Distribution) -> list[Json]:
    """As the distribution says it: an expression, or a name."""
    expression = found.metadata.get("License-Expression")
    if expression:
        return [{"expression": expression}]
    classes = [
        text.rpartition(" :: ")[2]
        for text in found.metadata.get_all("Classifier") or ()
        if text.startswith("License :: ")
    ]
    said = (found.metadata.get("License") or "").strip().partition("\n")[0]
    return [{"license": {"name": name}} for name in classes or ([said] if said else [])]


def component(name: str) -> Json:
    """A distribution as CycloneDX describes a library, or the application that we are."""
    found = distribution(name)
    version = qtt_core.__version__ if name == NAME else found.version
    place = f"pkg:pypi/{name}@{version}"
    kind = "application" if name == NAME else "library"
    described: Json = {
        "type": kind, "bom-ref": place, "name": name, "version": version, "purl": place,
    }  # fmt: skip
    licences = licence(found)
    return {**described, "licenses": licences} if licences else described


def sbom_text(now: int) -> str:
    """The document; `now`: seconds since 1970. The same for the same environment and time."""
    edges = closure()
    parts = {name: component(name) for name in sorted(edges)}
    ours = parts.pop(NAME)
    refs = {name: ours["bom-ref"] if name == NAME else parts[name]["bom-ref"] for name in edges}
    identity = json.dumps([now, *sorted(refs.values())])
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, identity)}",
        "metadata": {
            "timestamp": datetime.fromtimestamp(now, UTC).isoformat().replace("+00:00", "Z"),
            "component": ours,
        },
        "components": list(parts.values()),
        "dependencies": [
            {"ref": refs[name], "dependsOn": sorted(refs[other] for other in edges[name])}
            for name in sorted(edges)
        ],
    }  # fmt: skip
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

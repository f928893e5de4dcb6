"""The TuningRun manifest: parsed, defaulted and checked in one place, for every consumer.

`parse_manifest` turns YAML's mapping into `TuningRun`; the rules are those of the CRD's schema and
CEL expressions (30-kubernetes 1.2, 1.3), so that `qtt lint`, a local run and an old API server
agree. The table of fields is `spec_schema`, types live in `spec_types`, rules in `spec_rules`;
import all public names from here. This module must import neither ConfigSpace, SciPy nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qtt_core import spec_rules
from qtt_core.errors import ABSENT, Fault
from qtt_core.fields import Fields, raise_faults
from qtt_core.schema import fill
from qtt_core.spec_fields import read_spec
from qtt_core.spec_schema import ALGORITHMS, SPEC
from qtt_core.spec_types import (
    Budget,
    Checkpoint,
    Dataset,
    FailurePolicy,
    Fidelity,
    ModelLimits,
    Objective,
    Optimizer,
    Reference,
    RunSpec,
    Search,
    Trainer,
    TuningRun,
    Weights,
)
from qtt_core.steps import digest

__all__ = [
    "ALGORITHMS",
    "API_VERSION",
    "KIND",
    "Budget",
    "Checkpoint",
    "Dataset",
    "FailurePolicy",
    "Fidelity",
    "ModelLimits",
    "Objective",
    "Optimizer",
    "Reference",
    "RunSpec",
    "Search",
    "Trainer",
    "TuningRun",
    "Weights",
    "changed_immutable_fields",
    "check_spec",
    "cluster_only_fields",
    "immutable_digest",
    "parse_manifest",
    "scan_manifest",
]

API_VERSION, KIND = "quicktune.dev/v1alpha1", "TuningRun"

_OBJECT_META = (
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
)
"""Fields of an object fetched from a server: accepted, not read."""


def parse_manifest(raw: object) -> TuningRun:
    """Read a TuningRun manifest.

    Raises: SpecError with *every* fault: field path, value, remedy. Unknown fields are faults.
    """
    run, faults = scan_manifest(raw)
    raise_faults(faults)
    assert run is not None  # None comes with a fault
    return run


def scan_manifest(raw: object) -> tuple[TuningRun | None, list[Fault]]:
    """A manifest's faults, and the run with defaults in their places: lint checks on with it.

    None where there is no spec at all.
    """
    if not isinstance(raw, Mapping):
        return None, [Fault("manifest", raw, f"use a mapping: a manifest of kind {KIND}")]
    faults: list[Fault] = []
    top = Fields(raw, "", faults)
    _check_kind(top)
    name, namespace, annotations = _metadata(top.child("metadata", required=True))
    given = top.raw("spec")
    top.raw("status")
    top.refuse_unknown()
    if not isinstance(given, Mapping):
        remedy = "is required" if given is None else "use a mapping of fields"
        return None, [*faults, Fault("spec", ABSENT if given is None else given, remedy)]
    raw_spec = fill(SPEC, given)
    spec = read_spec(Fields(raw_spec, "spec", faults))
    wrong = {fault.field for fault in faults}  # their values are defaults now: not judged again
    faults.extend(f for f in spec_rules.cross_rules(spec) if f.field not in wrong)
    faults = _without_echoes([*faults, *_not_json(raw_spec, "spec")])
    run = TuningRun(
        name=name,
        namespace=namespace,
        spec=spec,
        raw_spec=raw_spec,
        annotations=annotations,
        given=frozenset(_paths(raw, "")),
    )
    return run, faults


def check_spec(run: TuningRun) -> list[Fault]:
    """Advice that is no error (fields without effect for this algorithm, very long runs, …)."""
    return list(spec_rules.advice(run))


def cluster_only_fields(run: TuningRun) -> list[str]:
    """Paths of fields the manifest sets that act on a cluster only (for the note of `qtt run`)."""
    return spec_rules.cluster_only(run)


def immutable_digest(raw_spec: Mapping[str, Any]) -> str:
    """SHA-256 of the fields that may not change once a run has started."""
    return digest(spec_rules.immutable_part(raw_spec))


def changed_immutable_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Paths (`spec.search.hub`) of immutable fields that differ between two normalised specs.

    `spec.stop` is among them when a stop would be undone.
    """
    before, after = spec_rules.immutable_part(old), spec_rules.immutable_part(new)
    changed = list(spec_rules.differences(before, after, "spec"))
    if old.get("stop") and not new.get("stop"):
        changed.append("spec.stop")
    return changed


def _check_kind(top: Fields) -> None:
    for name, right in (("apiVersion", API_VERSION), ("kind", KIND)):
        value = top.raw(name)
        if value != right:
            top.fault(name, ABSENT if value is None else value, f"use {right}")


def _metadata(fields: Fields) -> tuple[str, str, dict[str, str]]:
    """Name, namespace, annotations; run names are short because Job names are built from them."""
    hint = "use at most 40 lower-case letters, digits and dashes; start with a letter (RFC 1035)"
    name = fields.text(
        "name", required=True, pattern=r"[a-z]([-a-z0-9]*[a-z0-9])?", longest=40, hint=hint
    )
    namespace = fields.text(
        "namespace",
        "default",
        pattern=r"[a-z0-9]([-a-z0-9]*[a-z0-9])?",
        longest=63,
        hint="use lower-case letters, digits and dashes",
    )
    texts: dict[str, dict[str, str]] = {}
    for kind in ("labels", "annotations"):
        values = fields.mapping(kind, longest=256)
        for key, value in values.items():
            if not isinstance(value, str):
                fields.fault(f"{kind}.{key}", value, "quote the value")
        texts[kind] = {key: value for key, value in values.items() if isinstance(value, str)}
    for other in _OBJECT_META:
        fields.raw(other)
    fields.refuse_unknown()
    return name, namespace, texts["annotations"]


def _without_echoes(faults: Sequence[Fault]) -> list[Fault]:
    """The faults without the further ones of a section that is missing or no mapping."""
    kept: list[Fault] = []
    broken: list[str] = []
    for fault in faults:
        if fault.field in broken or any(fault.field.startswith(f"{path}.") for path in broken):
            continue
        kept.append(fault)
        if fault.expected in {"is required", "use a mapping of fields"}:
            broken.append(fault.field)
    return kept


def _not_json(value: object, path: str) -> Iterator[Fault]:
    """What JSON cannot carry: YAML dates, sets, infinities, keys that are no text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                yield Fault(f"{path}.{key}", key, "quote the key")
            yield from _not_json(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _not_json(item, f"{path}[{i}]")
    elif isinstance(value, float) and not -float("inf") < value < float("inf"):
        yield Fault(path, value, "use a finite number")
    elif value is not None and not isinstance(value, str | int | float | bool):
        yield Fault(path, value, "quote the value")


def _paths(value: object, path: str) -> Iterator[str]:
    """Every dotted path of a manifest that holds something; lists and templates are leaves."""
    if path:
        yield path
    if isinstance(value, Mapping) and path != "spec.template":
        for key, item in value.items():
            if item is not None:
                yield from _paths(item, f"{path}.{key}" if path else str(key))

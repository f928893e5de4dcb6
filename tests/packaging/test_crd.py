"""The CRD, the parser, the examples and the status's writer agree, as far as no server is needed.

The structural part of the schema is judged by a small validator of its own; CEL needs a server:
tests/cluster/test_crd_on_a_server.py applies the same tables to a real one.
"""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
import yaml

from qtt_core import plan as p
from qtt_core import spec_types
from qtt_core.history import ConfigHistory, Standing
from qtt_core.ledger.events import Close, Run
from qtt_core.ledger.fold import LedgerState
from qtt_core.schema import Field, Kind, fill, walk
from qtt_core.spec import parse_manifest
from qtt_core.spec_schema import SPEC
from qtt_core.steps import METRICS, Best, Recommendation
from qtt_operator import crd
from qtt_operator.cluster_status import Truth, cluster_status
from qtt_operator.lint import lint_file
from qtt_operator.status import build_status
from qtt_operator.status_schema import STATUS

Schema = dict[str, Any]

UNBOUNDED = {
    ".apiVersion", ".kind", ".metadata", ".spec.template.spec", ".spec.fidelity.stepsPerJob",
}  # fmt: skip
"""The server's own, what has no schema, and a number that may be a word."""

BY_CEL = {
    "claim is a path", "claim leaves", "absolute path", "path leaves", "split leaves",
    "sub-path leaves", "ref leaves", "val is train", "split of 0", "split of 1", "no space",
    "two spaces", "metric", "direction", "direction of a loss", "goal in percent",
    "too many steps", "too many epochs", "151 epochs a job", "no steps", "steps as text",
    "external without name", "name without external", "timeout 0s", "three centuries",
    "less than a nanosecond", "empty budget", "two devices",
    "no checkpoint claim", "two checkpoint claims", "scope without template", "one pod, two Jobs",
}  # fmt: skip
"""Refused by an expression: a server is needed to see it."""
BY_DRY_RUN = {
    "two GPUs in the template", "two MIG slices", "two AMD GPUs requested", "infinity in template",
}  # fmt: skip
"""Inside a template, which has no schema: refused by lint and by the condition Accepted."""


@pytest.fixture(scope="module")
def written(root) -> dict[str, Any]:
    """The file as a reader sees it."""
    return yaml.safe_load((root / "crds" / "quicktune.dev_tuningruns.yaml").read_text())


@pytest.fixture(scope="module")
def schema(written) -> Schema:
    """The schema of the one version."""
    (version,) = written["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]


@pytest.fixture(scope="module")
def tables(root) -> dict[str, Any]:
    """The parser's tables of manifests."""
    return runpy.run_path(str(root / "tests" / "core" / "test_spec.py"))


# --- a validator for structural schemas, without CEL ---------------------------------------------

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def faults(value: Any, schema: Schema, path: str) -> Iterator[str]:
    """What a server finds wrong before it looks at rules; unknown fields as `kubectl` does."""
    if schema.get("x-kubernetes-int-or-string"):
        right = isinstance(value, int | str) and not isinstance(value, bool)
        if right and isinstance(value, str):
            yield from _text_faults(value, schema, path)
    else:
        right = isinstance(value, TYPES[schema["type"]])
        right = right and not (schema["type"] == "integer" and isinstance(value, bool))
    if not right:
        yield f"{path}: wrong type"
    elif isinstance(value, dict):
        yield from _object_faults(value, schema, path)
    elif isinstance(value, list):
        yield from _list_faults(value, schema, path)
    elif isinstance(value, str) and "x-kubernetes-int-or-string" not in schema:
        yield from _text_faults(value, schema, path)
    elif isinstance(value, int):
        high = min(schema.get("maximum", 2**63 - 1), 2**63 - 1)
        if not schema.get("minimum", value) <= value <= high:
            yield f"{path}: out of bounds"


def _object_faults(value: dict[str, Any], schema: Schema, path: str) -> Iterator[str]:
    yield from (f"{path}.{n}: required" for n in schema.get("required", ()) if n not in value)
    if len(value) > schema.get("maxProperties", len(value)):
        yield f"{path}: too many"
    for name, item in value.items():
        inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
        if inner:
            yield from faults(item, inner, f"{path}.{name}")
        elif not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{path}.{name}: unknown"


def _list_faults(value: list[Any], schema: Schema, path: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema["maxItems"]:
        yield f"{path}: too many or too few"
    if schema["x-kubernetes-list-type"] == "map":
        keys = [tuple(item[k] for k in schema["x-kubernetes-list-map-keys"]) for item in value]
    else:
        keys = value if schema["x-kubernetes-list-type"] == "set" else []
    if any(key in keys[:i] for i, key in enumerate(keys)):
        yield f"{path}: twice"
    for i, item in enumerate(value):
        yield from faults(item, schema["items"], f"{path}[{i}]")


def _text_faults(value: str, schema: Schema, path: str) -> Iterator[str]:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"{path}: too long or too short"
    if value not in schema.get("enum", [value]):
        yield f"{path}: not in the list"
    if not re.search(schema.get("pattern", ""), value):
        yield f"{path}: pattern"
    if schema.get("format") == "date-time":
        try:
            datetime.strptime(value, "%Y-%m-%dT%H:%M:%S%z")
        except ValueError:
            yield f"{path}: no time"


def spec_faults(manifest: dict[str, Any], schema: Schema) -> list[str]:
    """Structural faults of a manifest's spec, defaulted first as a server does."""
    spec = manifest["spec"]
    return list(faults(fill(SPEC, spec), schema["properties"]["spec"], "spec"))


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every node of a schema with its path."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from nodes(schema[name], f"{path}[]")


# --- one source ----------------------------------------------------------------------------------


def test_the_file_is_what_make_crds_writes(root):
    file = root / "crds" / "quicktune.dev_tuningruns.yaml"

    assert file.read_text() == crd.to_yaml(), "run `make crds`"


def test_every_field_is_described_and_bounded(schema):
    bare = []
    for path, node in nodes(schema):
        bounded = (
            node.get("type") in {"boolean", "integer"}
            or "properties" in node
            or {"enum", "maxLength", "format", "maxItems", "maxProperties"} & set(node)
            or path in UNBOUNDED
        )
        described = node.get("description", "").endswith(".") or path == ".metadata"
        if not (bounded and described):
            bare.append(path)

    assert bare == []


def test_every_path_that_the_crd_shows_is_in_its_schema(written, schema):
    (version,) = written["spec"]["versions"]
    shown = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
    shown += [field["jsonPath"] for field in version["selectableFields"]]
    shown += version["subresources"]["scale"].values()
    known = {path for path, _ in nodes(schema)}

    of_fields = [re.sub(r"\[\?.*?\]", "[]", path) for path in shown if ".metadata." not in path]

    assert len(of_fields) == 12
    assert [path for path in of_fields if path not in known] == []


def test_rules_name_sections_that_exist(schema):
    known = {path.removeprefix(".") for path, _ in nodes(schema)}

    assert [path for path in crd.RULES if path not in known] == []
    for path, rules in crd.RULES.items():
        targets = [f"{path}{rule['fieldPath']}" for rule in rules if "fieldPath" in rule]
        assert [target for target in targets if target not in known] == []


def test_the_types_default_as_the_table_does():
    """`RunSpec()` and an empty manifest are the same run."""
    whole = {"dataset": {"claimName": "c"}, "budget": {"maxSteps": 1}}
    manifest = {"apiVersion": "quicktune.dev/v1alpha1", "kind": "TuningRun"}
    parsed = parse_manifest({**manifest, "metadata": {"name": "x"}, "spec": whole}).spec

    assert parsed == spec_types.RunSpec(
        dataset=spec_types.Dataset(claim_name="c"), budget=spec_types.Budget(max_steps=1)
    )
    assert len(dataclasses.fields(spec_types.RunSpec)) == len(SPEC.fields)


def test_defaults_are_legal_and_complete(schema):
    for path, node in nodes(schema["properties"]["spec"], "spec"):
        if "default" in node:
            assert list(faults(node["default"], node, path)) == []


def test_immutable_sections_have_a_rule_and_mutable_ones_have_none(schema):
    guarded = {
        path
        for path, node in nodes(schema["properties"]["spec"], "spec")
        for rule in node.get("x-kubernetes-validations", ())
        if rule["rule"] == "self == oldSelf"
    }

    assert guarded == {path for path, field in walk(SPEC, "spec") if field.fixed}
    assert {"spec.dataset", "spec.fidelity.max", "spec.checkpoint.scope"} <= guarded


def test_the_rules_know_every_metric(schema):
    text = json.dumps(crd.RULES)

    assert [name for name in METRICS if f"'{name}'" not in text] == []


def test_no_field_is_of_a_kind_that_the_parser_does_not_read():
    kinds = {field.kind for _, field in walk(SPEC, "spec")}

    assert Kind.TIME not in kinds
    assert all(
        isinstance(field, Field) and field.about.endswith(".") for _, field in walk(SPEC, "")
    )


# --- the same verdict as the parser's ------------------------------------------------------------


def test_what_the_parser_accepts_the_schema_accepts(schema, tables):
    wrong = {
        name: spec_faults(tables["manifest"](**sections), schema)
        for name, sections in tables["ACCEPTED"].items()
    }

    assert len(wrong) > 30
    assert {name: found for name, found in wrong.items() if found} == {}


def test_what_the_parser_refuses_the_schema_refuses(schema, tables):
    let_through = {
        name
        for name, (sections, _, _) in tables["REFUSED"].items()
        if not spec_faults(tables["manifest"](**sections), schema)
    }

    assert len(tables["REFUSED"]) > 80
    assert let_through == BY_CEL | BY_DRY_RUN


def test_a_fault_is_found_at_the_same_field(schema, tables):
    elsewhere = {}
    for name, (sections, field, _) in tables["REFUSED"].items():
        found = spec_faults(tables["manifest"](**sections), schema)
        if found and not any(fault.startswith(field.rstrip("]0123456789[")) for fault in found):
            elsewhere[name] = found

    assert elsewhere == {}


def test_every_example_is_accepted(root, schema):
    files = [f for f in (root / "examples").rglob("*.yaml") if not f.name.startswith(".")]
    checked = 0
    for file in files:
        for document in yaml.safe_load_all(file.read_text()):
            if document and document.get("kind") == "TuningRun":
                checked += 1
                assert spec_faults(document, schema) == [], file.name
                assert lint_file(file).faults == (), file.name

    assert checked >= 8


# --- the status ----------------------------------------------------------------------------------

RUN = Run(name="birds", spec_hash="h", seed=7, algorithm="QuickTune", version="0", space_hash="s")


def history(config: int, *scores: float, model: str = "m") -> ConfigHistory:
    return ConfigHistory(
        config_id=config, config={"model": model}, standing=Standing.PAUSED,
        epochs=tuple(range(1, len(scores) + 1)), scores=scores, seconds=(2.0,) * len(scores),
        checkpoint_epoch=len(scores),
    )  # fmt: skip


def close(reason: str, msg: str = "") -> LedgerState:
    return LedgerState(run=RUN, closed=Close(id="1700000000000-0", reason=reason, msg=msg))


STATUSES: dict[str, dict[str, Any]] = {
    "nothing yet": {"ledger": LedgerState(), "phase": p.Phase.PENDING},
    "running": {},
    "no score yet": {"histories": {1: history(1)}},
    "the winner never ended a step here": {
        "recommendation": Recommendation(
            config_id=1, fidelity=2, score=0.65, n_val=9,
            best_observed=Best(config_id=1, fidelity=2, score=0.7),
        )
    },
    "suspended": {"phase": p.Phase.SUSPENDED},
    "draining": {"phase": p.Phase.DRAINING},
    "held": {"held": ("DiskFull", "no space left " * 200)},
    "completed": {"ledger": close("GoalReached", "x" * 5000), "phase": p.Phase.COMPLETED},
    "bad data": {"ledger": close("BadData"), "phase": p.Phase.FAILED},
    "a long name": {"histories": {1: history(1, 0.5, model="m" * 900)}},
    "half a million": {"histories": {10**9: history(10**9, *([0.5] * 1000))}},
}  # fmt: skip


def written_statuses(name: str) -> list[dict[str, Any]]:
    """A status as it is written on one machine, and on a cluster."""
    base: dict[str, Any] = {
        "spec": spec_types.RunSpec(
            dataset=spec_types.Dataset(claim_name="d"), budget=spec_types.Budget(max_steps=9)
        ),
        "identity": p.Identity(
            uid="u", name="birds", seed=7, space_id="native", space_sha="s", spec_hash="h" * 64,
            version="0",
        ),
        "ledger": LedgerState(last_id="3-0", run=RUN, steps=3, charged_seconds=7.6),
        "histories": {i: history(i, 0.5, 0.7) for i in range(1, 9)},
        "observed": p.Observed(),
        "phase": p.Phase.RUNNING,
        "held": None,
        "recommendation": None,
        "now": 1_700_000_100.0,
    }  # fmt: skip
    status = build_status(**(base | STATUSES[name]))
    truths = [Truth(type="StoreAvailable", status=False, reason="Unreachable", message="x" * 2000)]
    on_a_cluster = cluster_status(
        status, truths, previous=[], uid="u" * 36, generation=3, now=1.7e9, store="redis://r:6379/0"
    )
    return [status, on_a_cluster]


@pytest.mark.parametrize("name", STATUSES)
def test_what_is_written_as_status_fits_the_schema(name, schema):
    for status in written_statuses(name):
        assert list(faults(status, schema["properties"]["status"], "status")) == []
        assert len(json.dumps(status)) < 8192


def test_the_status_validator_knows_a_fault_when_it_sees_one(schema):
    status = schema["properties"]["status"]
    bad: dict[str, Any] = {
        "phase": "Done", "startTime": "", "seed": "7", "steps": 3, "best": {"model": "m" * 257},
        "conditions": [{"type": "Failed"}, {"type": "Failed"}],
    }  # fmt: skip

    found = {fault.partition(":")[0] for fault in faults(bad, status, "status")}

    assert {f"status.{name}" for name in ("phase", "startTime", "seed", "steps")} <= found
    assert {"status.best.model", "status.conditions", "status.conditions[0].reason"} <= found


def test_the_status_is_described_to_the_last_field():
    assert all(field.about.endswith(".") for _, field in walk(STATUS, "status"))

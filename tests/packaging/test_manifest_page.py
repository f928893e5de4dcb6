"""docs/manifest.md says what the parser does: the same fields, defaults and fixed fields."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest
import yaml

from qtt_core.errors import SpecError
from qtt_core.spec import (
    ALGORITHMS,
    changed_immutable_fields,
    cluster_only_fields,
    parse_manifest,
)
from qtt_core.steps import METRICS

UNKNOWN = "zzz"
GIVEN = {"dataset.claimName", "budget.maxSteps", "search.hubRef.name", "checkpoint.claimName"}
"""What the tests' manifests set themselves."""

FIELD = re.compile(r"`(?P<field>[A-Za-z.]+)`( (?P<mark>[○◌]))?")


@pytest.fixture(scope="module")
def page(root) -> dict[str, dict[str, str]]:
    """Field below `spec` -> its row."""
    rows = {}
    for line in (root / "docs" / "manifest.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        field = FIELD.fullmatch(cells[1]) if len(cells) == 7 else None
        if field:
            assert field["field"] not in rows
            names = ("value", "default", "fixed", "meaning")
            rows[field["field"]] = {
                "mark": field["mark"],
                **dict(zip(names, cells[2:], strict=False)),
            }
    return rows


def known_below(path: str) -> list[str] | None:
    """The fields of a section, as the parser itself lists them; None where it is no section."""
    inner: Any = {UNKNOWN: 1}
    for name in reversed(path.split(".")):
        inner = {name: inner}
    try:
        parse_manifest({"metadata": {"name": "x"}, **inner})
    except SpecError as error:
        for fault in error.faults:
            if fault.field == f"{path}.{UNKNOWN}" and "known here: " in fault.expected:
                return fault.expected.partition("known here: ")[2].split(", ")
    return None


def all_fields(path: str = "spec") -> set[str]:
    """Every field of the manifest below `spec`, found by asking for a field that does not exist."""
    found: set[str] = set()
    for name in known_below(path) or ():
        found.add(f"{path}.{name}".removeprefix("spec."))
        if f"{path}.{name}" != "spec.template.spec":
            found |= all_fields(f"{path}.{name}")
    return found


def minimal() -> dict[str, Any]:
    """The smallest manifest there is."""
    return {
        "apiVersion": "quicktune.dev/v1alpha1",
        "kind": "TuningRun",
        "metadata": {"name": "x"},
        "spec": {"dataset": {"claimName": "d"}, "budget": {"maxSteps": 1}},
    }


def value_at(raw: Any, path: str) -> Any:
    """The value below a dotted path, None if there is none."""
    for name in path.split("."):
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw


def test_the_tables_are_what_make_crds_writes(root):
    tables = runpy.run_path(str(root / "docs" / "manifest_tables.py"))
    text = (root / "docs" / "manifest.md").read_text()

    assert tables["page"](text) == text, "run `make crds`"


def test_the_page_has_exactly_the_parsers_fields(page):
    assert len(page) > 80
    assert set(page) == all_fields()


def test_every_default_on_the_page_is_the_parsers(page):
    raw = minimal()
    raw["spec"]["search"] = {"hubRef": {"name": "h"}, "space": "native"}
    raw["spec"]["checkpoint"] = {"claimName": "c"}
    spec = dict(parse_manifest(raw).raw_spec)
    spec["search"] = {**spec["search"], "configSpaceRef": {"key": "space.json"}}

    wrong = {}
    for field, row in page.items():
        default = value_at(spec, field)
        if default is None or isinstance(default, dict) or field in GIVEN:
            continue
        if yaml.safe_load(row["default"].strip("`") or "null") != default:
            wrong[field] = (row["default"], default)

    assert wrong == {}


def test_no_default_is_invented(page):
    spec = parse_manifest(minimal()).raw_spec
    optional = ("checkpoint.", "search.hubRef.", "search.configSpaceRef.")

    shown = {f for f, row in page.items() if row["default"].startswith("`")}

    assert {f for f in shown if value_at(spec, f) is None and not f.startswith(optional)} == set()


def test_a_field_is_fixed_exactly_where_a_change_is_refused(page):
    sections = {f for f, row in page.items() if any(o.startswith(f + ".") for o in page)}
    for field, row in page.items():
        if field in sections or field == "stop":
            continue
        old, new = _with(field, "one"), _with(field, "two")

        changed = changed_immutable_fields(old, new)

        assert bool(changed) == (row["fixed"] == "yes"), f"{field}: {changed}"


def _with(field: str, value: str) -> dict[str, Any]:
    nested: Any = value
    for name in reversed(field.split(".")):
        nested = {name: nested}
    return nested


def test_cluster_only_marks_are_the_parsers(page):
    raw = yaml.safe_load(CLUSTER)

    ignored = {path.removeprefix("spec.") for path in cluster_only_fields(parse_manifest(raw))}

    marked = {field for field, row in page.items() if row["mark"] == "○"}
    roots = {field for field in marked if not any(field.startswith(o + ".") for o in marked)}
    only_with_a_claim = {"checkpoint.claimName", "metadata.namespace"}
    assert roots - {"checkpoint.claimName"} == ignored - only_with_a_claim


def test_the_page_names_every_algorithm_and_metric(root):
    text = (root / "docs" / "manifest.md").read_text()

    assert [name for name in (*ALGORITHMS, *METRICS) if f"`{name}`" not in text] == []


CLUSTER = """
apiVersion: quicktune.dev/v1alpha1
kind: TuningRun
metadata: {name: x, namespace: n}
spec:
  dataset: {claimName: d}
  budget: {maxSteps: 1}
  suspendPolicy: Evict
  queueName: q
  workloadPriorityClass: p
  template: {spec: {nodeSelector: {a: b}}}
  deletionPolicy: Delete
  ttlSecondsAfterFinished: 5
  failurePolicy: {pendingTimeout: 2h}
  checkpoint:
    scope: Config
    maxVolumes: 3
    subPath: s
    volumeClaimTemplate: {accessModes: [ReadWriteMany], resources: {requests: {storage: 1Gi}}}
"""

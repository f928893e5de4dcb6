"""A real API server takes the CRD, and judges manifests and their edits as the parser does.

The tables are those of tests/core/test_spec.py; nothing is created but a few objects in a
namespace of the test's own, all else is a dry run.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import runpy
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_cluster import until

from qtt_core.schema import walk
from qtt_core.spec import changed_immutable_fields, parse_manifest, scan_manifest
from qtt_core.spec_schema import SPEC
from qtt_operator import crd
from qtt_operator.status_schema import STATUS

pytestmark = pytest.mark.testbed

TESTS = Path(__file__).parents[1]
Object = dict[str, Any]

RWO = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
OF_LINT_ALONE = {
    "two GPUs in the template", "two MIG slices", "two AMD GPUs requested",
    "infinity in template",  # not JSON: it cannot be sent
}  # fmt: skip
"""Inside `template.spec`, which has no schema; the condition Accepted says it on a cluster."""


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    """The parser's tables of manifests."""
    return runpy.run_path(str(TESTS / "core" / "test_spec.py"))


def kubectl(*words: str, given: Object | str | None = None) -> str:
    """What kubectl prints. Raises: AssertionError with its standard error."""
    text = json.dumps(given) if isinstance(given, dict) else given
    ended = subprocess.run(
        ["kubectl", *words], input=text, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


OUTDATED = "the object has been modified"


class Runs:
    """The TuningRuns of one namespace, asked as strictly as kubectl asks."""

    def __init__(self, namespace: str) -> None:
        from kubernetes import client, config

        config.load_kube_config()
        self.namespace = namespace
        self._api = client.CustomObjectsApi()
        self._error = client.ApiException
        self._place = (crd.GROUP, crd.VERSION, namespace, "tuningruns")

    def create(self, manifest: Object, **more: str) -> Object | str:
        """The stored object, or why not."""
        sent = copy.deepcopy(manifest)
        if isinstance(sent.get("metadata"), dict):
            sent["metadata"].pop("namespace", None)
        return self._ask(self._api.create_namespaced_custom_object, sent, **more)

    def replace(self, manifest: Object, **more: str) -> Object | str:
        """The changed object, or why not."""
        return self._put(self._api.replace_namespaced_custom_object, manifest, **more)

    def write_status(self, manifest: Object) -> Object | str:
        """The object with its status, or why not."""
        return self._put(self._api.replace_namespaced_custom_object_status, manifest)

    def _put(self, call: Any, manifest: Object, **more: str) -> Object | str:
        """Written over the newest version: the installed operator writes its status meanwhile."""
        name = manifest["metadata"]["name"]
        while True:
            newest = self._api.get_namespaced_custom_object(*self._place, name)["metadata"]
            metadata = {**manifest["metadata"], "resourceVersion": newest["resourceVersion"]}
            answer = self._ask(call, name, {**manifest, "metadata": metadata}, **more)
            if not isinstance(answer, str) or OUTDATED not in answer:
                return answer

    def _ask(self, call: Any, *words: Any, **more: str) -> Object | str:
        try:
            found = call(*self._place, *words, field_validation="Strict", **more)
        except self._error as error:
            return str(json.loads(error.body)["message"])
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def runs(root: Path) -> Iterator[Runs]:
    """A server that has the CRD, and a namespace of our own."""
    if "TESTBED_DIR" not in os.environ:
        pytest.fail("these tests run inside the test cluster: make testbed", pytrace=False)
    kubectl("apply", "--server-side", "-f", str(root / "crds"))
    kubectl("wait", "--for=condition=Established", "crd/tuningruns.quicktune.dev", "--timeout=20s")
    # also renews what kubectl remembers of a server that had no CRD yet
    known = ("api-resources", f"--api-group={crd.GROUP}")
    until("kubectl knows the short name", lambda: "tnr" in kubectl(*known))
    namespace = f"crd-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", namespace)
    yield Runs(namespace)
    kubectl("delete", "namespace", namespace, "--wait=false")


def edited(found: Object, spec: Object) -> Object:
    """An object with another spec, as `kubectl edit` sends it."""
    return {**found, "spec": spec}


def leaf(field: str) -> str:
    """The last name of a field's path, without an index."""
    return re.sub(r"\[\w*\]$", "", field).rpartition(".")[2]


def test_what_the_parser_accepts_the_server_stores_with_the_same_defaults(runs, tables):
    wrong = {}
    for name, sections in {"minimal": {}, **tables["ACCEPTED"]}.items():
        manifest = tables["manifest"](**sections)
        found = runs.create(manifest, dry_run="All")
        if isinstance(found, str) or found["spec"] != parse_manifest(manifest).raw_spec:
            wrong[name] = found

    assert wrong == {}


def test_what_the_parser_refuses_the_server_refuses_and_names_the_field(runs, tables):
    wrong = {}
    for name, (sections, field, _) in tables["REFUSED"].items():
        if name in OF_LINT_ALONE:
            continue
        found = runs.create(tables["manifest"](**sections), dry_run="All")
        if not isinstance(found, str) or leaf(field) not in found:
            wrong[name] = found

    assert len(tables["REFUSED"]) - len(OF_LINT_ALONE) >= 90
    assert wrong == {}


def test_a_rule_says_what_would_be_right(runs, tables):
    """No rule may fail with an error of its own: its message is what a user reads."""
    said = {
        name: runs.create(tables["manifest"](**sections), dry_run="All")
        for name, (sections, _, _) in tables["REFUSED"].items()
        if name not in OF_LINT_ALONE
    }

    assert {name: text for name, text in said.items() if "evaluation error" in text} == {}


@pytest.mark.parametrize(
    ("name", "right"),
    [("a", True), ("x" * 40, True), ("x" * 41, False), ("1a", False), ("a.b", False)],
)
def test_a_run_has_a_short_name_of_rfc_1035(runs, tables, name, right):
    manifest = {**tables["manifest"](), "metadata": {"name": name}}

    found = runs.create(manifest, dry_run="All")

    assert isinstance(found, dict) == right
    assert right or "metadata.name must be" in found


def test_overrides_of_a_space_of_your_own_are_refused_as_by_lint(runs, tables):
    search = {"configSpaceRef": {"name": "mine"}, "overrides": {"lr": "1"}}

    found = runs.create(tables["manifest"](search=search), dry_run="All")

    assert "spec.search.overrides" in found
    assert "change the file of configSpaceRef instead" in found


def test_every_example_is_accepted(runs, root):
    for file in sorted((root / "examples").rglob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            if document and document.get("kind") == "TuningRun":
                assert isinstance(runs.create(document, dry_run="All"), dict), file


def test_what_may_change_can_be_changed(runs, tables):
    old = created(runs, tables, "mutable", **tables["checkpoint"]())

    wrong = {}
    for name, sections in tables["MUTABLE"].items():
        found = runs.replace(edited(old, {**old["spec"], **sections}), dry_run="All")
        if isinstance(found, str):
            wrong[name] = found

    assert len(tables["MUTABLE"]) > 12
    assert wrong == {}


def test_what_may_not_change_is_refused_and_named(runs, tables):
    old = created(runs, tables, "fixed", **tables["checkpoint"]())

    wrong = {}
    for name, (sections, field) in tables["IMMUTABLE"].items():
        spec = {key: value for key, value in {**old["spec"], **sections}.items() if value}
        found = runs.replace(edited(old, spec), dry_run="All")
        if not isinstance(found, str) or field.split(".")[1] not in found:
            wrong[name] = found

    assert len(tables["IMMUTABLE"]) > 10
    assert wrong == {}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"stop": True}, {"stop": False}, "stop cannot be undone"),
        ({}, {"checkpoint": {"claimName": "c"}}, "checkpoint can be neither added nor removed"),
        (
            {"checkpoint": {"claimName": "c"}},
            {"checkpoint": {"volumeClaimTemplate": RWO}},
            "checkpoint.claimName can be neither added nor removed",
        ),
        (
            {"checkpoint": {"volumeClaimTemplate": RWO}},
            {"checkpoint": {"volumeClaimTemplate": {**RWO, "accessModes": ["ReadWriteMany"]}}},
            "checkpoint.volumeClaimTemplate is immutable",
        ),
        (
            {"checkpoint": {"volumeClaimTemplate": RWO}},
            {"checkpoint": {"volumeClaimTemplate": RWO, "scope": "Config"}},
            "checkpoint.scope is immutable",
        ),
        ({"search": {"space": "native"}}, {"search": {"configSpaceRef": {"name": "x"}}}, "search"),
        ({"weights": {"claimName": "w"}}, {"weights": {}}, "weights is immutable"),
        (
            {"dataset": {"claimName": "data", "autoSplit": "0.2"}},
            {"dataset": {"claimName": "data"}},
            "dataset is immutable",
        ),
    ],
)
def test_no_way_round_a_fixed_field(runs, tables, before, after, said):
    old = created(runs, tables, f"r{uuid.uuid4().hex[:8]}", **before)

    found = runs.replace(edited(old, {**old["spec"], **after}), dry_run="All")

    assert isinstance(found, str)
    assert said in found


def created(runs: Runs, tables: dict[str, Any], name: str, **sections: Any) -> Object:
    """An object that is really stored."""
    manifest = {**tables["manifest"](**sections), "metadata": {"name": name}}
    found = runs.create(manifest)
    assert isinstance(found, dict), found
    return found


# --- what people see -----------------------------------------------------------------------------


def test_every_status_that_is_written_is_stored_whole(runs, tables):
    helpers = runpy.run_path(str(TESTS / "packaging" / "test_crd.py"))
    found = created(runs, tables, "status")
    for name in helpers["STATUSES"]:
        for status in helpers["written_statuses"](name):
            found = runs.write_status({**found, "status": status})

            assert isinstance(found, dict), (name, found)
            assert found["status"] == status, name


def test_a_status_out_of_bounds_is_refused(runs, tables):
    found = created(runs, tables, "bad-status")
    condition = {"type": "Failed", "status": "True", "reason": "R", "message": ""}

    for status, field in (
        ({"phase": "Done"}, "status.phase"),
        ({"top": [{}] * 6}, "status.top"),
        ({"startTime": ""}, "status.startTime"),
        ({"conditions": [condition]}, "lastTransitionTime"),
    ):
        said = runs.write_status({**found, "status": status})

        assert isinstance(said, str), status
        assert field in said


def test_kubectl_explains_every_field(runs):
    tree = kubectl("explain", "tnr.spec", "--recursive")
    names = {path.rpartition(".")[2] for path, _ in walk(SPEC, "spec")}

    assert {name for name in names if not re.search(rf"^\s*{name}\t", tree, re.MULTILINE)} == set()
    for whole, path in ((SPEC, "spec"), (STATUS, "status")):
        for section in ("", *(f".{name}" for name, part in whole.fields.items() if part.fields)):
            page = " ".join(kubectl("explain", f"tnr.{path}{section}").split())
            fields = whole.fields[section[1:]].fields if section else whole.fields
            assert "no description" not in page
            assert [name for name, part in fields.items() if part.about not in page] == []


def test_kubectl_scales_lists_and_waits(runs, tables):
    found = created(runs, tables, "seen")
    time = "2026-01-01T00:00:00Z"
    status = {
        "phase": "Completed",
        "best": {"model": "tiny_a", "score": "0.9100"},
        "consumed": {"steps": 12, "gpuSeconds": 340},
        "jobs": {"running": 0},
        "conditions": [
            {"type": "Complete", "status": "True", "reason": "GoalReached", "message": "",
             "lastTransitionTime": time},
        ],
    }  # fmt: skip
    here = ("-n", runs.namespace)
    kubectl("scale", "tnr/seen", "--replicas=3", *here)
    wide = ("get", "qtr", "seen", "-o", "wide", *here)
    columns = ["NAME", "PHASE", "STEPS", "RUNNING", "BEST", "MODEL", "GPU-S", "COMPLETE", "AGE"]
    row = ["seen", "Completed", "12", "0", "0.9100", "tiny_a", "340", "True"]

    def rows() -> list[list[str]] | None:
        """What kubectl lists, unless the installed operator has written a status of its own."""
        assert isinstance(runs.write_status({**found, "status": status}), dict)
        listed = [line.split() for line in kubectl(*wide).splitlines()]
        return listed if listed[1][1] == status["phase"] else None

    def chosen() -> bool:
        """Whether the list of completed runs has it."""
        rows()
        completed = ("get", "quicktune", "--field-selector=status.phase=Completed", *here)
        return [line.split()[0] for line in kubectl(*completed).splitlines()[1:]] == ["seen"]

    waiting = subprocess.Popen(
        ["kubectl", "wait", "--for=condition=Complete", "tnr/seen", "--timeout=60s", *here]
    )
    listed = until("kubectl lists what was written", rows)
    until("kubectl chooses by phase", chosen)
    until("kubectl wait ends", lambda: rows() and waiting.poll() is not None)

    assert waiting.returncode == 0
    assert [listed[0], listed[1][:8]] == [columns, row]
    assert kubectl("get", "tnr/seen", "-o", "jsonpath={.spec.parallelism}", *here) == "3"


# --- unseen manifests ----------------------------------------------------------------------------

ODD_VALUES: tuple[Any, ...] = (
    None, "", "0", "1", "-1", ".5", "0.5", "1.", "1e5", "1E-3", "+0.3", "5m", "1.5h", "-5m", "1d",
    "2540400h", "0.1ns", "1µs", 0, 1, 2, -1, 50, 51, 150, 151, 1000, 2**31, 2**63 - 1, 2**63, True,
    False, 2.5, [], {}, ["a"], ["a", "a"], [None], {"a": "b"}, {"a": 1}, {"a": None}, {"name": "x"},
    "a/b", "..", ".", "/x", "a/../b", "a/..", "a\n", "ä" * 64, "x" * 65, "x" * 254, "x" * 513,
    "\x00", "Auto", "Never", "Config", "External", "log_loss", "Minimize", "1Gi", "1 Gi", "nan",
)  # fmt: skip
WHOLE = """
suspend: false
suspendPolicy: Drain
stop: false
parallelism: 1
dataset: {claimName: d, path: a/b, autoSplit: "0.2", imageSize: 64, metaFeatures: {n: "1"}}
search:
  space: native
  hubRef: {name: h, key: k}
  models: [a, b]
  modelLimits: {maxParams: 5, maxGMACs: "6", licences: [mit]}
  initialConfigs: [{model: a, lr: "1e-3"}]
  overrides: {amp: "true"}
weights: {claimName: w, fetch: Never}
objective: {metric: top1, direction: Maximize, goal: "0.9", minGainPerGPUHour: "0.1"}
fidelity: {max: 50, step: 5, stepsPerJob: 2}
optimizer: {costFactor: "1", initRandom: 3, patience: 3, tolerance: "0.1", seed: 7, timeout: 60s}
budget: {maxSteps: 100, maxGPUSeconds: 14400, maxWallclock: 4h30m}
trainer: {custom: true, devices: 1}
checkpoint:
  volumeClaimTemplate: {accessModes: [ReadWriteMany], resources: {requests: {storage: 1Gi}}}
  scope: Config
  maxVolumes: 4
failurePolicy: {maxFailedConfigs: 9, onOOM: FailConfig, stepTimeout: 40m}
gpuShare: "0.5"
queueName: q
template: {metadata: {labels: {a: b}}}
ttlSecondsAfterFinished: 5
"""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to every value inside a value."""
    inner = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def spoil(spec: Object, rng: random.Random) -> Object:
    """The spec with one to three values replaced, removed or made unknown."""
    spec = copy.deepcopy(spec)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *path, last = rng.choice(list(places(spec)))
        target: Any = spec
        for key in path:
            target = target[key]
        kind = rng.random()
        if kind < 0.12:
            del target[last]
        elif kind < 0.17 and isinstance(target, dict):
            target["zzz"] = rng.choice((1, None))
        else:
            target[last] = copy.deepcopy(rng.choice(ODD_VALUES))
    return spec


def test_on_unseen_manifests_lint_and_server_agree(runs, tables):
    """1,500 of a fixed seed; 12,000 of another agreed when this was written."""
    rng = random.Random(20)
    whole = yaml.safe_load(WHOLE)
    accepted, wrong = 0, []
    for _ in range(1500):
        some = {"dataset", "budget", *rng.sample(sorted(whole), rng.choice((4, len(whole))))}
        manifest = tables["manifest"]()
        manifest["spec"] = spoil({n: whole[n] for n in whole if n in some}, rng)

        run, faults = scan_manifest(manifest)
        found = runs.create(manifest, dry_run="All")

        accepted += isinstance(found, dict)
        if isinstance(found, dict) == bool(faults):
            wrong.append((manifest["spec"], found, [str(fault) for fault in faults]))
        elif isinstance(found, dict) and found["spec"] != run.raw_spec:
            wrong.append((manifest["spec"], found["spec"], run.raw_spec))

    assert 150 < accepted < 1350
    assert wrong == []


def test_on_unseen_edits_parser_and_server_agree(runs, tables):
    rng = random.Random(21)
    old = created(runs, tables, "edits", **yaml.safe_load(WHOLE))
    accepted, refused, wrong = 0, 0, []
    for _ in range(1500):
        manifest = {**tables["manifest"](), "spec": spoil(old["spec"], rng)}
        run, faults = scan_manifest(manifest)
        if faults:
            continue
        changed = changed_immutable_fields(old["spec"], run.raw_spec)
        found = runs.replace(edited(old, manifest["spec"]), dry_run="All")

        accepted += not changed
        refused += bool(changed)
        if isinstance(found, dict) == bool(changed):
            wrong.append((changed, found))

    assert min(accepted, refused) > 20
    assert wrong == []

"""Manifests: bounds and rules of the CRD draft (30-kubernetes 1.2), each broken once."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtt_core.errors import SpecError
from qtt_core.spec import (
    Budget,
    Dataset,
    RunSpec,
    TuningRun,
    changed_immutable_fields,
    check_spec,
    cluster_only_fields,
    immutable_digest,
    parse_manifest,
    scan_manifest,
)

RWO = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
RWOP = {**RWO, "accessModes": ["ReadWriteOncePod"]}


def manifest(**spec: Any) -> dict[str, Any]:
    """A minimal manifest with sections replaced; None leaves one out."""
    sections = {"dataset": {"claimName": "data"}, "budget": {"maxSteps": 10}, **spec}
    return {
        "apiVersion": "quicktune.dev/v1alpha1",
        "kind": "TuningRun",
        "metadata": {"name": "run"},
        "spec": {name: value for name, value in sections.items() if value is not None},
    }


def parsed(**spec: Any) -> TuningRun:
    return parse_manifest(manifest(**spec))


def faults_of(raw: object) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        parse_manifest(raw)
    return {fault.field: str(fault) for fault in caught.value.faults}


def dataset(**fields: Any) -> dict[str, Any]:
    return {"dataset": {"claimName": "data", **fields}}


def search(**fields: Any) -> dict[str, Any]:
    return {"search": {"space": "native", **fields}}


def checkpoint(**fields: Any) -> dict[str, Any]:
    return {"checkpoint": {"claimName": "data", **fields}}


def template(**trainer: Any) -> dict[str, Any]:
    return {"template": {"spec": {"containers": [{"name": "trainer", **trainer}]}}}


# --- what is accepted ----------------------------------------------------------------------------


def test_the_minimal_manifest_is_filled_with_the_documented_defaults() -> None:
    run = parsed()

    defaults = RunSpec(dataset=Dataset(claim_name="data"), budget=Budget(max_steps=10))
    assert run.spec == defaults
    assert (run.name, run.namespace) == ("run", "default")


def test_the_recorded_spec_is_what_an_api_server_would_store() -> None:
    raw_spec = parsed().raw_spec

    assert raw_spec == {
        "suspend": False,
        "suspendPolicy": "Drain",
        "stop": False,
        "parallelism": 1,
        "dataset": {
            "claimName": "data",
            "path": "",
            "format": "ImageFolder",
            "trainSplit": "train",
            "valSplit": "val",
            "testSplit": "test",
            "inChannels": 3,
        },
        "search": {"space": "native", "portfolio": "Auto", "hub": "timm24", "poolSize": 512},
        "objective": {"metric": "top1"},
        "fidelity": {"max": 50, "step": 1, "stepsPerJob": "Auto"},
        "optimizer": {
            "algorithm": "QuickTune",
            "acquisition": "EI",
            "costAware": True,
            "refit": "Auto",
        },
        "budget": {"maxSteps": 10},
        "trainer": {"custom": False, "devices": 1},
        "weights": {},
        "failurePolicy": {
            "maxAppFailuresPerConfig": 1,
            "maxInfraRetriesPerStep": 6,
            "onOOM": "FailConfig",
        },
        "gpuShare": "1",
        "deletionPolicy": "Retain",
    }


def test_parsing_a_recorded_spec_changes_nothing() -> None:
    run = parsed(**search(initialConfigs=[{"lr": "1e-3"}]), **checkpoint(topK=4))

    again = parse_manifest({**manifest(), "spec": json.loads(json.dumps(run.raw_spec))})

    assert again.spec == run.spec
    assert again.raw_spec == run.raw_spec
    assert immutable_digest(again.raw_spec) == immutable_digest(run.raw_spec)


def test_the_manifest_given_is_not_changed() -> None:
    raw = manifest(**search(hubRef={"name": "mine"}), dataset={"claimName": "data"})
    before = copy.deepcopy(raw)

    parse_manifest(raw)

    assert raw == before


def test_null_means_absent() -> None:
    run = parsed(
        dataset={"claimName": "data", "imageSize": None, "path": None},
        optimizer=None,
        **{"checkpoint": None},
    )

    assert run.spec == parsed().spec
    assert run.raw_spec == parsed().raw_spec


def test_nulls_inside_a_template_are_kept() -> None:
    pod = {"spec": {"nodeSelector": None, "containers": []}}

    assert parsed(template=pod).raw_spec["template"] == pod


def test_the_full_example_reads_as_it_looks(root: Path) -> None:
    raw = yaml.safe_load((root / "examples" / "full.yaml").read_text())

    run = parse_manifest(raw)

    spec = run.spec
    assert (run.name, run.namespace) == ("birds", "vision")
    assert spec.dataset.auto_split == 0.2
    assert spec.dataset.metafeatures == {"num_samples": 11788.0, "num_classes": 200.0}
    assert spec.search.model_limits.max_gmacs == 60.0
    assert spec.search.initial_configs == ({"model": "edgenext_small", "lr": "1e-3"},)
    assert spec.objective.goal == 0.93
    assert spec.fidelity.steps_per_job is None
    assert spec.budget.max_wallclock == 4.5 * 3600
    assert spec.failure_policy.pending_timeout == 7200.0
    assert spec.checkpoint is not None
    assert (spec.checkpoint.retention, spec.checkpoint.top_k) == ("TopK", 3)
    assert spec.optimizer.seed == 7


def test_the_minimal_example_is_accepted(root: Path) -> None:
    run = parse_manifest(yaml.safe_load((root / "examples" / "minimal.yaml").read_text()))

    assert run.spec.budget.max_gpu_seconds == 3600.0


def test_an_object_fetched_from_a_server_is_accepted() -> None:
    raw = manifest()
    raw["metadata"] |= {
        "uid": "1",
        "generation": 3,
        "resourceVersion": "5",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "managedFields": [],
        "annotations": {"quicktune.dev/retry": "a"},
    }

    run = parse_manifest({**raw, "status": {"phase": "Running"}})

    assert run.annotations == {"quicktune.dev/retry": "a"}


ACCEPTED: dict[str, dict[str, Any]] = {
    "no parallelism": {"parallelism": 0},
    "parallelism 512": {"parallelism": 512},
    "both budgets": {"budget": {"maxSteps": 1, "maxGPUSeconds": 2**63 - 1}},
    "wallclock only": {"budget": {"maxWallclock": "1.5h"}},
    "milliseconds": {"budget": {"maxWallclock": "1h0m0.5s"}},
    "split by decimal": dataset(autoSplit="2e-1"),
    "image sizes": dataset(imageSize=16, inChannels=64, numClasses=2),
    "spaces in a path": dataset(path="a b/c"),
    "equal splits with autoSplit": dataset(autoSplit="0.1", valSplit="train"),
    "custom space": {"search": {"configSpaceRef": {"name": "mine"}}},
    "own hub": search(hubRef={"name": "mine", "key": "x.json"}),
    "64 overrides": search(overrides={f"n{i}": "x" for i in range(64)}),
    "steps fill the job": {"fidelity": {"max": 50, "step": 5, "stepsPerJob": 10}},
    "150 epochs a job": {"fidelity": {"max": 1000, "step": 150, "stepsPerJob": 1}},
    "step beyond max": {"fidelity": {"max": 5, "step": 10}},
    "log loss": {"objective": {"metric": "log_loss", "direction": "Minimize", "goal": "0.5"}},
    "direction as the metric": {"objective": {"metric": "top5", "direction": "Maximize"}},
    "own metric": {"objective": {"metric": "iou"}, "trainer": {"custom": True}},
    "own metric, minimised": {
        "objective": {"metric": "wer", "direction": "Minimize"},
        "trainer": {"custom": True, "devices": 8},
    },
    "external optimizer": {"optimizer": {"algorithm": "External", "name": "mine"}},
    "two centuries": {"budget": {"maxWallclock": "1752000h"}},
    "amounts": {
        "checkpoint": {
            "volumeClaimTemplate": {**RWO, "resources": {"requests": {"storage": 5, "x": "1.5e3"}}}
        }
    },
    "tiny decimals": {"optimizer": {"tolerance": "-1.5e-12", "costFactor": "+0"}},
    "dots in a claim": {"dataset": {"claimName": "...", "path": "a/..b/./c..", "valSplit": ".v"}},
    "seed 0": {"optimizer": {"seed": 0}},
    "claim template": {"checkpoint": {"volumeClaimTemplate": RWO, "scope": "Config"}},
    "one pod, one Job": {"checkpoint": {"volumeClaimTemplate": RWOP}},
    "half a GPU": {"gpuShare": "0.5"},
    "share without zero": {"gpuShare": ".25"},
    "one GPU": template(resources={"limits": {"nvidia.com/gpu": 1, "memory": "24Gi"}}),
    "one GPU twice": template(
        resources={"limits": {"nvidia.com/gpu": "1"}, "requests": {"nvidia.com/gpu": "1"}}
    ),
    "two GPUs, custom": {
        **template(resources={"limits": {"nvidia.com/gpu": 2}}),
        "trainer": {"custom": True, "devices": 2},
    },
    "two RDMA links": template(resources={"limits": {"rdma/hca": 2}}),
    "ttl 0": {"ttlSecondsAfterFinished": 0},
    "weights": {"weights": {"claimName": "w", "fetch": "Never"}},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_schema_allows_is_accepted(name: str) -> None:
    assert parsed(**ACCEPTED[name])


# --- what is refused -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no dataset": ({"dataset": None}, "spec.dataset", "required"),
    "no budget": ({"budget": None}, "spec.budget", "required"),
    "empty budget": ({"budget": {}}, "spec.budget", "at least one of maxSteps"),
    "parallelism -1": ({"parallelism": -1}, "spec.parallelism", "from 0 to 512"),
    "parallelism 513": ({"parallelism": 513}, "spec.parallelism", "from 0 to 512"),
    "parallelism as text": ({"parallelism": "4"}, "spec.parallelism", "integer"),
    "parallelism true": ({"parallelism": True}, "spec.parallelism", "integer"),
    "suspend as text": ({"suspend": "true"}, "spec.suspend", "not quoted"),
    "suspend policy": ({"suspendPolicy": "Kill"}, "spec.suspendPolicy", "Drain, Evict"),
    "no claim": ({"dataset": {}}, "spec.dataset.claimName", "required"),
    "empty claim": ({"dataset": {"claimName": ""}}, "spec.dataset.claimName", "1 to 253"),
    "long claim": ({"dataset": {"claimName": "x" * 254}}, "spec.dataset.claimName", "253"),
    "claim is a path": ({"dataset": {"claimName": "a/b"}}, "spec.dataset.claimName", "not a path"),
    "claim leaves": ({"dataset": {"claimName": ".."}}, "spec.dataset.claimName", "not a path"),
    "absolute path": (dataset(path="/etc"), "spec.dataset.path", "relative"),
    "path leaves": (dataset(path="a/../../b"), "spec.dataset.path", "inside the claim"),
    "long path": (dataset(path="x" * 513), "spec.dataset.path", "512"),
    "format": (dataset(format="COCO"), "spec.dataset.format", "ImageFolder"),
    "empty split": (dataset(trainSplit=""), "spec.dataset.trainSplit", "1 to 64"),
    "split leaves": (dataset(valSplit="../val"), "spec.dataset.valSplit", "inside"),
    "long split": (dataset(testSplit="x" * 65), "spec.dataset.testSplit", "64"),
    "val is train": (dataset(valSplit="train"), "spec.dataset.valSplit", "equals trainSplit"),
    "split as float": (dataset(autoSplit=0.2), "spec.dataset.autoSplit", 'quote it: "0.2"'),
    "split of 0": (dataset(autoSplit="0"), "spec.dataset.autoSplit", "between 0 and 1"),
    "split of 1": (dataset(autoSplit="1.0"), "spec.dataset.autoSplit", "between 0 and 1"),
    "split in percent": (dataset(autoSplit="20%"), "spec.dataset.autoSplit", "quoted decimal"),
    "one class": (dataset(numClasses=1), "spec.dataset.numClasses", "from 2 to 100000"),
    "small image": (dataset(imageSize=15), "spec.dataset.imageSize", "from 16 to 1024"),
    "large image": (dataset(imageSize=1025), "spec.dataset.imageSize", "from 16 to 1024"),
    "no channel": (dataset(inChannels=0), "spec.dataset.inChannels", "from 1 to 64"),
    "metafeature as number": (
        dataset(metaFeatures={"n": 3}),
        "spec.dataset.metaFeatures.n",
        'quote it: "3"',
    ),
    "infinite metafeature": (
        dataset(metaFeatures={"n": "1e999"}),
        "spec.dataset.metaFeatures.n",
        "decimal",
    ),
    "65 metafeatures": (
        dataset(metaFeatures={f"n{i}": "1" for i in range(65)}),
        "spec.dataset.metaFeatures",
        "at most 64",
    ),
    "misspelt field": (dataset(clamName="x"), "spec.dataset.clamName", "did you mean claimName?"),
    "no space": ({"search": {"hub": "tiny"}}, "spec.search.space", "use space: native"),
    "two spaces": (search(configSpaceRef={"name": "x"}), "spec.search", "exactly one of"),
    "nameless ref": (search(hubRef={}), "spec.search.hubRef.name", "required"),
    "ref leaves": (search(hubRef={"name": "../x"}), "spec.search.hubRef.name", "not a path"),
    "model twice": (search(models=["a", "a"]), "spec.search.models[1]", "twice"),
    "model as number": (search(models=[3]), "spec.search.models[0]", "string"),
    "models as text": (search(models="a"), "spec.search.models", "list"),
    "257 models": (search(models=[f"m{i}" for i in range(257)]), "spec.search.models", "256"),
    "no parameters": (
        search(modelLimits={"maxParams": 0}),
        "spec.search.modelLimits.maxParams",
        "1",
    ),
    "GMACs as number": (
        search(modelLimits={"maxGMACs": 60}),
        "spec.search.modelLimits.maxGMACs",
        'quote it: "60"',
    ),
    "empty pool": (search(poolSize=0), "spec.search.poolSize", "from 1 to 100000"),
    "33 configurations": (
        search(initialConfigs=[{}] * 33),
        "spec.search.initialConfigs",
        "at most 32",
    ),
    "number in configuration": (
        search(initialConfigs=[{"lr": 0.001}]),
        "spec.search.initialConfigs[0].lr",
        'quote the value: "0.001"',
    ),
    "truth in overrides": (
        search(overrides={"amp": True}),
        "spec.search.overrides.amp",
        'quote the value: "true"',
    ),
    "list in overrides": (search(overrides={"lr": ["1"]}), "spec.search.overrides.lr", "quote"),
    "overrides as list": (search(overrides=["lr"]), "spec.search.overrides", "mapping"),
    "metric": ({"objective": {"metric": "acc"}}, "spec.objective.metric", "top1, top5"),
    "empty metric": ({"objective": {"metric": ""}}, "spec.objective.metric", "1 to 63"),
    "direction": (
        {"objective": {"metric": "top1", "direction": "Minimize"}},
        "spec.objective.direction",
        "contradicts metric top1",
    ),
    "direction of a loss": (
        {"objective": {"metric": "log_loss", "direction": "Maximize"}},
        "spec.objective.direction",
        "use Minimize",
    ),
    "goal in percent": ({"objective": {"goal": "93"}}, "spec.objective.goal", "[0, 1]"),
    "goal as float": ({"objective": {"goal": 0.93}}, "spec.objective.goal", 'quote it: "0.93"'),
    "no max": ({"fidelity": {"step": 1}}, "spec.fidelity.max", "required"),
    "max 1001": ({"fidelity": {"max": 1001}}, "spec.fidelity.max", "from 1 to 1000"),
    "step 0": ({"fidelity": {"max": 5, "step": 0}}, "spec.fidelity.step", "from 1 to 150"),
    "too many steps": (
        {"fidelity": {"max": 50, "stepsPerJob": 60}},
        "spec.fidelity.stepsPerJob",
        "exceeds fidelity.max (50); use 1..50 or Auto",
    ),
    "too many epochs": (
        {"fidelity": {"max": 50, "step": 5, "stepsPerJob": 11}},
        "spec.fidelity.stepsPerJob",
        "use 1..10 or Auto",
    ),
    "151 epochs a job": (
        {"fidelity": {"max": 1000, "stepsPerJob": 151}},
        "spec.fidelity.stepsPerJob",
        "150 epochs a Job; use 1..150",
    ),
    "no steps": (
        {"fidelity": {"max": 5, "stepsPerJob": 0}},
        "spec.fidelity.stepsPerJob",
        "not positive",
    ),
    "steps as text": (
        {"fidelity": {"max": 5, "stepsPerJob": "2"}},
        "spec.fidelity.stepsPerJob",
        "neither an integer nor Auto",
    ),
    "algorithm": ({"optimizer": {"algorithm": "TPE"}}, "spec.optimizer.algorithm", "QuickTune"),
    "external without name": (
        {"optimizer": {"algorithm": "External"}},
        "spec.optimizer.name",
        "exactly when",
    ),
    "name without external": ({"optimizer": {"name": "x"}}, "spec.optimizer.name", "exactly when"),
    "acquisition": ({"optimizer": {"acquisition": "PI"}}, "spec.optimizer.acquisition", "EI"),
    "negative seed": ({"optimizer": {"seed": -1}}, "spec.optimizer.seed", "at least 0"),
    "seed beyond int64": ({"optimizer": {"seed": 2**63}}, "spec.optimizer.seed", "integer"),
    "patience 0": ({"optimizer": {"patience": 0}}, "spec.optimizer.patience", "from 1"),
    "timeout as number": ({"optimizer": {"timeout": 60}}, "spec.optimizer.timeout", "duration"),
    "timeout 0s": ({"optimizer": {"timeout": "0s"}}, "spec.optimizer.timeout", "positive"),
    "timeout in days": ({"optimizer": {"timeout": "1d"}}, "spec.optimizer.timeout", "duration"),
    "long timeout": (
        {"optimizer": {"timeout": "1h" * 17}},
        "spec.optimizer.timeout",
        "32 characters",
    ),
    "no steps to spend": ({"budget": {"maxSteps": 0}}, "spec.budget.maxSteps", "at least 1"),
    "seconds as float": (
        {"budget": {"maxGPUSeconds": 1.5}},
        "spec.budget.maxGPUSeconds",
        "integer",
    ),
    "three centuries": (
        {"budget": {"maxWallclock": "2600000h"}},
        "spec.budget.maxWallclock",
        "positive duration",
    ),
    "less than a nanosecond": (
        {"budget": {"maxWallclock": "0.5ns"}},
        "spec.budget.maxWallclock",
        "positive duration",
    ),
    "wallclock as number": (
        {"budget": {"maxWallclock": 3600}},
        "spec.budget.maxWallclock",
        "such as 4h30m",
    ),
    "two devices": ({"trainer": {"devices": 2}}, "spec.trainer.devices", "trainer.custom"),
    "65 devices": (
        {"trainer": {"custom": True, "devices": 65}},
        "spec.trainer.devices",
        "from 1 to 64",
    ),
    "two GPUs in the template": (
        template(resources={"limits": {"nvidia.com/gpu": "2"}}),
        "spec.template.spec.containers[trainer].resources",
        "2 devices",
    ),
    "two MIG slices": (
        template(resources={"limits": {"nvidia.com/mig-1g.10gb": 1, "nvidia.com/mig-2g.20gb": 1}}),
        "spec.template.spec.containers[trainer].resources",
        "2 devices",
    ),
    "two AMD GPUs requested": (
        template(resources={"requests": {"amd.com/gpu": 2}}),
        "spec.template.spec.containers[trainer].resources",
        "2 devices",
    ),
    "fetch": ({"weights": {"fetch": "Always"}}, "spec.weights.fetch", "Auto, Never"),
    "no checkpoint claim": ({"checkpoint": {}}, "spec.checkpoint", "exactly one of"),
    "two checkpoint claims": (
        checkpoint(volumeClaimTemplate=RWO),
        "spec.checkpoint",
        "exactly one of",
    ),
    "scope without template": (
        checkpoint(scope="Config"),
        "spec.checkpoint.scope",
        "needs volumeClaimTemplate",
    ),
    "one pod, two Jobs": (
        {"checkpoint": {"volumeClaimTemplate": RWOP}, "parallelism": 2},
        "spec.parallelism",
        "parallelism 1 only",
    ),
    "no access mode": (
        {"checkpoint": {"volumeClaimTemplate": {"resources": {}}}},
        "spec.checkpoint.volumeClaimTemplate.accessModes",
        "required",
    ),
    "access mode": (
        {"checkpoint": {"volumeClaimTemplate": {**RWO, "accessModes": ["ReadOnlyMany"]}}},
        "spec.checkpoint.volumeClaimTemplate.accessModes[0]",
        "ReadWriteMany",
    ),
    "amount of storage": (
        {
            "checkpoint": {
                "volumeClaimTemplate": {**RWO, "resources": {"requests": {"storage": "200 Gi"}}}
            }
        },
        "spec.checkpoint.volumeClaimTemplate.resources.requests.storage",
        "such as 200Gi",
    ),
    "no resources": (
        {"checkpoint": {"volumeClaimTemplate": {"accessModes": ["ReadWriteOnce"]}}},
        "spec.checkpoint.volumeClaimTemplate.resources",
        "required",
    ),
    "sub-path leaves": (checkpoint(subPath="../x"), "spec.checkpoint.subPath", "inside"),
    "retention": (checkpoint(retention="Best"), "spec.checkpoint.retention", "Incumbent"),
    "top 0": (checkpoint(topK=0), "spec.checkpoint.topK", "from 1 to 100"),
    "100 retries": (
        {"failurePolicy": {"maxInfraRetriesPerStep": 100}},
        "spec.failurePolicy.maxInfraRetriesPerStep",
        "from 0 to 99",
    ),
    "on OOM": ({"failurePolicy": {"onOOM": "Retry"}}, "spec.failurePolicy.onOOM", "FailConfig"),
    "step timeout": (
        {"failurePolicy": {"stepTimeout": "-5m"}},
        "spec.failurePolicy.stepTimeout",
        "positive",
    ),
    "share as number": ({"gpuShare": 0.5}, "spec.gpuShare", "quoted share"),
    "share above 1": ({"gpuShare": "1.5"}, "spec.gpuShare", "quoted share"),
    "share of nothing": ({"gpuShare": "0.0"}, "spec.gpuShare", "more than 0"),
    "deletion policy": ({"deletionPolicy": "Keep"}, "spec.deletionPolicy", "Retain, Delete"),
    "ttl": ({"ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished", "at least 0"),
    "ttl beyond int32": (
        {"ttlSecondsAfterFinished": 2**31},
        "spec.ttlSecondsAfterFinished",
        "integer",
    ),
    "template as list": ({"template": []}, "spec.template", "mapping"),
    "template field": ({"template": {"containers": []}}, "spec.template.containers", "unknown"),
    "label as number": (
        {"template": {"metadata": {"labels": {"a": 1}}}},
        "spec.template.metadata.labels.a",
        'quote the value: "1"',
    ),
    "infinity in template": (
        {"template": {"spec": {"x": float("inf")}}},
        "spec.template.spec.x",
        "finite",
    ),
    "section as text": ({"fidelity": "50"}, "spec.fidelity", "mapping"),
    "unknown and empty": ({"weights": {"name": None}}, "spec.weights.name", "unknown field"),
    "unknown section": ({"fidelty": {"max": 5}}, "spec.fidelty", "did you mean fidelity?"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_rule_names_field_and_remedy(name: str) -> None:
    sections, field, word = REFUSED[name]

    faults = faults_of(manifest(**sections))

    assert word in faults[field]
    assert len(faults) == 1, faults


def test_the_form_of_a_fault_is_field_value_remedy() -> None:
    faults = faults_of(manifest(fidelity={"max": 50, "stepsPerJob": 60}))

    message = "spec.fidelity.stepsPerJob: 60; exceeds fidelity.max (50); use 1..50 or Auto"
    assert list(faults.values()) == [message]


def test_all_faults_are_gathered() -> None:
    """One of each kind: envelope, metadata, type, bound, rule within and between sections."""
    raw = manifest(
        dataset={"path": "/x", "autoSplit": 0.2},
        budget={},
        parallelism="4",
        objective={"metric": "acc"},
        trainer={"devices": 2},
        unknown=1,
    )
    raw |= {"kind": "Tuningrun", "metadata": {"name": "Run"}, "specs": {}}

    assert set(faults_of(raw)) == {
        "kind",
        "metadata.name",
        "specs",
        "spec.dataset.claimName",
        "spec.dataset.path",
        "spec.dataset.autoSplit",
        "spec.budget",
        "spec.parallelism",
        "spec.objective.metric",
        "spec.trainer.devices",
        "spec.unknown",
    }


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("a", True),
        ("a-1", True),
        ("x" * 40, True),
        ("x" * 41, False),
        ("1a", False),
        ("a-", False),
        ("A", False),
        ("a.b", False),
        ("", False),
        ("a\n", False),
        (None, False),
        (7, False),
    ],
)
def test_a_run_has_a_short_name_of_rfc_1035(name: object, right: bool) -> None:
    raw = {**manifest(), "metadata": {"name": name}}

    if right:
        assert parse_manifest(raw).name == name
    else:
        assert "metadata.name" in faults_of(raw)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (None, "manifest"),
        ([], "manifest"),
        ("text", "manifest"),
        ({}, "spec"),
        ({**manifest(), "spec": []}, "spec"),
        ({**manifest(), "spec": None}, "spec"),
        ({**manifest(), "metadata": None}, "metadata"),
        ({**manifest(), "metadata": {"name": "a", "labels": {"x": 1}}}, "metadata.labels.x"),
        ({**manifest(), "metadata": {"name": "a", "namespace": "A"}}, "metadata.namespace"),
        ({**manifest(), "apiVersion": "quicktune.dev/v1"}, "apiVersion"),
        ({**manifest(), "kind": None}, "kind"),
        ({**manifest(), "spec": {**manifest()["spec"], 3: 4}}, "spec.3"),
    ],
)
def test_anything_that_is_no_manifest_is_refused(raw: object, field: str) -> None:
    assert field in faults_of(raw)


def test_lint_gets_the_run_together_with_its_faults() -> None:
    run, faults = scan_manifest(manifest(parallelism=-1, **search(hub="tiny")))

    assert run is not None
    assert (run.spec.parallelism, run.spec.search.hub) == (1, "tiny")
    assert [fault.field for fault in faults] == ["spec.parallelism"]


# --- derived values ------------------------------------------------------------------------------


def test_absent_limits_are_derived_as_documented() -> None:
    assert parsed().spec.max_failed_configs == 256
    assert parsed(**search(poolSize=6)).spec.max_failed_configs == 10
    assert parsed(failurePolicy={"maxFailedConfigs": 3}).spec.max_failed_configs == 3
    assert parsed().spec.failure_policy.pending_timeout == 1800.0
    assert parsed().spec.optimizer.timeout == 60.0
    assert parsed().spec.failure_policy.step_timeout is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("4h30m", 16200.0), ("90s", 90.0), ("1.5h", 5400.0), ("100ms", 0.1), ("1m1s", 61.0)],
)
def test_durations_are_those_of_go(text: str, seconds: float) -> None:
    assert parsed(budget={"maxWallclock": text}).spec.budget.max_wallclock == seconds


def test_a_custom_metric_keeps_its_name_and_direction() -> None:
    custom = {"trainer": {"custom": True}}

    up = parsed(objective={"metric": "iou"}, **custom).spec.metric
    down = parsed(objective={"metric": "wer", "direction": "Minimize"}, **custom).spec.metric

    assert (up.name, up.maximise, up.high) == ("iou", True, 1.0)
    assert (down.name, down.maximise) == ("wer", False)
    assert parsed(objective={"metric": "log_loss"}).spec.metric.maximise is False


# --- changes under a started run -----------------------------------------------------------------

MUTABLE: dict[str, dict[str, Any]] = {
    "suspend": {"suspend": True},
    "suspendPolicy": {"suspendPolicy": "Evict"},
    "stop": {"stop": True},
    "parallelism": {"parallelism": 4},
    "more budget": {"budget": {"maxSteps": 99}},
    "other budget": {"budget": {"maxGPUSeconds": 7}},
    "stepsPerJob": {"fidelity": {"max": 50, "stepsPerJob": 2}},
    "retention": checkpoint(retention="TopK"),
    "topK": checkpoint(topK=9),
    "maxVolumes": checkpoint(maxVolumes=9),
    "failurePolicy": {"failurePolicy": {"onOOM": "RetryLarger"}},
    "queueName": {"queueName": "q"},
    "workloadPriorityClass": {"workloadPriorityClass": "high"},
    "template": template(image="x"),
    "deletionPolicy": {"deletionPolicy": "Delete"},
    "ttl": {"ttlSecondsAfterFinished": 9},
}
IMMUTABLE: dict[str, tuple[dict[str, Any], str]] = {
    "path": (dataset(path="x"), "spec.dataset.path"),
    "imageSize": (dataset(imageSize=64), "spec.dataset.imageSize"),
    "hub": (search(hub="tiny"), "spec.search.hub"),
    "models": (search(models=["a"]), "spec.search.models"),
    "overrides": (search(overrides={"amp": "true"}), "spec.search.overrides"),
    "metric": ({"objective": {"metric": "top5"}}, "spec.objective.metric"),
    "max": ({"fidelity": {"max": 51}}, "spec.fidelity.max"),
    "step": ({"fidelity": {"max": 50, "step": 2}}, "spec.fidelity.step"),
    "seed": ({"optimizer": {"seed": 1}}, "spec.optimizer.seed"),
    "trainer": ({"trainer": {"custom": True}}, "spec.trainer.custom"),
    "weights": ({"weights": {"claimName": "w"}}, "spec.weights.claimName"),
    "checkpoint path": (checkpoint(subPath="x"), "spec.checkpoint.subPath"),
    "checkpoint gone": ({"checkpoint": None}, "spec.checkpoint"),
}


@pytest.mark.parametrize("name", MUTABLE)
def test_what_may_change_leaves_the_digest_alone(name: str) -> None:
    old = parsed(**checkpoint()).raw_spec

    new = parsed(**{**checkpoint(), **MUTABLE[name]}).raw_spec

    assert new != old
    assert changed_immutable_fields(old, new) == []
    assert immutable_digest(old) == immutable_digest(new)


@pytest.mark.parametrize("name", IMMUTABLE)
def test_what_may_not_change_is_named(name: str) -> None:
    sections, field = IMMUTABLE[name]
    old = parsed(**checkpoint()).raw_spec

    new = parsed(**{**checkpoint(), **sections}).raw_spec

    assert changed_immutable_fields(old, new) == [field]
    assert immutable_digest(old) != immutable_digest(new)


def test_a_stop_cannot_be_undone() -> None:
    stopped, going = parsed(stop=True).raw_spec, parsed().raw_spec

    assert changed_immutable_fields(stopped, going) == ["spec.stop"]
    assert changed_immutable_fields(going, stopped) == []


def test_a_default_written_out_is_no_change() -> None:
    old = parsed().raw_spec

    new = parsed(**search(poolSize=512), fidelity={"max": 50, "step": 1}).raw_spec

    assert changed_immutable_fields(old, new) == []


# --- advice and notes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"optimizer": {"acquisition": "UCB"}}, "spec.optimizer.acquisition"),
        ({"optimizer": {"initRandom": 3}}, "spec.optimizer.initRandom"),
        ({"optimizer": {"refit": "Never"}}, "spec.optimizer.refit"),
        (
            {"optimizer": {"algorithm": "ASHA", "costAware": True}},
            "spec.optimizer.costAware",
        ),
        (
            {"optimizer": {"costAware": False, "costFactor": "0.5"}},
            "spec.optimizer.costFactor",
        ),
        (
            {"optimizer": {"algorithm": "Random"}, **search(portfolio="mini")},
            "spec.search.portfolio",
        ),
        (search(hub="tiny", hubRef={"name": "x"}), "spec.search.hub"),
        (dataset(autoSplit="0.1", valSplit="v"), "spec.dataset.valSplit"),
        (dataset(testSplit="val"), "spec.dataset.testSplit"),
        (checkpoint(topK=2), "spec.checkpoint.topK"),
        (checkpoint(maxVolumes=2), "spec.checkpoint.maxVolumes"),
        ({"parallelism": 0}, "spec.parallelism"),
        ({"parallelism": 11, **checkpoint()}, "spec.budget.maxSteps"),
        ({"parallelism": 5}, "spec.parallelism"),
        ({"budget": {"maxGPUSeconds": 5}}, "spec.budget.maxGPUSeconds"),
        ({"budget": {"maxWallclock": "1000h"}}, "spec.budget.maxWallclock"),
        ({"fidelity": {"max": 5, "step": 10}}, "spec.fidelity.step"),
        ({"dataset": {"claimName": "My_Data"}}, "spec.dataset.claimName"),
        (
            {"template": {"spec": {"containers": [{"name": "log"}]}}},
            "spec.template.spec.containers",
        ),
        ({"template": {"spec": {"hostNetwork": True}}}, "spec.template.spec.hostNetwork"),
    ],
)
def test_what_is_probably_not_meant_is_advised_against(
    sections: dict[str, Any], field: str
) -> None:
    assert [fault.field for fault in check_spec(parsed(**sections))] == [field]


@pytest.mark.parametrize(
    ("fields", "advised"),
    [
        ({"maxVolumes": 1}, True),
        ({"maxVolumes": 2}, False),
        ({"maxVolumes": 4, "retention": "TopK", "topK": 4}, True),
        ({"maxVolumes": 5, "retention": "TopK", "topK": 4}, False),
        ({"maxVolumes": 99, "retention": "All"}, True),
        ({"maxVolumes": 1, "retention": "None"}, False),
        ({"retention": "All"}, False),
    ],
)
def test_volumes_that_retention_takes_for_itself_are_advised_against(
    fields: dict[str, Any], advised: bool
) -> None:
    template = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    run = parsed(checkpoint={"volumeClaimTemplate": template, "scope": "Config", **fields})

    assert [f.field for f in check_spec(run)] == ["spec.checkpoint.maxVolumes"] * advised


def test_a_plain_manifest_needs_no_advice() -> None:
    acquisition = {"optimizer": {"algorithm": "QuickTunePaper", "acquisition": "UCB"}}

    assert check_spec(parsed()) == []
    assert check_spec(parsed(**acquisition)) == []


def test_fields_that_act_on_a_cluster_only_are_listed_when_the_manifest_sets_them() -> None:
    raw = manifest(
        queueName="q",
        workloadPriorityClass="p",
        suspendPolicy="Drain",
        deletionPolicy="Delete",
        ttlSecondsAfterFinished=3,
        failurePolicy={"pendingTimeout": "1h", "stepTimeout": "5m"},
        gpuShare="0.5",
        **checkpoint(retention="All"),
        **template(image="x"),
    )
    raw["metadata"]["namespace"] = "vision"

    assert cluster_only_fields(parse_manifest(raw)) == [
        "metadata.namespace",
        "spec.suspendPolicy",
        "spec.checkpoint.claimName",
        "spec.failurePolicy.pendingTimeout",
        "spec.queueName",
        "spec.workloadPriorityClass",
        "spec.template",
        "spec.deletionPolicy",
        "spec.ttlSecondsAfterFinished",
    ]
    assert cluster_only_fields(parsed()) == []


@pytest.mark.parametrize("module", ["qtt_core.spec", "qtt_core.hub"])
def test_light_modules_load_no_heavy_library(module: str, root: Path) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'ConfigSpace', 'scipy', 'numpy', 'torch', 'gpytorch', 'sklearn', 'timm'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr

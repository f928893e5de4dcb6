"""Rules between fields of a manifest, what may change once a run has started, and advice.

`cross_rules` are the CRD's CEL expressions and the table of 30-kubernetes 1.3; `advice` is no
error. All work on parsed values, so that lint, a local run and an old API server agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qtt_core.catalogue import LEARNERS
from qtt_core.errors import Fault
from qtt_core.schema import Reach, walk
from qtt_core.spec_schema import SPEC
from qtt_core.spec_types import RunSpec, TuningRun
from qtt_core.steps import METRICS, Metric

IMMUTABLE = tuple(name for name, field in SPEC.fields.items() if field.fixed)
"""Sections that may not change at all once a run has started."""
_PARTLY_FIXED = ("fidelity", "checkpoint")

_CLUSTER_ONLY = (
    "metadata.namespace",
    *(path for path, field in walk(SPEC, "spec") if field.reach is Reach.CLUSTER),
)

_DEVICE = re.compile(
    r"nvidia\.com/(gpu|mig-.*)(\.shared)?|amd\.com/gpu|gpu\.intel\.com/.+|habana\.ai/gaudi"
    r"|google\.com/tpu|aws\.amazon\.com/neuron.*|.+/v?gpu"
)
"""Extended resources that are accelerators."""

_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


# --- rules ---------------------------------------------------------------------------------------


def cross_rules(spec: RunSpec) -> list[Fault]:
    """Faults that no single section shows."""
    return [*_metric_faults(spec), *_device_faults(spec), *_volume_faults(spec)]


def _metric_faults(spec: RunSpec) -> Iterator[Fault]:
    objective = spec.objective
    known = METRICS.get(objective.metric)
    if known is None and not spec.trainer.custom:
        remedy = f"use one of {', '.join(METRICS)} (others only with trainer.custom)"
        yield Fault("spec.objective.metric", objective.metric, remedy)
        return
    metric = known or Metric(name=objective.metric)
    if known and objective.direction and (objective.direction == "Minimize") == known.maximise:
        right = "Maximize" if known.maximise else "Minimize"
        remedy = f"contradicts metric {known.name}; use {right} or leave it out"
        yield Fault("spec.objective.direction", objective.direction, remedy)
    if objective.goal is not None and not metric.in_range(objective.goal):
        remedy = (
            f'{metric.name} lies in [{metric.low:g}, {metric.high:g}]; use a value such as "0.93"'
        )
        yield Fault("spec.objective.goal", objective.goal, remedy)


def _device_faults(spec: RunSpec) -> Iterator[Fault]:
    if spec.trainer.devices > 1 and not spec.trainer.custom:
        remedy = "more than one device a step needs trainer.custom"
        yield Fault("spec.trainer.devices", spec.trainer.devices, remedy)
    asked = devices_asked(spec.template)
    if asked > 1 and not spec.trainer.custom:
        remedy = "a step uses one device; ask for 1, or bring a trainer with trainer.custom"
        yield Fault("spec.template.spec.containers[trainer].resources", f"{asked} devices", remedy)


def devices_asked(template: Mapping[str, Any]) -> int:
    """Accelerators that the template's `trainer` container asks for; 0 when it names none."""
    most = 0
    for container in _containers(template):
        resources = container.get("resources")
        if container.get("name") == "trainer" and isinstance(resources, Mapping):
            asked = [_devices(resources.get(kind)) for kind in ("limits", "requests")]
            most = max(most, *asked)
    return most


def _containers(template: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    containers = (template.get("spec") or {}).get("containers")
    return [c for c in containers if isinstance(c, Mapping)] if isinstance(containers, list) else []


def is_device(resource: str) -> bool:
    """Whether a resource name stands for an accelerator."""
    return _DEVICE.fullmatch(resource) is not None


def _devices(quantities: object) -> int:
    """The sum over accelerator resources; what is no whole number is left to the server."""
    if not isinstance(quantities, Mapping):
        return 0
    texts = [str(q) for name, q in quantities.items() if is_device(str(name))]
    return sum(int(text) for text in texts if text.isdecimal())


def _volume_faults(spec: RunSpec) -> Iterator[Fault]:
    template = (spec.checkpoint.volume_claim_template if spec.checkpoint else None) or {}
    modes = template.get("accessModes")
    if spec.parallelism > 1 and isinstance(modes, list) and "ReadWriteOncePod" in modes:
        remedy = "ReadWriteOncePod allows parallelism 1 only"
        yield Fault("spec.parallelism", spec.parallelism, remedy)


# --- what may change -----------------------------------------------------------------------------


def immutable_part(raw_spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a normalised spec that are fixed once a run has started."""
    part = {name: raw_spec[name] for name in IMMUTABLE if name in raw_spec}
    for section in _PARTLY_FIXED:
        if section in raw_spec:
            fixed = {name for name, field in SPEC.fields[section].fields.items() if field.fixed}
            values = raw_spec[section].items()
            part[section] = {name: value for name, value in values if name in fixed}
    return part


def differences(old: object, new: object, path: str) -> Iterator[str]:
    """Paths of the leaves in which two JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            if name not in old or name not in new:
                yield f"{path}.{name}"
            else:
                yield from differences(old[name], new[name], f"{path}.{name}")
    elif old != new:
        yield path


# --- advice --------------------------------------------------------------------------------------

_TUNED = ("QuickTune", "QuickTunePaper")
_ACTS_IN: Mapping[str, tuple[str, ...]] = {
    "acquisition": ("QuickTunePaper",),
    "initRandom": ("QuickTunePaper",),
    "refit": ("QuickTunePaper",),
    "costAware": _TUNED,
    "costFactor": _TUNED,
    "patience": _TUNED,
    "tolerance": _TUNED,
}
_LONG_SECONDS = 30 * 86_400
_MANY_JOBS = 4
"""Parallel Jobs on the one node that has their volume."""


def advice(run: TuningRun) -> Iterator[Fault]:
    """What is legal and yet probably not meant."""
    for rule in _ADVICE:
        yield from rule(run)


def cluster_only(run: TuningRun) -> list[str]:
    """Paths that the manifest sets and a local run ignores."""
    return [path for path in _CLUSTER_ONLY if path in run.given]


def _without_effect(run: TuningRun) -> Iterator[Fault]:
    optimizer = run.spec.optimizer
    for name, algorithms in _ACTS_IN.items():
        path = f"spec.optimizer.{name}"
        if path in run.given and optimizer.algorithm not in (*algorithms, "External"):
            value = run.raw_spec["optimizer"][name]
            text = f"has no effect with {optimizer.algorithm}; it acts in {', '.join(algorithms)}"
            yield Fault(path, value, text)
    if optimizer.cost_factor is not None and not optimizer.cost_aware:
        yield Fault("spec.optimizer.costFactor", optimizer.cost_factor, "needs costAware: true")
    if "spec.search.portfolio" in run.given and optimizer.algorithm not in LEARNERS:
        text = f"has no effect with {optimizer.algorithm}"
        yield Fault("spec.search.portfolio", run.spec.search.portfolio, text)
    if {"spec.search.hub", "spec.search.hubRef"} <= run.given:
        yield Fault("spec.search.hub", run.spec.search.hub, "hubRef takes its place")


def _splits(run: TuningRun) -> Iterator[Fault]:
    dataset = run.spec.dataset
    if dataset.auto_split is not None and "spec.dataset.valSplit" in run.given:
        text = "is not read: autoSplit takes the validation images from train"
        yield Fault("spec.dataset.valSplit", dataset.val_split, text)
    if dataset.test_split in {dataset.train_split, dataset.val_split}:
        text = "is used in the search: a test score on it says nothing about new images"
        yield Fault("spec.dataset.testSplit", dataset.test_split, text)


def _kept(run: TuningRun) -> Iterator[Fault]:
    checkpoint = run.spec.checkpoint
    if checkpoint is None:
        return
    if "spec.checkpoint.topK" in run.given and checkpoint.retention != "TopK":
        yield Fault("spec.checkpoint.topK", checkpoint.top_k, "acts with retention TopK only")
    if checkpoint.max_volumes is not None and checkpoint.scope != "Config":
        yield Fault(
            "spec.checkpoint.maxVolumes", checkpoint.max_volumes, "acts with scope Config only"
        )
    elif checkpoint.max_volumes is not None:
        spared = {"Incumbent": 1, "TopK": checkpoint.top_k, "None": 0}.get(checkpoint.retention)
        if spared is None or checkpoint.max_volumes <= spared:
            kept = "every volume" if spared is None else f"{spared}"
            text = f"retention keeps {kept}: none is left for configurations after them"
            yield Fault("spec.checkpoint.maxVolumes", checkpoint.max_volumes, text)


def _one_node(run: TuningRun) -> Iterator[Fault]:
    """One ReadWriteOnce claim holds all Jobs on one node; the install's default is such a claim."""
    checkpoint, parallelism = run.spec.checkpoint, run.spec.parallelism
    if parallelism <= _MANY_JOBS or (checkpoint is not None and checkpoint.claim_name):
        return
    template = (checkpoint.volume_claim_template if checkpoint is not None else None) or {}
    shared = "ReadWriteMany" in template.get("accessModes", ())
    if not shared and (checkpoint is None or checkpoint.scope != "Config"):
        text = "all Jobs run on one node, with their volume; use ReadWriteMany or scope Config"
        yield Fault("spec.parallelism", parallelism, text)


def _amounts(run: TuningRun) -> Iterator[Fault]:
    spec = run.spec
    if spec.parallelism == 0:
        yield Fault("spec.parallelism", 0, "nothing runs until it is raised")
    budget = spec.budget
    for name, value in (
        ("maxGPUSeconds", budget.max_gpu_seconds),
        ("maxWallclock", budget.max_wallclock),
    ):
        if value is not None and value < 60:
            yield Fault(f"spec.budget.{name}", f"{value:g} s", "may end before the first result")
        if value is not None and value > _LONG_SECONDS * max(1, spec.parallelism):
            yield Fault(f"spec.budget.{name}", f"{value:g} s", "is longer than 30 days")
    if budget.max_steps is not None and budget.max_steps < spec.parallelism:
        text = f"fewer steps than parallel Jobs ({spec.parallelism}): some never start"
        yield Fault("spec.budget.maxSteps", budget.max_steps, text)
    if spec.fidelity.step > spec.fidelity.max:
        text = f"exceeds fidelity.max ({spec.fidelity.max}): every configuration is one short step"
        yield Fault("spec.fidelity.step", spec.fidelity.step, text)


def _names(run: TuningRun) -> Iterator[Fault]:
    claims = {
        "spec.dataset.claimName": run.spec.dataset.claim_name,
        "spec.weights.claimName": run.spec.weights.claim_name,
        "spec.checkpoint.claimName": run.spec.checkpoint and run.spec.checkpoint.claim_name,
    }
    for path, name in claims.items():
        if name and not _DNS_NAME.fullmatch(name):
            yield Fault(
                path, name, "no claim on a cluster can have this name (lower case, digits, -)"
            )


def _template(run: TuningRun) -> Iterator[Fault]:
    template = run.spec.template
    pod = template.get("spec") or {}
    extra = [c.get("name") for c in _containers(template) if c.get("name") != "trainer"]
    if extra:
        text = (
            "a second container keeps the pod alive; use initContainers with restartPolicy: Always"
        )
        yield Fault("spec.template.spec.containers", extra, text)
    for name in ("hostNetwork", "hostPID", "hostIPC", "serviceAccountName"):
        if pod.get(name):
            yield Fault(
                f"spec.template.spec.{name}", pod[name], "is refused unless the chart allows it"
            )


_ADVICE: tuple[Callable[[TuningRun], Iterator[Fault]], ...] = (
    _without_effect,
    _splits,
    _kept,
    _one_node,
    _amounts,
    _names,
    _template,
)

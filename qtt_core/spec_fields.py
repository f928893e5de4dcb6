"""Reads `spec` of a manifest into its types, by the table of `spec_schema`, and judges sections.

Every fault is noted and something usable returned, so that one pass finds them all. Rules between
sections live in `spec_rules`; nothing here touches files, hubs or spaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtt_core.errors import ABSENT
from qtt_core.fields import Fields
from qtt_core.schema import Field, read_section
from qtt_core.spec_schema import SPEC
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
    Weights,
)
from qtt_core.steps import MAX_JOB_EPOCHS

Values = Mapping[str, Any]


def read_spec(fields: Fields) -> RunSpec:
    """All sections of a defaulted spec; faults are noted in `fields`."""
    values = _Values(read_section(fields, SPEC), SPEC)
    return RunSpec(
        suspend=values["suspend"],
        suspend_policy=values["suspendPolicy"],
        stop=values["stop"],
        parallelism=values["parallelism"],
        dataset=_dataset(fields.inner("dataset"), values.section("dataset")),
        search=_search(fields.inner("search"), values.section("search")),
        objective=_objective(values.section("objective")),
        fidelity=_fidelity(fields.inner("fidelity"), values.section("fidelity")),
        optimizer=_optimizer(fields.inner("optimizer"), values.section("optimizer")),
        budget=_budget(fields.inner("budget"), values.section("budget")),
        trainer=_trainer(values.section("trainer")),
        weights=_weights(values.section("weights")),
        checkpoint=_checkpoint(fields.inner("checkpoint"), values.section("checkpoint"))
        if fields.has("checkpoint")
        else None,
        failure_policy=_failure_policy(values.section("failurePolicy")),
        gpu_share=float(values["gpuShare"]),
        queue_name=values["queueName"],
        workload_priority_class=values["workloadPriorityClass"],
        template=_template(fields.inner("template")),
        deletion_policy=values["deletionPolicy"],
        ttl_seconds_after_finished=values["ttlSecondsAfterFinished"],
    )


class _Values:
    """What was read of a section, with the table's defaults where a value is missing or faulty."""

    def __init__(self, values: Values | None, whole: Field) -> None:
        self._values = values or {}
        self._whole = whole

    def __getitem__(self, name: str) -> Any:
        value = self._values.get(name)
        return self._whole.fields[name].default if value is None else value

    def section(self, name: str) -> _Values:
        """A section inside, an empty one where there is none."""
        return _Values(self._values.get(name), self._whole.fields[name])


def _dataset(fields: Fields, values: _Values) -> Dataset:
    dataset = Dataset(
        claim_name=values["claimName"] or "",
        path=values["path"],
        format=values["format"],
        train_split=values["trainSplit"],
        val_split=values["valSplit"],
        test_split=values["testSplit"],
        auto_split=values["autoSplit"],
        num_classes=values["numClasses"],
        image_size=values["imageSize"],
        in_channels=values["inChannels"],
        metafeatures=values["metaFeatures"] or {},
    )
    if dataset.auto_split is not None and not 0 < dataset.auto_split < 1:
        fields.fault("autoSplit", fields.raw("autoSplit"), "autoSplit lies between 0 and 1")
    if dataset.auto_split is None and dataset.train_split == dataset.val_split:
        remedy = "equals trainSplit: nothing is ever validated on training images; use autoSplit"
        fields.fault("valSplit", dataset.val_split, remedy)
    return dataset


def _search(fields: Fields, values: _Values) -> Search:
    limits = values.section("modelLimits")
    chosen = {name: fields.raw(name) for name in ("space", "configSpaceRef") if fields.has(name)}
    if not chosen:
        fields.fault("space", ABSENT, "required; use space: native, or configSpaceRef")
    elif len(chosen) == 2:
        remedy = "set exactly one of space and configSpaceRef, such as space: native"
        fields.fault("", chosen, remedy)
    return Search(
        space=values["space"],
        config_space_ref=_reference(fields, values, "configSpaceRef"),
        portfolio=values["portfolio"],
        hub=values["hub"],
        hub_ref=_reference(fields, values, "hubRef"),
        models=values["models"] or (),
        model_limits=ModelLimits(
            max_params=limits["maxParams"],
            max_gmacs=limits["maxGMACs"],
            licences=limits["licences"] or (),
        ),
        pool_size=values["poolSize"],
        initial_configs=values["initialConfigs"] or (),
        overrides=values["overrides"] or {},
    )


def _reference(fields: Fields, values: _Values, name: str) -> Reference | None:
    if not fields.has(name):
        return None
    reference = values.section(name)
    return Reference(name=reference["name"] or "", key=reference["key"])


def _objective(values: _Values) -> Objective:
    return Objective(
        metric=values["metric"],
        direction=values["direction"],
        goal=values["goal"],
        min_gain_per_gpu_hour=values["minGainPerGPUHour"],
    )


def _fidelity(fields: Fields, values: _Values) -> Fidelity:
    longest, step = values["max"] or Fidelity().max, values["step"]
    return Fidelity(max=longest, step=step, steps_per_job=_steps_per_job(fields, longest, step))


def _steps_per_job(fields: Fields, longest: int, step: int) -> int | None:
    value = fields.raw("stepsPerJob")
    if value is None or value == "Auto":
        return None
    most = min(longest, MAX_JOB_EPOCHS) // step
    use = f"use 1..{most} or Auto" if most else "use Auto"
    if isinstance(value, bool) or not isinstance(value, int):
        fields.fault("stepsPerJob", value, f"is neither an integer nor Auto; {use}")
    elif value < 1:
        fields.fault("stepsPerJob", value, f"is not positive; {use}")
    elif value > most:
        product = "" if step == 1 else f"x step {step} = {value * step} "
        bound = f"fidelity.max ({longest})" if longest < MAX_JOB_EPOCHS else "150 epochs a Job"
        fields.fault("stepsPerJob", value, f"{product}exceeds {bound}; {use}")
    else:
        return value
    return None


def _optimizer(fields: Fields, values: _Values) -> Optimizer:
    if (fields.raw("algorithm") == "External") != fields.has("name"):
        remedy = "set name exactly when algorithm is External"
        fields.fault("name", fields.raw("name") or ABSENT, remedy)
    return Optimizer(
        algorithm=values["algorithm"],
        name=values["name"],
        acquisition=values["acquisition"],
        cost_aware=values["costAware"],
        cost_factor=values["costFactor"],
        init_random=values["initRandom"],
        patience=values["patience"],
        tolerance=values["tolerance"],
        refit=values["refit"],
        seed=values["seed"],
        timeout=values["timeout"] or Optimizer().timeout,
    )


def _budget(fields: Fields, values: _Values) -> Budget:
    if not any(fields.has(name) for name in ("maxSteps", "maxGPUSeconds", "maxWallclock")):
        fields.fault("", ABSENT, "set at least one of maxSteps, maxGPUSeconds and maxWallclock")
    seconds = values["maxGPUSeconds"]
    return Budget(
        max_steps=values["maxSteps"],
        max_gpu_seconds=None if seconds is None else float(seconds),
        max_wallclock=values["maxWallclock"],
    )


def _trainer(values: _Values) -> Trainer:
    return Trainer(custom=values["custom"], devices=values["devices"])


def _weights(values: _Values) -> Weights:
    return Weights(claim_name=values["claimName"], fetch=values["fetch"])


def _checkpoint(fields: Fields, values: _Values) -> Checkpoint:
    checkpoint = Checkpoint(
        claim_name=values["claimName"],
        sub_path=values["subPath"],
        volume_claim_template=_mapping(fields.raw("volumeClaimTemplate")),
        scope=values["scope"],
        max_volumes=values["maxVolumes"],
        retention=values["retention"],
        top_k=values["topK"],
    )
    if fields.has("claimName") == fields.has("volumeClaimTemplate"):
        remedy = "set exactly one of claimName and volumeClaimTemplate"
        fields.fault("", checkpoint.claim_name or ABSENT, remedy)
    if checkpoint.scope == "Config" and not fields.has("volumeClaimTemplate"):
        fields.fault("scope", "Config", "scope Config needs volumeClaimTemplate")
    return checkpoint


def _failure_policy(values: _Values) -> FailurePolicy:
    return FailurePolicy(
        max_app_failures_per_config=values["maxAppFailuresPerConfig"],
        max_infra_retries_per_step=values["maxInfraRetriesPerStep"],
        max_failed_configs=values["maxFailedConfigs"],
        on_oom=values["onOOM"],
        step_timeout=values["stepTimeout"],
        pending_timeout=values["pendingTimeout"] or FailurePolicy().pending_timeout,
    )


def _template(fields: Fields) -> Mapping[str, Any]:
    """`metadata` and `spec` as they came: the rendered Pod is dry-run on the server."""
    parts = {name: fields.raw(name) for name in ("metadata", "spec")}
    return {name: part for name, part in parts.items() if isinstance(part, Mapping)}


def _mapping(value: object) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None

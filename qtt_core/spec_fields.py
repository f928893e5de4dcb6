"""Reads `spec` of a manifest section by section: types, bounds and defaults of the CRD's schema.

Every reader notes its faults and returns something usable, so that one pass finds them all. Rules
between fields live in `spec_rules`; nothing here touches files, hubs or spaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from qtt_core.errors import ABSENT
from qtt_core.fields import Fields
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

INT32, INT64 = 2**31 - 1, 2**63 - 1

ALGORITHMS = (
    "QuickTune",
    "QuickTunePaper",
    "ASHA",
    "SuccessiveHalving",
    "FreezeThawRandom",
    "Portfolio",
    "Random",
    "External",
)
FORMATS = ("ImageFolder", "CSV", "WebDataset", "Parquet")
ACCESS_MODES = ("ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod")


def read_spec(fields: Fields) -> RunSpec:
    """All sections of a defaulted spec; faults are noted in `fields`."""
    spec = RunSpec(
        suspend=fields.boolean("suspend"),
        suspend_policy=fields.text("suspendPolicy", "Drain", choices=("Drain", "Evict")),
        stop=fields.boolean("stop"),
        parallelism=fields.integer("parallelism", 1, low=0, high=512),
        dataset=_dataset(fields.child("dataset", required=True)),
        search=_search(fields.child("search")),
        objective=_objective(fields.child("objective")),
        fidelity=_fidelity(fields.child("fidelity")),
        optimizer=_optimizer(fields.child("optimizer")),
        budget=_budget(fields.child("budget", required=True)),
        trainer=_trainer(fields.child("trainer")),
        weights=_weights(fields.child("weights")),
        checkpoint=_checkpoint(fields.child("checkpoint")) if fields.has("checkpoint") else None,
        failure_policy=_failure_policy(fields.child("failurePolicy")),
        gpu_share=_gpu_share(fields),
        queue_name=fields.optional_text("queueName"),
        workload_priority_class=fields.optional_text("workloadPriorityClass"),
        template=_template(fields.child("template")),
        deletion_policy=fields.text("deletionPolicy", "Retain", choices=("Retain", "Delete")),
        ttl_seconds_after_finished=fields.optional_integer(
            "ttlSecondsAfterFinished", low=0, high=INT32
        ),
    )
    fields.raw("checkpoint")
    fields.refuse_unknown()
    return spec


def _name(fields: Fields, name: str, *, longest: int = 253, required: bool = False) -> str:
    hint = f"use 1 to {longest} characters"
    return fields.text(
        name, required=required, pattern=r"(?s).+", longest=longest, hint=hint if longest else ""
    )


def _optional_name(fields: Fields, name: str, *, longest: int = 253) -> str | None:
    value = _name(fields, name, longest=longest)
    return value or None


def _claim(fields: Fields, name: str = "claimName", *, required: bool = False) -> str:
    """A claim is also a folder beside the manifest: its name must not lead elsewhere."""
    claim = _name(fields, name, required=required)
    if "/" in claim or claim in {".", ".."} or "\0" in claim:
        fields.fault(name, claim, "use the name of a claim, not a path; folders go into path")
    return claim


def _below(fields: Fields, name: str, default: str, *, longest: int, least: int = 0) -> str:
    """A relative path that stays where it starts."""
    value = fields.text(name, default, longest=longest)
    path = PurePosixPath(value)
    if len(value) < least:
        fields.fault(name, value, f"use 1 to {longest} characters")
    elif path.is_absolute() or ".." in path.parts or "\0" in value:
        fields.fault(name, value, "use a relative path that stays inside the claim")
    return value


def _dataset(fields: Fields) -> Dataset:
    dataset = Dataset(
        claim_name=_claim(fields, required=True),
        path=_below(fields, "path", "", longest=512),
        format=fields.text("format", "ImageFolder", choices=FORMATS),
        train_split=_below(fields, "trainSplit", "train", longest=64, least=1),
        val_split=_below(fields, "valSplit", "val", longest=64, least=1),
        test_split=_below(fields, "testSplit", "test", longest=64, least=1),
        auto_split=fields.decimal("autoSplit"),
        num_classes=fields.optional_integer("numClasses", low=2, high=100_000),
        image_size=fields.optional_integer("imageSize", low=16, high=1024),
        in_channels=fields.integer("inChannels", 3, low=1, high=64),
        metafeatures=_decimals(fields, "metaFeatures"),
    )
    fields.refuse_unknown()
    if dataset.auto_split is not None and not 0 < dataset.auto_split < 1:
        fields.fault("autoSplit", fields.raw("autoSplit"), "autoSplit lies between 0 and 1")
    if dataset.auto_split is None and dataset.train_split == dataset.val_split:
        remedy = "equals trainSplit: nothing is ever validated on training images; use autoSplit"
        fields.fault("valSplit", dataset.val_split, remedy)
    return dataset


def _decimals(fields: Fields, name: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for key, value in fields.mapping(name).items():
        number = Fields({key: value}, fields.at(name), fields.faults).decimal(key)
        if number is not None:
            values[key] = number
    return values


def _search(fields: Fields) -> Search:
    search = Search(
        space=_optional_name(fields, "space", longest=63),
        config_space_ref=_reference(fields, "configSpaceRef"),
        portfolio=_name(fields, "portfolio", longest=63),
        hub=_name(fields, "hub", longest=63),
        hub_ref=_reference(fields, "hubRef"),
        models=_unique_texts(fields, "models", count=256, longest=128),
        model_limits=_model_limits(fields.child("modelLimits")),
        pool_size=fields.integer("poolSize", 512, low=1, high=100_000),
        initial_configs=tuple(
            _settings(fields, f"initialConfigs[{i}]", item)
            for i, item in enumerate(fields.items("initialConfigs", longest=32))
        ),
        overrides=_settings(fields, "overrides", fields.raw("overrides")),
    )
    fields.refuse_unknown()
    if fields.has("space") == fields.has("configSpaceRef"):
        given = {name: fields.raw(name) for name in ("space", "configSpaceRef") if fields.has(name)}
        remedy = "set exactly one of space and configSpaceRef, such as space: native"
        fields.fault("", given or ABSENT, remedy)
    return search


def _reference(fields: Fields, name: str) -> Reference | None:
    if not fields.has(name):
        fields.raw(name)
        return None
    child = fields.child(name)
    reference = Reference(
        name=_claim(child, "name", required=True), key=_claim(child, "key", required=True)
    )
    child.refuse_unknown()
    return reference


def _settings(fields: Fields, name: str, raw: object) -> dict[str, str]:
    """Name -> quoted value: of an initial configuration or of the overrides."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        fields.fault(name, raw, "use a mapping of names to quoted values")
        return {}
    if len(raw) > 64:
        fields.fault(name, f"{len(raw)} entries", "use at most 64")
    settings: dict[str, str] = {}
    for key, value in raw.items():
        if not isinstance(key, str):
            fields.fault(f"{name}.{key}", key, "quote the name")
        elif not isinstance(value, str):
            quoted = str(value).lower() if isinstance(value, bool) else value
            fields.fault(f"{name}.{key}", value, f'quote the value: "{quoted}"')
        elif len(value) > 128:
            fields.fault(f"{name}.{key}", value, "use at most 128 characters")
        else:
            settings[key] = value
    return settings


def _unique_texts(fields: Fields, name: str, *, count: int, longest: int) -> tuple[str, ...]:
    texts: list[str] = []
    for i, item in enumerate(fields.items(name, longest=count)):
        if not isinstance(item, str) or not 1 <= len(item) <= longest:
            fields.fault(f"{name}[{i}]", item, f"use a string of 1 to {longest} characters")
        elif item in texts:
            fields.fault(f"{name}[{i}]", item, "stands twice; name each once")
        else:
            texts.append(item)
    return tuple(texts)


def _model_limits(fields: Fields) -> ModelLimits:
    limits = ModelLimits(
        max_params=fields.optional_integer("maxParams", low=1, high=INT64),
        max_gmacs=fields.decimal("maxGMACs"),
        licences=_unique_texts(fields, "licences", count=32, longest=64),
    )
    fields.refuse_unknown()
    return limits


def _objective(fields: Fields) -> Objective:
    objective = Objective(
        metric=_name(fields, "metric", longest=63),
        direction=fields.optional_text("direction", choices=("Maximize", "Minimize")) or None,
        goal=fields.decimal("goal"),
        min_gain_per_gpu_hour=fields.decimal("minGainPerGPUHour"),
    )
    fields.refuse_unknown()
    return objective


def _fidelity(fields: Fields) -> Fidelity:
    longest = fields.integer("max", 50, low=1, high=1000, required=True)
    step = fields.integer("step", 1, low=1, high=MAX_JOB_EPOCHS)
    fidelity = Fidelity(max=longest, step=step, steps_per_job=_steps_per_job(fields, longest, step))
    fields.refuse_unknown()
    return fidelity


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


def _optimizer(fields: Fields) -> Optimizer:
    optimizer = Optimizer(
        algorithm=fields.text("algorithm", "QuickTune", choices=ALGORITHMS),
        name=_optional_name(fields, "name", longest=63),
        acquisition=fields.text("acquisition", "EI", choices=("EI", "UCB", "Thompson", "Exploit")),
        cost_aware=fields.boolean("costAware", True),
        cost_factor=fields.decimal("costFactor"),
        init_random=fields.optional_integer("initRandom", low=0, high=10_000),
        patience=fields.optional_integer("patience", low=1, high=1000),
        tolerance=fields.decimal("tolerance"),
        refit=fields.text("refit", "Auto", choices=("Always", "Never", "Auto")),
        seed=fields.optional_integer("seed", low=0, high=INT64),
        timeout=_duration(fields, "timeout") or 60.0,
    )
    fields.refuse_unknown()
    if (fields.raw("algorithm") == "External") != fields.has("name"):
        remedy = "set name exactly when algorithm is External"
        fields.fault("name", fields.raw("name") or ABSENT, remedy)
    return optimizer


def _duration(fields: Fields, name: str) -> float | None:
    value = fields.raw(name)
    if isinstance(value, str) and len(value) > 32:
        fields.fault(name, value, "use at most 32 characters")
        return None
    return fields.duration(name)


def _budget(fields: Fields) -> Budget:
    seconds = fields.optional_integer("maxGPUSeconds", low=1, high=INT64)
    budget = Budget(
        max_steps=fields.optional_integer("maxSteps", low=1, high=INT64),
        max_gpu_seconds=None if seconds is None else float(seconds),
        max_wallclock=_duration(fields, "maxWallclock"),
    )
    fields.refuse_unknown()
    if not any(fields.has(name) for name in ("maxSteps", "maxGPUSeconds", "maxWallclock")):
        fields.fault("", ABSENT, "set at least one of maxSteps, maxGPUSeconds and maxWallclock")
    return budget


def _trainer(fields: Fields) -> Trainer:
    trainer = Trainer(
        custom=fields.boolean("custom"), devices=fields.integer("devices", 1, low=1, high=64)
    )
    fields.refuse_unknown()
    return trainer


def _weights(fields: Fields) -> Weights:
    weights = Weights(
        claim_name=_claim(fields) or None,
        fetch=fields.optional_text("fetch", choices=("Auto", "Never")) or None,
    )
    fields.refuse_unknown()
    return weights


def _checkpoint(fields: Fields) -> Checkpoint:
    checkpoint = Checkpoint(
        claim_name=_claim(fields) or None,
        sub_path=_below(fields, "subPath", "", longest=512),
        volume_claim_template=_claim_template(fields),
        scope=fields.text("scope", "Run", choices=("Run", "Config")),
        max_volumes=fields.optional_integer("maxVolumes", low=1, high=10_000),
        retention=fields.text(
            "retention", "Incumbent", choices=("Incumbent", "TopK", "All", "None")
        ),
        top_k=fields.integer("topK", 3, low=1, high=100),
    )
    fields.refuse_unknown()
    if fields.has("claimName") == fields.has("volumeClaimTemplate"):
        remedy = "set exactly one of claimName and volumeClaimTemplate"
        fields.fault("", checkpoint.claim_name or ABSENT, remedy)
    if checkpoint.scope == "Config" and not fields.has("volumeClaimTemplate"):
        fields.fault("scope", "Config", "scope Config needs volumeClaimTemplate")
    return checkpoint


def _claim_template(fields: Fields) -> Mapping[str, Any] | None:
    if not fields.has("volumeClaimTemplate"):
        fields.raw("volumeClaimTemplate")
        return None
    child = fields.child("volumeClaimTemplate")
    modes = _unique_texts(child, "accessModes", count=4, longest=63)
    if not child.has("accessModes"):
        child.fault("accessModes", ABSENT, "is required")
    elif not child.raw("accessModes"):
        child.fault("accessModes", [], "name at least one")
    for mode in modes:
        if mode not in ACCESS_MODES:
            child.fault("accessModes", mode, f"use {', '.join(ACCESS_MODES)}")
    child.optional_text("storageClassName")
    resources = child.child("resources", required=True)
    for name, quantity in resources.mapping("requests", longest=4).items():
        if isinstance(quantity, bool) or not isinstance(quantity, str | int):
            resources.fault(f"requests.{name}", quantity, "use a quantity such as 200Gi")
    resources.refuse_unknown()
    child.refuse_unknown()
    raw = fields.raw("volumeClaimTemplate")
    return raw if isinstance(raw, Mapping) else {}


def _failure_policy(fields: Fields) -> FailurePolicy:
    policy = FailurePolicy(
        max_app_failures_per_config=fields.integer("maxAppFailuresPerConfig", 1, low=0, high=100),
        max_infra_retries_per_step=fields.integer("maxInfraRetriesPerStep", 6, low=0, high=99),
        max_failed_configs=fields.optional_integer("maxFailedConfigs", low=1, high=INT64),
        on_oom=fields.text("onOOM", "FailConfig", choices=("FailConfig", "RetryLarger")),
        step_timeout=_duration(fields, "stepTimeout"),
        pending_timeout=_duration(fields, "pendingTimeout") or 1800.0,
    )
    fields.refuse_unknown()
    return policy


def _gpu_share(fields: Fields) -> float:
    hint = 'use a quoted share such as "1" or "0.5"'
    text = fields.text("gpuShare", "1", pattern=r"1|0?\.[0-9]+", longest=8, hint=hint)
    if float(text) <= 0:
        fields.fault("gpuShare", text, "use more than 0: seconds are charged times the share")
        return 1.0
    return float(text)


def _template(fields: Fields) -> Mapping[str, Any]:
    """`template.spec` has no schema here (the Pod is dry-run on the server); labels are strings."""
    metadata = fields.child("metadata")
    for name in ("labels", "annotations"):
        for key, value in metadata.mapping(name).items():
            if not isinstance(value, str) or len(value) > 1024:
                metadata.fault(f"{name}.{key}", value, "use a string of at most 1024 characters")
    metadata.refuse_unknown()
    fields.child("spec")
    fields.refuse_unknown()
    parts = {name: fields.raw(name) for name in ("metadata", "spec")}
    return {name: part for name, part in parts.items() if isinstance(part, Mapping)}

"""The types of a TuningRun: `spec` of the manifest as frozen values, defaulted.

Written by the parser (`spec_fields`), read by planner, turn, runner and reports; import them from
`qtt_core.spec`. Names follow the manifest in snake case; durations are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qtt_core.steps import METRICS, Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Where the images are and how they are split."""

    claim_name: str
    path: str = ""
    format: str = "ImageFolder"
    train_split: str = "train"
    val_split: str = "val"
    test_split: str = "test"
    auto_split: float | None = None
    num_classes: int | None = None
    image_size: int | None = None
    in_channels: int = 3
    metafeatures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """Which cards of the hub are kept."""

    max_params: int | None = None
    max_gmacs: float | None = None
    licences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A key of a ConfigMap (cluster) or a file beside the manifest (local)."""

    name: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Space, hub and pool."""

    space: str | None = "native"
    config_space_ref: Reference | None = None
    portfolio: str = "Auto"
    hub: str = "timm24"
    hub_ref: Reference | None = None
    models: tuple[str, ...] = ()
    model_limits: ModelLimits = ModelLimits()
    pool_size: int = 512
    initial_configs: tuple[Mapping[str, str], ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """`goal` and `min_gain_per_gpu_hour` are in the metric's native unit."""

    metric: str = "top1"
    direction: str | None = None
    goal: float | None = None
    min_gain_per_gpu_hour: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Epochs: T = `max`, Δ = `step`; `steps_per_job` None = Auto."""

    max: int = 50
    step: int = 1
    steps_per_job: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """Algorithm and its switches; `timeout` in seconds."""

    algorithm: str = "QuickTune"
    name: str | None = None
    acquisition: str = "EI"
    cost_aware: bool = True
    cost_factor: float | None = None
    init_random: int | None = None
    patience: int | None = None
    tolerance: float | None = None
    refit: str = "Auto"
    seed: int | None = None
    timeout: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """At least one is set; seconds of device time and of wall clock."""

    max_steps: int | None = None
    max_gpu_seconds: float | None = None
    max_wallclock: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A trainer of the user's own, and devices a step."""

    custom: bool = False
    devices: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Claim of pretrained weights; `fetch` is Auto, Never or None (the install's default)."""

    claim_name: str | None = None
    fetch: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where checkpoints live and which are kept."""

    claim_name: str | None = None
    sub_path: str = ""
    volume_claim_template: Mapping[str, Any] | None = None
    scope: str = "Run"
    max_volumes: int | None = None
    retention: str = "Incumbent"
    top_k: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy:
    """Limits of retries; durations in seconds, None = derived (30-kubernetes 1.3)."""

    max_app_failures_per_config: int = 1
    max_infra_retries_per_step: int = 6
    max_failed_configs: int | None = None
    on_oom: str = "FailConfig"
    step_timeout: float | None = None
    pending_timeout: float = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """`spec` of a TuningRun, defaulted."""

    dataset: Dataset
    budget: Budget
    suspend: bool = False
    suspend_policy: str = "Drain"
    stop: bool = False
    parallelism: int = 1
    search: Search = Search()
    objective: Objective = Objective()
    fidelity: Fidelity = Fidelity()
    optimizer: Optimizer = Optimizer()
    trainer: Trainer = Trainer()
    weights: Weights = Weights()
    checkpoint: Checkpoint | None = None
    failure_policy: FailurePolicy = FailurePolicy()
    gpu_share: float = 1.0
    queue_name: str | None = None
    workload_priority_class: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    deletion_policy: str = "Retain"
    ttl_seconds_after_finished: int | None = None

    @property
    def metric(self) -> Metric:
        """The objective's metric, or one in [0, 1] for a custom trainer's own name."""
        known = METRICS.get(self.objective.metric)
        maximise = self.objective.direction != "Minimize"
        return known or Metric(name=self.objective.metric, maximise=maximise)

    @property
    def charged_devices(self) -> float:
        """Device-seconds that one second of a Job costs: devices × share (30-kubernetes 2.3)."""
        return self.trainer.devices * self.gpu_share

    @property
    def max_failed_configs(self) -> int:
        """Half of the pool, at least 10, where the manifest is silent."""
        return self.failure_policy.max_failed_configs or max(10, self.search.pool_size // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRun:
    """A parsed manifest: name, namespace, annotations, spec, and the spec as it was normalised."""

    name: str
    namespace: str
    spec: RunSpec
    raw_spec: Mapping[str, Any]
    """The spec with defaults filled in, manifest names, JSON types (what the ledger records)."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    """Dotted paths that the manifest itself sets (`spec.search.hub`), for advice and notes."""

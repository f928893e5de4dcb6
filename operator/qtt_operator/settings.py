"""What an administrator sets once per install: read from one YAML file, never from a TuningRun.

The chart renders the file; every field has a default, an unknown one is an error that names it. The
Redis password stays in a file of its own and is read at each connection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from qtt_core.errors import Fault, SpecError

REDIS_VARIABLE = "QTT_REDIS_URL"
FETCH = ("Auto", "Never")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimDefaults:
    """A claim the operator makes where a manifest names none; no class = the cluster's default."""

    accessModes: tuple[str, ...] = ("ReadWriteOnce",)  # noqa: N815  # names of the file
    size: str = "50Gi"
    storageClassName: str | None = None  # noqa: N815


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSettings:
    """Seconds and counts; `namespaces` empty = the whole cluster."""

    redis_url: str = "redis://redis:6379/0"
    redis_password_file: str = ""
    namespaces: tuple[str, ...] = ()
    lease_namespace: str = "default"
    lease_name: str = "quicktune-operator"
    lease_seconds: float = 12.0
    """A leader that died is replaced after at most this, and a little."""
    trainer_image: str = "quicktune-trainer"
    pod_defaults: Mapping[str, Any] = field(default_factory=dict)
    """A pod spec below `spec.template.spec`: node selectors, tolerations, resources."""
    allowed_service_accounts: tuple[str, ...] = ()
    allow_host_path: bool = False
    isolate_steps: bool = False
    """Make a NetworkPolicy against all traffic of steps with a run's first Job."""
    checkpoint_defaults: ClaimDefaults = ClaimDefaults()
    weights_claim: str = ""
    weights_fetch: str = "Auto"
    """Whether a `weights` Job may fetch what a claim lacks: Auto or Never."""
    weights_endpoint: str = ""
    """In the public hub's place."""
    weights_defaults: ClaimDefaults = ClaimDefaults(size="20Gi")
    optimizer_workers: int = 1
    priors_folder: str = ""
    """Holds the install's own priors, read-only; empty: there are none."""
    external_optimizers: tuple[str, ...] = ()
    """Names that `spec.optimizer.name` may give: entry points run with the operator's rights."""
    max_open_jobs: int = 256
    max_parallelism: int = 512
    """Of one run; a higher `spec.parallelism` acts as this one."""
    api_qps: float = 20.0
    api_burst: int = 40
    metrics_port: int = 8080
    """Serves /metrics, /healthz and /readyz; 0 = a free port."""
    job_ttl_seconds: int = 600
    node_lost_grace_seconds: float = 300.0
    resync_seconds: float = 300.0
    status_seconds: float = 5.0
    """At most one status write per run in this time, but for a change of a condition."""


def load_settings(path: Path | None, environ: Mapping[str, str] = os.environ) -> OperatorSettings:
    """Settings of a file over the defaults, the Redis address of the environment over both.

    Raises: SpecError with every unknown or unusable field.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8")) if path is not None else {}
    known = {item.name: item for item in fields(OperatorSettings)}
    if not isinstance(raw, Mapping):
        raise SpecError([Fault(str(path), raw, "use a mapping of settings")])
    faults = [Fault(name, raw[name], f"use {', '.join(known)}") for name in raw.keys() - known]
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name in known:
            values[name] = _value(name, value, faults)
    if faults:
        raise SpecError(faults)
    if environ.get(REDIS_VARIABLE):
        values["redis_url"] = environ[REDIS_VARIABLE]
    return OperatorSettings(**values)


_DEFAULTS = OperatorSettings()


def _value(name: str, value: Any, faults: list[Fault]) -> Any:
    default = getattr(_DEFAULTS, name)
    if isinstance(default, ClaimDefaults) and isinstance(value, Mapping):
        return _claim(name, value, default, faults)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(str(item) for item in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = Mapping if isinstance(default, Mapping) else type(default)
    if name == "weights_fetch" and value not in FETCH:
        faults.append(Fault(name, value, f"use {' or '.join(FETCH)}"))
    elif not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        faults.append(Fault(name, value, f"use a {wanted.__name__.lower()}"))
    return value


def _claim(
    name: str, raw: Mapping[str, Any], default: ClaimDefaults, faults: list[Fault]
) -> ClaimDefaults:
    known = {item.name for item in fields(ClaimDefaults)}
    faults += [Fault(f"{name}.{key}", raw[key], "is unknown") for key in raw.keys() - known]
    values = {key: value for key, value in raw.items() if key in known}
    if "accessModes" in values:
        values["accessModes"] = tuple(values["accessModes"])
    return replace(default, **values)

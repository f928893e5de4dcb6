"""The job document: everything a trainer process needs to know, as JSON (20-trainer 1).

Written by the controller (Job env or `serve` line), read by the trainer; unknown keys are errors
that name them. Paths inside are relative to the run root unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from qtt_core.errors import Fault
from qtt_core.fields import Fields, raise_faults
from qtt_core.steps import MAX_JOB_EPOCHS, METRICS, Config

SCHEMA = 1

READABLE_FORMATS = ("ImageFolder",)
READABLE_CHANNELS = (1, 3)
"""What our trainer reads of the layouts and channels that a manifest may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Data set and objective. `data` is absolute, `class_map` relative to the run's folder."""

    data: str
    train_split: str = "train"
    val_split: str = "val"
    split: str = ""
    """What `evaluate` reads instead of train and val."""
    class_map: str = "dataset.json"
    fingerprint: str = ""
    metric: str = "top1"
    format: str = "ImageFolder"
    img_size: int | None = None
    auto_split: float | None = None
    in_chans: int = 3
    num_classes: int | None = None
    loss: Mapping[str, Any] = field(default_factory=dict)
    metafeatures: Mapping[str, float] = field(default_factory=dict)
    """User-given values that override measured ones of the same name (`prepare`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Absolute folders. The run lives in `<root>/runs/<run_uid>`; `weights` may be empty."""

    root: str
    weights: str = ""
    cache: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`wall_s`: seconds after which the trainer checkpoints and exits 75 by itself."""

    wall_s: float | None = None
    micro_batch: int | None = None
    threads: int | None = None
    workers: int | None = None
    oom_kills: int = 0
    """Attempts that the host killed for memory: each halves the loader's workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """Rare permissions, all off by default. `offline`: never ask a hub for weights."""

    deterministic: bool = False
    allow_restart: bool = False
    allow_dtype_change: bool = False
    offline: bool = False
    ema: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDocument:
    """One job of the trainer; which fields matter depends on the command."""

    run_uid: str
    attempt: int
    nonce: str
    task: Task
    paths: Paths
    limits: Limits = Limits()
    flags: Flags = Flags()
    # step
    step: str = ""
    config_id: int = -1
    config: Config = field(default_factory=dict)
    space_id: str = ""
    space_sha: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)
    """The configuration's model card (`hub.ModelCard.to_json`), so that user hubs need no file."""
    fidelity_from: int = 0
    fidelity_to: int = 0
    step_epochs: int = 1
    max_fidelity: int = 0
    seed: int = 0
    device: str = "auto"
    """`auto`, `cpu`, or `cuda:N`."""
    gc: tuple[str, ...] = ()
    """Relative paths to delete (`step`, `garbage`); "." in `garbage` is the whole run."""
    # recovery
    known: Mapping[str, int] = field(default_factory=dict)
    """Config id -> newest epoch that the ledger has; `recovery` tells what lies behind it."""
    # prepare
    cards: tuple[Mapping[str, Any], ...] = ()
    # evaluate, export
    checkpoints: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document with its schema number."""
        return {"schema": SCHEMA, **asdict(self)}


def parse_job(raw: object, *, command: str) -> JobDocument:
    """Read a job document for any command of the trainer.

    Raises: SpecError with every fault: unknown keys, wrong types, paths that leave the run, epochs
    out of order, more than 150 epochs.
    """
    faults: list[Fault] = []
    top = Fields(raw, "job", faults)
    if top.integer("schema", SCHEMA) != SCHEMA:
        top.fault("schema", top.raw("schema"), f"this trainer reads schema {SCHEMA}")
    job = JobDocument(
        run_uid=top.text(
            "run_uid", required=True, pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*", longest=63
        ),
        attempt=top.integer("attempt", low=0, high=1000, required=True),
        nonce=top.text("nonce", required=True, longest=64),
        task=_task(top.child("task", required=True)),
        paths=_paths(top.child("paths", required=True)),
        limits=_limits(top.child("limits")),
        flags=_flags(top.child("flags")),
        step=top.text("step", longest=64),
        config_id=top.integer("config_id", -1, low=-1),
        config=_config(top),
        space_id=top.text("space_id", longest=63),
        space_sha=top.text("space_sha", longest=64),
        card=top.mapping("card"),
        fidelity_from=top.integer("fidelity_from", low=0),
        fidelity_to=top.integer("fidelity_to", low=0),
        step_epochs=top.integer("step_epochs", 1, low=1),
        max_fidelity=top.integer("max_fidelity", low=0),
        seed=top.integer("seed", low=0),
        device=top.text("device", "auto", pattern=r"auto|cpu|cuda(:[0-9]+)?"),
        gc=_relative(top, "gc", longest=10_000),
        known=_known(top),
        cards=tuple(c for c in top.items("cards", longest=256) if isinstance(c, Mapping)),
        checkpoints=_relative(top, "checkpoints", longest=50),
    )
    top.refuse_unknown()
    if command == "step":
        _check_step(top, job)
    if command in {"evaluate", "export"} and not job.checkpoints and not faults:
        top.fault("checkpoints", list(job.checkpoints), "name at least one checkpoint folder")
    raise_faults(faults)
    return job


def _check_step(top: Fields, job: JobDocument) -> None:
    if not job.config:
        top.fault("config", dict(job.config), "is required for a step")
    if not job.card:
        top.fault("card", dict(job.card), "is required for a step")
    if job.config_id < 0:
        top.fault("config_id", job.config_id, "is required for a step")
    if not 0 <= job.fidelity_from < job.fidelity_to <= job.max_fidelity:
        span = f"{job.fidelity_from} -> {job.fidelity_to} of {job.max_fidelity}"
        top.fault("fidelity_to", span, "must satisfy 0 <= from < to <= max_fidelity")
    elif job.fidelity_to - job.fidelity_from > MAX_JOB_EPOCHS:
        epochs = job.fidelity_to - job.fidelity_from
        top.fault("fidelity_to", f"{epochs} epochs", f"a job covers at most {MAX_JOB_EPOCHS}")


def _config(top: Fields) -> Config:
    config = top.mapping("config")
    for name, value in config.items():
        if value is not None and not isinstance(value, str | int | float | bool):
            top.fault(f"config.{name}", value, "use a JSON scalar")
    return config  # type: ignore[return-value]  # checked above


def _known(top: Fields) -> Mapping[str, int]:
    known = top.mapping("known")
    for c, epoch in known.items():
        if not c.isdecimal() or type(epoch) is not int or epoch < 0:
            top.fault(f"known.{c}", epoch, "use a config id and its newest epoch")
    return known  # type: ignore[return-value]  # checked above


def _task(fields: Fields) -> Task:
    task = Task(
        data=fields.text("data", required=True, longest=4096),
        train_split=fields.text("train_split", "train"),
        val_split=fields.text("val_split", "val"),
        split=fields.text("split"),
        class_map=fields.text("class_map", "dataset.json"),
        fingerprint=fields.text("fingerprint"),
        metric=fields.text("metric", "top1", choices=tuple(METRICS)),
        format=fields.text("format", "ImageFolder"),
        img_size=fields.optional_integer("img_size", low=16, high=1024),
        auto_split=fields.number("auto_split", low=0, high=1) if fields.has("auto_split") else None,
        in_chans=fields.integer("in_chans", 3, low=1, high=64),
        num_classes=fields.optional_integer("num_classes", low=2),
        loss=fields.mapping("loss"),
        metafeatures=fields.mapping("metafeatures"),  # type: ignore[arg-type]  # numbers by the writer
    )
    fields.raw("auto_split")
    fields.refuse_unknown()
    return task


def _paths(fields: Fields) -> Paths:
    paths = Paths(
        root=fields.text("root", required=True, longest=4096),
        weights=fields.text("weights", longest=4096),
        cache=fields.text("cache", longest=4096),
    )
    fields.refuse_unknown()
    return paths


def _limits(fields: Fields) -> Limits:
    limits = Limits(
        wall_s=fields.number("wall_s", low=0) if fields.has("wall_s") else None,
        micro_batch=fields.optional_integer("micro_batch", low=1),
        threads=fields.optional_integer("threads", low=1),
        workers=fields.optional_integer("workers", low=0),
        oom_kills=fields.integer("oom_kills", low=0),
    )
    fields.raw("wall_s")
    fields.refuse_unknown()
    return limits


def _flags(fields: Fields) -> Flags:
    flags = Flags(**{name: fields.boolean(name) for name in Flags.__slots__})
    fields.refuse_unknown()
    return flags


def _relative(fields: Fields, name: str, *, longest: int) -> tuple[str, ...]:
    """Paths that stay inside the run's folder."""
    paths = []
    for item in fields.items(name, longest=longest):
        pure = PurePosixPath(item) if isinstance(item, str) and item else None
        if pure is None or pure.is_absolute() or ".." in pure.parts:
            fields.fault(name, item, "use relative paths that stay inside the run")
        else:
            paths.append(str(pure))
    return tuple(paths)

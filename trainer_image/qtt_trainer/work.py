"""A step under way: its job, data, identity and counters, before and beside the training loop.

First half of the command `step` (20-trainer 1, positions 3 to 13); `step` itself trains and
commits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtt_core.errors import ABSENT, Fault, SpecError
from qtt_core.hub import ModelCard, parse_card
from qtt_core.jobs import JobDocument
from qtt_core.results import State
from qtt_core.steps import Config, digest
from qtt_trainer import checkpoint, layout, volume
from qtt_trainer.checkpoint import CorruptCheckpointError, Found
from qtt_trainer.context import Context
from qtt_trainer.data import EvalSet
from qtt_trainer.data_errors import DatasetChangedError
from qtt_trainer.dataset_manifest import DatasetManifest, load_manifest, quick_check
from qtt_trainer.endings import EndedError
from qtt_trainer.inert import is_on
from qtt_trainer.keys import key, key32
from qtt_trainer.layout import ConfigFolder
from qtt_trainer.loaders import EVAL_BATCH, eval_loader
from qtt_trainer.mixing import plan_targets
from qtt_trainer.model import BuildRequest, BuiltModel
from qtt_trainer.penalties import load_relationship, relationship, store_relationship
from qtt_trainer.precision import Precision, choose_precision, loader_workers, set_up_process
from qtt_trainer.prepare import describe_again
from qtt_trainer.report import Header, Progress
from qtt_trainer.session import Session, SessionRequest, assemble
from qtt_trainer.transforms import UPSTREAM_SPACES, build_transforms

REQUIRED = ("model", "opt", "lr", "batch_size")
"""Settings without a neutral value; every other one may be absent, which means off."""


@dataclass(slots=True, kw_only=True)
class Timing:
    """Seconds by purpose; `wait` is the part of `train` in which no batch was there."""

    parts: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("startup", "data", "train", "wait", "eval", "checkpoint"), 0.0
        )
    )

    def add(self, name: str, seconds: float) -> None:
        """Add to one purpose."""
        self.parts[name] += seconds


@dataclass(slots=True, kw_only=True)
class Work:
    """A step under way: what does not change, and the counters of this attempt."""

    job: JobDocument
    config: Config
    context: Context
    run: Path
    folder: ConfigFolder
    manifest: DatasetManifest
    precision: Precision
    identity: Mapping[str, Any]
    header: Header
    timing: Timing
    warnings: list[str]
    resumed: int = 0
    """Whole epochs of the checkpoint this attempt began from."""
    told: int = 0
    """Epochs of the newest *committed* checkpoint: rows behind it are newly committed."""
    began: int = 0
    """Updates of the state this attempt began from."""
    saved: int = 0
    """Updates of the newest saved state."""
    saved_at: float = 0.0
    """Monotonic time of the last save, or of the resume."""
    per_class: dict[str, Any] | None = None
    """Recall and confusion of the best epoch, where this attempt has seen it."""
    progress: Progress = field(default_factory=Progress)

    @property
    def data_root(self) -> Path:
        """The folder of the images."""
        return Path(self.job.task.data)


def prepare_work(job: JobDocument, config: Config, context: Context) -> Work:
    """Check the card and the data, choose device and format; nothing heavy yet.

    Raises: SpecError, EndedError `invalid_config`, DatasetChangedError.
    """
    card = parse_card(job.card)
    missing = [name for name in REQUIRED if config.get(name) is None]
    if missing:
        raise SpecError([Fault(f"job.config.{name}", ABSENT, "is required") for name in missing])
    if config.get("model") != card.name:
        raise EndedError(
            State.INVALID_CONFIG,
            f"job.card is {card.name!r}, but job.config.model is {config.get('model')!r}",
        )
    precision = choose_precision(job, amp=is_on(config, "amp"))
    set_up_process(job, precision.device)
    started = time.monotonic()
    run_dir = layout.run_folder(job.paths.root, job.run_uid)
    manifest = check_dataset(job, run_dir)
    timing = Timing()
    timing.add("data", time.monotonic() - started)
    return Work(
        job=job,
        config=config,
        context=context,
        run=run_dir,
        folder=layout.config_folder(run_dir, job.config_id),
        manifest=manifest,
        precision=precision,
        identity=identity_of(job, config, card, manifest, precision),
        header=header_of(job, config),
        timing=timing,
        warnings=[],
    )


def check_dataset(job: JobDocument, run_dir: Path) -> DatasetManifest:
    """The run's class map, after the quick check. Raises: DatasetChangedError.

    A volume of this configuration's own has none before its first step: it is made again there.
    """
    if job.task.fingerprint and not (run_dir / job.task.class_map).exists():
        return describe_again(job)
    manifest = load_manifest(run_dir, job.task.class_map)
    if job.task.fingerprint not in {"", manifest.fingerprint}:
        raise DatasetChangedError(
            f"{run_dir / job.task.class_map} describes the data set {manifest.fingerprint[:12]}, "
            f"the job wants {job.task.fingerprint[:12]}; run prepare again"
        )
    quick_check(manifest, Path(job.task.data))
    return manifest


def identity_of(
    job: JobDocument,
    config: Config,
    card: ModelCard,
    manifest: DatasetManifest,
    precision: Precision,
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued (20-trainer 1)."""
    return {
        "run_uid": job.run_uid,
        "config_id": job.config_id,
        "config": digest(dict(config)),
        "space_id": job.space_id,
        "max_fidelity": job.max_fidelity,
        "seed": job.seed,
        "image_size": job.task.img_size or card.input_size,
        "in_chans": job.task.in_chans,
        "dtype": precision.dtype,
        "ema": job.flags.ema,
        "dataset": manifest.fingerprint,
        "loss": digest(dict(job.task.loss)),
    }


def header_of(job: JobDocument, config: Mapping[str, Any]) -> Header:
    """The attempt that results are written for."""
    return Header(
        run_uid=job.run_uid,
        step=job.step or f"c{job.config_id}-f{job.fidelity_to}",
        config_id=job.config_id,
        config=config,
        attempt=job.attempt,
        nonce=job.nonce,
        metric=job.task.metric,
    )


def committed_result(work: Work) -> dict[str, Any] | None:
    """The result that is already committed for this step, if it verifies.

    Raises: EndedError `identity_mismatch`.
    """
    folder = work.folder.committed(work.job.fidelity_to)
    if not folder.exists():
        return None
    try:
        found = checkpoint.verify(folder)
    except CorruptCheckpointError as error:
        work.warnings.append(str(error))
        return None
    require_identity(work, found)
    return volume.read_json(folder / layout.RESULT)


def require_identity(work: Work, found: Found) -> None:
    """Refuse a checkpoint of another identity. Raises: EndedError `identity_mismatch`."""
    checkpoint.require_identity(
        found, work.identity, allow_dtype_change=work.job.flags.allow_dtype_change
    )


def build_session(work: Work) -> Session:
    """Assemble the session; the head and all that is drawn at first come from the key "init"."""
    job, config, manifest = work.job, work.config, work.manifest
    seed_process(job.seed, job.config_id, "init")
    native = job.space_id not in UPSTREAM_SPACES
    request = SessionRequest(
        config=config,
        native=native,
        build=build_request(
            job, config, manifest.num_classes, keep_source_head=is_on(config, "cotuning_reg")
        ),
        precision=work.precision,
        targets=plan_targets(
            config,
            num_classes=manifest.num_classes,
            loss=job.task.loss,
            class_names=manifest.class_names,
            train_counts=manifest.class_counts("train"),
        ),
        n_train=manifest.n_train,
        max_fidelity=job.max_fidelity,
        micro_batch=job.limits.micro_batch,
        ema=job.flags.ema,
        make_relation=lambda built: _relation(work, built),
    )
    return assemble(request)


def build_request(
    job: JobDocument, config: Mapping[str, Any], num_classes: int, *, keep_source_head: bool = False
) -> BuildRequest:
    """The job's model as `model.build_model` wants it."""
    return BuildRequest(
        card=parse_card(job.card),
        num_classes=num_classes,
        in_chans=job.task.in_chans,
        img_size=job.task.img_size,
        drop=float(config.get("drop") or 0.0),
        weights_cache=job.paths.weights,
        offline=job.flags.offline,
        keep_source_head=keep_source_head,
    )


def seed_process(seed: int, *tags: int | str) -> None:
    """Seed torch's and NumPy's global generators with a key."""
    torch.manual_seed(key(seed, *tags))
    np.random.seed(key32(seed, *tags))


def _relation(work: Work, built: BuiltModel) -> torch.Tensor:
    """P of co-tuning, from the cache or computed on the training images with the eval transform."""
    side = built.data_config["input_size"][-1]
    name = built.weights_sha256 or digest(work.job.card["tag"])
    path = work.run / "relationship" / work.manifest.fingerprint / f"{name}-{side}.safetensors"
    cached = load_relationship(path)
    if cached is not None:
        return cached
    assert built.pretrained is not None
    device = work.precision.device
    loader = eval_loader(
        eval_set(work, "train", built.data_config),
        batch=EVAL_BATCH,
        workers=loader_workers(work.job, device),
        pin=device.type == "cuda",
    )
    relation = relationship(
        built.pretrained.to(device), loader, num_classes=work.manifest.num_classes, device=device
    )
    store_relationship(path, relation)
    return relation


def eval_set(work: Work, split: str, data_config: Mapping[str, Any]) -> EvalSet:
    """A split under the evaluation transform."""
    transform = build_transforms(
        data_config, work.config, work.job.task.img_size, False, space_id=work.job.space_id
    )
    return EvalSet(work.manifest, split, work.data_root, transform)

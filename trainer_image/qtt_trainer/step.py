"""The command `step`: trains one configuration from its newest checkpoint to the job's epoch.

Resume, epochs, commit, report (20-trainer 1, the order inside a job). It decides nothing about
other configurations and talks to nobody.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader

from qtt_core.jobs import JobDocument
from qtt_core.results import State
from qtt_core.steps import Config
from qtt_trainer import checkpoint, loop, report, volume
from qtt_trainer.checkpoint import CorruptCheckpointError, Found
from qtt_trainer.committing import (
    cached,
    collect_garbage,
    describe,
    finish,
    save_part,
    unfit,
)
from qtt_trainer.context import Context
from qtt_trainer.data import TrainSet
from qtt_trainer.endings import EndedError
from qtt_trainer.loaders import eval_loader, train_loader
from qtt_trainer.loop import Pulse, Watch
from qtt_trainer.model import count_parameters
from qtt_trainer.precision import loader_workers, peak_memory_bytes
from qtt_trainer.report import Progress, Report
from qtt_trainer.session import Session
from qtt_trainer.transforms import build_transforms
from qtt_trainer.work import (
    Work,
    build_session,
    committed_result,
    eval_set,
    prepare_work,
    require_identity,
)

log = logging.getLogger(__name__)

MIN_UNSAVED_SECONDS = 60.0
"""Work younger than this is not worth a checkpoint when the job must stop."""
PART_SECONDS = 300.0
"""A long step saves its state this often."""


def run(job: JobDocument, config: Config, context: Context) -> Report:
    """Train, commit, report.

    Raises: EndedError, DataError, OSError for every end without a committed result.
    """
    work = prepare_work(job, config, context)
    work.folder.path.mkdir(parents=True, exist_ok=True)
    work.progress = Progress(
        path=work.folder.path / "progress.json",
        channel=context.channel,
        housekeep=context.housekeep,
    )
    done = committed_result(work)
    if done is not None:
        return cached(work, done)
    work.warnings.extend(collect_garbage(work, own=False))
    session = build_session(work)
    resume(work, session)
    session.start_schedule()
    _require_space(work, session)
    try:
        state, reason = train(work, session)
    except (loop.DoesNotFitError, torch.OutOfMemoryError) as error:
        return unfit(work, session, str(error))
    return finish(work, session, state, reason)


def resume(work: Work, session: Session) -> None:
    """Continue from the newest state that verifies and loads, else from epoch 0.

    Raises: EndedError `checkpoint_corrupt` when there were states and none is good, or when the job
    expects one; `identity_mismatch`.
    """
    faults = []
    for found in checkpoint.resumable(work.folder, work.job.fidelity_to):
        if isinstance(found, CorruptCheckpointError):
            faults.append(str(found))
            continue
        require_identity(work, found)
        try:
            session.load_state(checkpoint.load_state(found))
        except CorruptCheckpointError as error:
            faults.append(f"{found.folder}: {error}")
            continue
        work.resumed = session.epoch
        work.told = _committed_epochs(found)
        break
    else:
        if work.job.fidelity_from > 0 and not work.job.flags.allow_restart:
            reason = "; ".join(faults) or f"{work.folder.path}: no checkpoint to continue from"
            raise EndedError(State.CHECKPOINT_CORRUPT, reason)
    work.warnings.extend(faults)
    work.saved_at, work.began = time.monotonic(), session.update
    work.saved = work.began


def train(work: Work, session: Session) -> tuple[State, str]:
    """All epochs of the job. Returns how it ended: ok, or diverged and why.

    Raises: EndedError when a stop was asked for, after saving what is worth it.
    """
    loaders = _loaders(work, session)
    watch = _watch(work, session)
    try:
        while session.epoch < work.job.fidelity_to:
            _one_epoch(work, session, loaders, watch)
    except loop.DivergedError as error:
        return State.DIVERGED, f"epoch {session.epoch + 1}: {error}"
    except loop.StoppedError:
        ended = work.context.stop.ended()
        ended.facts = describe(work, session) | {"curve": list(session.history)}
        if _is_worth_saving(work, session, ended.state):
            save_part(work, session)
        raise ended from None
    return State.OK, ""


def _is_worth_saving(work: Work, session: Session, state: State) -> bool:
    """Old work is; all new work is at the wall limit, or a short one would never be passed."""
    unsaved = time.monotonic() - work.saved_at
    return session.update > work.saved and (
        state is State.TIMEOUT
        or unsaved >= _seconds("QTT_MIN_UNSAVED_SECONDS", MIN_UNSAVED_SECONDS)
    )


def _committed_epochs(found: Found) -> int:
    """Epochs of the newest commit at or below a state: its own, or the one a part began from."""
    epoch, batch = found.position
    is_commit = (epoch, batch) == (int(found.manifest["fidelity"]), 0)
    return epoch if is_commit else int(found.manifest["previous"])


def _loaders(work: Work, session: Session) -> tuple[DataLoader[Any], DataLoader[Any]]:
    job = work.job
    device = session.precision.device
    workers, pin = loader_workers(job, device), device.type == "cuda"
    transform = build_transforms(
        session.data_config, work.config, job.task.img_size, True, space_id=job.space_id
    )
    train_set = TrainSet(
        work.manifest,
        "train",
        work.data_root,
        transform,
        seed=job.seed,
        config_id=job.config_id,
    )
    return (
        train_loader(
            train_set,
            batch=session.batch_size,
            updates=session.horizon.updates_per_epoch,
            workers=workers,
            pin=pin,
        ),
        eval_loader(
            eval_set(work, "val", session.data_config),
            batch=session.micro_batch,
            workers=workers,
            pin=pin,
        ),
    )


def _watch(work: Work, session: Session) -> Watch:
    every = _seconds("QTT_PART_SECONDS", PART_SECONDS)
    return Watch(
        ready=lambda: _started(work),
        should_stop=lambda: work.context.stop.state is not None,
        beat=lambda pulse: work.progress.beat(_progress(work, session, pulse)),
        save_is_due=lambda: time.monotonic() - work.saved_at >= every,
        save=lambda: save_part(work, session),
    )


def _started(work: Work) -> None:
    """Start-up ends with the first batch of the first epoch."""
    if not work.timing.parts["startup"]:
        work.timing.add("startup", work.context.age() - work.timing.parts["data"])


def _seconds(variable: str, default: float) -> float:
    """A tuning knob of the process; a value that is no number counts as absent."""
    try:
        return float(os.environ.get(variable, default))
    except ValueError:
        return default


def _one_epoch(
    work: Work, session: Session, loaders: tuple[DataLoader[Any], DataLoader[Any]], watch: Watch
) -> None:
    """Train and score one epoch; the session then stands at the beginning of the next."""
    job = work.job
    before = dict(session.partial)
    try:
        loss = loop.train_epoch(
            session, loaders[0], seed=job.seed, config_id=job.config_id, watch=watch
        )
    finally:
        for name, key in (("train", "seconds"), ("wait", "waited")):
            work.timing.add(name, session.partial.get(key, 0.0) - before.get(key, 0.0))
    _started(work)  # an epoch that only lacked its evaluation had no batch
    mark = time.monotonic()
    evaluator = loop.evaluate(
        session.scored_model(),
        loaders[1],
        num_classes=work.manifest.num_classes,
        precision=session.precision,
        should_stop=watch.should_stop,
    )
    scores = evaluator.scores()
    seconds = time.monotonic() - mark
    work.timing.add("eval", seconds)
    if not scores.finite:
        raise loop.DivergedError("the evaluation's log loss is not finite")
    trained = session.partial["seconds"]
    row = {
        "epoch": session.epoch + 1,
        **scores.values,
        "train_loss": loss,
        "lr": session.schedule.span()[1],  # type: ignore[union-attr]  # started before the loop
        "seconds": trained + seconds,
        "train_seconds": trained,
        "eval_seconds": seconds,
    }
    session.history.append(row)
    session.epoch, session.batch, session.partial = session.epoch + 1, 0, {}
    if report.best_row(session.history, job.task.metric) is row:
        names = work.manifest.class_names
        work.per_class = {"epoch": row["epoch"], **evaluator.per_class(names)}
    work.progress.epoch(_epoch_facts(work, session, row))
    log.info(
        "epoch %d of %d: %s %.4f",
        row["epoch"],
        job.fidelity_to,
        job.task.metric,
        row[job.task.metric],
    )


def _progress(work: Work, session: Session, pulse: Pulse) -> dict[str, Any]:
    """Numbers within an epoch; `value` is the last finished epoch's."""
    facts = asdict(pulse)
    last = session.history[-1] if session.history else None
    return facts | {
        "epoch": session.epoch + 1,
        "epochs": work.job.fidelity_to,
        "value": None if last is None else last[work.job.task.metric],
        "lr": list(pulse.lr),
        "config_id": work.job.config_id,
        "amp_scale": session.scaler.get_scale() if session.scaler.is_enabled() else None,
        "peak_mem_bytes": peak_memory_bytes(session.precision.device),
    }


def _epoch_facts(work: Work, session: Session, row: Mapping[str, Any]) -> dict[str, Any]:
    updates = session.horizon.updates_per_epoch
    return {
        "epoch": row["epoch"],
        "epochs": work.job.fidelity_to,
        "update": updates,
        "updates": updates,
        "value": row[work.job.task.metric],
        "train_loss": row["train_loss"],
        "lr": row["lr"],
        "seconds": round(row["seconds"], 3),
        "config_id": work.job.config_id,
    }


def _require_space(work: Work, session: Session) -> None:
    """Raise EndedError `disk_full` before any work is lost."""
    moments = {"adam": 2, "adamw": 2, "adamp": 2, "momentum": 1, "sgd": 1}[str(work.config["opt"])]
    copies = 1 + moments + (1 if session.ema is not None else 0)
    size = 4 * count_parameters(session.model) * copies
    volume.require_space(work.folder.path, int(checkpoint.SPACE_FACTOR * size))

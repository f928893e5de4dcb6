"""The command `step`: trains one configuration from its newest checkpoint to the job's epoch.

Resume, epochs, commit, report (20-trainer 1, the order inside a job). It decides nothing about other
configurations and talks to nobody.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import IO, Any

from torch.utils.data import DataLoader

from qtt_core.jobs import JobDocument
from qtt_core.steps import Config, State
from qtt_trainer import checkpoint, layout, loop, report, volume
from qtt_trainer.checkpoint import CorruptCheckpointError, Found, Label, Writer
from qtt_trainer.context import Context
from qtt_trainer.data import TrainSet
from qtt_trainer.endings import EndedError
from qtt_trainer.loop import Pulse, Watch
from qtt_trainer.model import count_parameters
from qtt_trainer.precision import gpu_name, loader_workers, peak_memory_bytes
from qtt_trainer.report import Progress, Report
from qtt_trainer.session import Session
from qtt_trainer.transforms import build_transforms
from qtt_trainer.versions import installed_versions
from qtt_trainer.volume import Written
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
        return _cached(work, done)
    work.warnings.extend(_collect_garbage(work, own=False))
    work.timing.add("startup", context.age())
    mark = time.monotonic()
    session = build_session(work)
    resume(work, session)
    session.start_schedule()
    _require_space(work, session)
    work.timing.add("startup", time.monotonic() - mark)
    try:
        state, reason = train(work, session)
    except loop.DoesNotFitError as error:
        return _unfit(work, session, str(error))
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
    work.saved_at = time.monotonic()


def train(work: Work, session: Session) -> tuple[State, str]:
    """All epochs of the job. Returns how it ended: ok, or diverged and why.

    Raises: EndedError when a stop was asked for, after saving what is worth it.
    """
    loaders = _loaders(work, session)
    watch = _watch(work, session)
    work.context.on_ready()
    try:
        while session.epoch < work.job.fidelity_to:
            _one_epoch(work, session, loaders, watch)
    except loop.DivergedError as error:
        return State.DIVERGED, f"epoch {session.epoch + 1}: {error}"
    except loop.StoppedError:
        ended = work.context.stop.ended()
        ended.facts = _facts(work, session) | {"curve": list(session.history)}
        if time.monotonic() - work.saved_at >= _seconds(
            "QTT_MIN_UNSAVED_SECONDS", MIN_UNSAVED_SECONDS
        ):
            save_part(work, session)
        raise ended from None
    return State.OK, ""


def _committed_epochs(found: Found) -> int:
    """Epochs of the newest commit at or below a state: its own, or the one a part began from."""
    epoch, batch = found.position
    is_commit = (epoch, batch) == (int(found.manifest["fidelity"]), 0)
    return epoch if is_commit else int(found.manifest["previous"])


def _loaders(work: Work, session: Session) -> tuple[DataLoader[Any], DataLoader[Any]]:
    job = work.job
    workers = loader_workers(job, session.precision.device)
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
        loop.train_loader(
            train_set, session, seed=job.seed, config_id=job.config_id, workers=workers
        ),
        loop.eval_loader(
            eval_set(work, "val", session.data_config),
            batch=session.micro_batch,
            workers=workers,
            precision=session.precision,
        ),
    )


def _watch(work: Work, session: Session) -> Watch:
    every = _seconds("QTT_PART_SECONDS", PART_SECONDS)
    return Watch(
        should_stop=lambda: work.context.stop.state is not None,
        beat=lambda pulse: work.progress.beat(_progress(work, session, pulse)),
        save_is_due=lambda: time.monotonic() - work.saved_at >= every,
        save=lambda: save_part(work, session),
    )


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
    before = session.partial.get("seconds", 0.0)
    try:
        loss = loop.train_epoch(
            session, loaders[0], seed=job.seed, config_id=job.config_id, watch=watch
        )
    finally:
        work.timing.add("train", session.partial.get("seconds", 0.0) - before)
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


def _label(work: Work, session: Session, state: State = State.OK) -> Label:
    """Who writes, and where the session stands."""
    job = work.job
    return Label(
        fidelity=job.fidelity_to,
        attempt=job.attempt,
        nonce=job.nonce,
        identity=work.identity,
        state=state,
        epoch=session.epoch,
        batch=session.batch,
        previous=work.told,
        meta={
            "run_uid": job.run_uid,
            "config": dict(work.config),
            "card": dict(job.card),
            "space_id": job.space_id,
            "space_sha": job.space_sha,
            "img_size": job.task.img_size,
            "in_chans": job.task.in_chans,
            "num_classes": work.manifest.num_classes,
            "class_map": work.manifest.digest,
            "global_update": session.update,
            "micro_batch": session.micro_batch,
            "weights_sha256": session.weights_sha256,
            "freeze_plan": session.plan.digest,
            "history": session.history,
            "versions": installed_versions(),
            "gpu": gpu_name(session.precision.device),
        },
    )


def save_part(work: Work, session: Session) -> None:
    """Save a state inside the step, so that a retry continues from here. Raises: OSError."""
    mark = time.monotonic()
    files = {layout.STATE: checkpoint.save_state(session.to_state())}
    checkpoint.save_part(work.folder, _label(work, session), files)
    work.saved_at = time.monotonic()
    work.timing.add("checkpoint", work.saved_at - mark)


def finish(work: Work, session: Session, state: State, reason: str) -> Report:
    """Commit the step, clean up, and report; the loser of a race reports the winner's result."""
    work.context.stop.disarm()
    mark = time.monotonic()
    files = _files(work, session, state, reason)
    folder, job = work.folder, work.job
    label = _label(work, session, state)
    found = checkpoint.commit(folder, label, files)
    if found is None:
        stored = committed_result(work)
        if stored is not None:
            return _cached(work, stored)
        checkpoint.make_room(folder, job.fidelity_to, job.nonce)
        found = checkpoint.commit(folder, label, files)
    if found is None:
        stored = committed_result(work)
        if stored is None:
            raise EndedError(
                State.CHECKPOINT_CORRUPT, f"{folder.committed(job.fidelity_to)}: taken"
            )
        return _cached(work, stored)
    checkpoint.clean_up(folder, job.fidelity_to, job.attempt, job.nonce)
    refused = _collect_garbage(work, own=True)
    work.timing.add("checkpoint", time.monotonic() - mark)
    result = volume.read_json(found.folder / layout.RESULT)
    assert result is not None
    result["timing"] = _timing(work)
    result["warnings"] = [*result["warnings"], *refused]
    message = report.step_message(result, fidelity_from=job.fidelity_from)
    return Report(message=message, result=result, exit_code=0)


def _files(work: Work, session: Session, state: State, reason: str) -> dict[str, Writer]:
    """What a commit holds: weights only where training can go on from them, the result last."""
    files: dict[str, Writer] = {}
    if state is State.OK:
        files[layout.STATE] = checkpoint.save_state(session.to_state())
    if work.per_class is not None:
        classes = volume.json_bytes(work.per_class)
        files[layout.CLASSES] = lambda file, written: (file.write(classes), None)[1]

    def write_result(file: IO[bytes], written: Mapping[str, Written]) -> None:
        facts = _facts(work, session)
        stored = written.get(layout.STATE)
        if stored is not None:
            relative = work.folder.committed(work.job.fidelity_to).relative_to(work.run)
            facts["checkpoint"] = {
                "dir": str(relative),
                "sha256": stored.sha256,
                "bytes": stored.size_bytes,
            }
        file.write(volume.json_bytes(_result(work, session, state, reason, facts)))

    files[layout.RESULT] = write_result
    return files


def _result(
    work: Work, session: Session, state: State, reason: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """`result.json`; a failed step's fidelity is the epoch that failed."""
    fresh = [row for row in session.history if row["epoch"] > work.told]
    return report.step_result(
        work.header,
        state=state,
        reason=reason,
        curve=session.history,
        fidelity=session.epoch if state is State.OK else session.epoch + 1,
        cost=sum(row["seconds"] for row in fresh),
        facts=facts,
    )


def _facts(work: Work, session: Session) -> dict[str, Any]:
    """The fields of a result that describe how it was computed."""
    fresh = [row for row in session.history if row["epoch"] > work.told]
    device = session.precision.device
    trained = sum(row["train_seconds"] for row in fresh)
    bn_batch = min(session.micro_batch, session.batch_size)
    return {
        "inert": list(session.inert),
        "warnings": [*work.warnings, *session.warnings, *work.manifest.warnings],
        "env": {**installed_versions(), "dtype": session.precision.dtype},
        "timing": _timing(work),
        "gpu": {
            "product": gpu_name(device),
            "count": 1 if device.type == "cuda" else 0,
            "peak_mem_bytes": peak_memory_bytes(device),
        },
        "micro_batch": session.micro_batch,
        "effective_batch": session.batch_size,
        "effective_bn_batch": bn_batch,
        "images_per_second": len(fresh) * _images_per_epoch(session) / trained if trained else 0.0,
    }


def _images_per_epoch(session: Session) -> int:
    return session.horizon.updates_per_epoch * session.batch_size


def _timing(work: Work) -> dict[str, float]:
    return {**work.timing.parts, "total": work.context.age()}


def _cached(work: Work, stored: Mapping[str, Any]) -> Report:
    result = report.cached_result(stored, work.header)
    message = report.step_message(result, fidelity_from=work.job.fidelity_from)
    return Report(message=message, result=result, exit_code=0)


def _unfit(work: Work, session: Session, reason: str) -> Report:
    """Out of memory at the smallest micro-batch: a fact about the configuration on this device.

    Not committed under the step's name: a larger device may succeed.
    """
    result = _result(work, session, State.OOM, reason, _facts(work, session))
    message = report.step_message(result, fidelity_from=work.job.fidelity_from)
    return Report(message=message, result=result, exit_code=0)


def _require_space(work: Work, session: Session) -> None:
    """Raise EndedError `disk_full` before any work is lost."""
    moments = {"adam": 2, "adamw": 2, "adamp": 2, "momentum": 1, "sgd": 1}[str(work.config["opt"])]
    copies = 1 + moments + (1 if session.ema is not None else 0)
    size = 4 * count_parameters(session.model) * copies
    volume.require_space(work.folder.path, int(checkpoint.SPACE_FACTOR * size))


def _collect_garbage(work: Work, *, own: bool) -> list[str]:
    """Delete the job's `gc` paths: those of other configurations first, its own after the commit."""
    name = work.folder.path.name
    paths = [p for p in work.job.gc if (p.split("/", 1)[0] == name) is own]
    keep = work.folder.committed(work.job.fidelity_to)
    return checkpoint.collect_garbage(work.run, paths, keep=keep)

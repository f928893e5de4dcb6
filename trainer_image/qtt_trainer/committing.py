"""What a step stores and says: parts, the commit, `result.json` and the message (20-trainer 5).

Last part of the command `step`: shapes a `Session` into files; trains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import IO, Any

from qtt_core.results import State
from qtt_trainer import checkpoint, layout, report, volume
from qtt_trainer.checkpoint import Label, Writer
from qtt_trainer.endings import EndedError
from qtt_trainer.precision import gpu_name, peak_memory_bytes
from qtt_trainer.report import Report
from qtt_trainer.session import Session
from qtt_trainer.versions import installed_versions
from qtt_trainer.volume import Written
from qtt_trainer.work import Work, committed_result


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
    work.saved_at, work.saved = time.monotonic(), session.update
    work.context.progress = work.saved - work.began
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
            return cached(work, stored)
        checkpoint.make_room(folder, job.fidelity_to, job.nonce)
        found = checkpoint.commit(folder, label, files)
    if found is None:
        stored = committed_result(work)
        if stored is None:
            raise EndedError(
                State.CHECKPOINT_CORRUPT, f"{folder.committed(job.fidelity_to)}: taken"
            )
        return cached(work, stored)
    checkpoint.clean_up(folder, job.fidelity_to, job.attempt, job.nonce)
    refused = collect_garbage(work, own=True)
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
        described = describe(work, session)
        stored = written.get(layout.STATE)
        if stored is not None:
            relative = work.folder.committed(work.job.fidelity_to).relative_to(work.run)
            described["checkpoint"] = {
                "dir": str(relative),
                "sha256": stored.sha256,
                "bytes": stored.size_bytes,
            }
        file.write(volume.json_bytes(_result(work, session, state, reason, described)))

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


def describe(work: Work, session: Session) -> dict[str, Any]:
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
        "images_per_second": len(fresh) * _images_per_epoch(work, session) / trained
        if trained
        else 0.0,
    }


def _images_per_epoch(work: Work, session: Session) -> int:
    return min(work.manifest.n_train, session.horizon.updates_per_epoch * session.batch_size)


def _timing(work: Work) -> dict[str, float]:
    return {**work.timing.parts, "total": work.context.age()}


def cached(work: Work, stored: Mapping[str, Any]) -> Report:
    """The report of a step that was committed before."""
    result = report.cached_result(stored, work.header)
    message = report.step_message(result, fidelity_from=work.job.fidelity_from)
    return Report(message=message, result=result, exit_code=0)


def unfit(work: Work, session: Session, reason: str) -> Report:
    """Out of memory at the smallest micro-batch: a fact about the configuration on this device.

    Not committed under the step's name: a larger device may succeed.
    """
    result = _result(work, session, State.OOM, reason, describe(work, session))
    message = report.step_message(result, fidelity_from=work.job.fidelity_from)
    return Report(message=message, result=result, exit_code=0)


def collect_garbage(work: Work, *, own: bool) -> list[str]:
    """Delete the job's `gc` paths: others' before, its own after the commit."""
    name = work.folder.path.name
    paths = [p for p in work.job.gc if (p.split("/", 1)[0] == name) is own]
    keep = work.folder.committed(work.job.fidelity_to)
    return checkpoint.collect_garbage(work.run, paths, keep=keep)

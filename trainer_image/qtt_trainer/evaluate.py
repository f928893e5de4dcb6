"""The command `evaluate`: scores checkpoints on a split that the search never read (20-trainer 1).

Loads each checkpoint's own model and evaluation transform under the run's class map; trains nothing
and needs no pretrained weights.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtt_core.errors import MessageError
from qtt_core.hub import parse_card
from qtt_core.jobs import JobDocument
from qtt_core.results import State, StepResult
from qtt_core.steps import METRICS
from qtt_trainer import checkpoint, layout, loop, report, volume
from qtt_trainer.checkpoint import CorruptCheckpointError, Found
from qtt_trainer.context import Context
from qtt_trainer.data import EvalSet, with_split
from qtt_trainer.dataset_manifest import DatasetManifest, load_manifest
from qtt_trainer.endings import EndedError
from qtt_trainer.inert import is_on
from qtt_trainer.loaders import EVAL_BATCH, eval_loader
from qtt_trainer.model import BuildRequest, rebuild_model
from qtt_trainer.precision import choose_precision, loader_workers, set_up_process
from qtt_trainer.report import Report
from qtt_trainer.transforms import build_transforms

log = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
READ_ONLY_ERRNOS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def run(job: JobDocument, context: Context) -> Report:
    """Score every checkpoint of the job on its split.

    Raises: EndedError `checkpoint_corrupt`, `identity_mismatch`, preempted; DataError for the
    split.
    """
    run_dir = layout.run_folder(job.paths.root, job.run_uid)
    manifest = load_manifest(run_dir, job.task.class_map)
    if job.task.split not in manifest.splits:
        manifest = with_split(manifest, Path(job.task.data), job.task.split)
    scores = [_score(job, context, manifest, run_dir, name) for name in job.checkpoints]
    _store(job, run_dir, scores)
    message = _message(job, scores)
    result = {
        "schema": report.SCHEMA,
        "run_uid": job.run_uid,
        "attempt": job.attempt,
        "nonce": job.nonce,
        "state": State.OK.value,
        "reason": "",
        "split": job.task.split,
        "scores": scores,
        "timing": {"total": context.age()},
    }
    return Report(message=message, result=result, exit_code=0)


def _score(
    job: JobDocument, context: Context, manifest: DatasetManifest, run_dir: Path, name: str
) -> dict[str, Any]:
    context.stop.check()
    try:
        found = checkpoint.verify(run_dir / name)
        state = checkpoint.load_state(found)
        meta, identity = found.manifest["meta"], found.manifest["identity"]
    except (CorruptCheckpointError, FileNotFoundError) as error:
        raise EndedError(State.CHECKPOINT_CORRUPT, f"{name}: {error}") from error
    _require_same_run(job, manifest, found, name)
    config: Mapping[str, Any] = meta["config"]
    precision = choose_precision(job, amp=is_on(config, "amp"))
    set_up_process(job, precision.device)
    built = rebuild_model(
        BuildRequest(
            card=parse_card(meta["card"]),
            num_classes=int(meta["num_classes"]),
            in_chans=int(meta["in_chans"]),
            img_size=meta["img_size"],
        )
    )
    built.model.load_state_dict(state["state_dict_ema"] or state["state_dict"])
    transform = build_transforms(
        built.data_config, config, meta["img_size"], False, space_id=str(meta["space_id"])
    )
    loader = eval_loader(
        EvalSet(manifest, job.task.split, Path(job.task.data), transform),
        batch=EVAL_BATCH,
        workers=loader_workers(job, precision.device),
        pin=precision.device.type == "cuda",
    )
    try:
        evaluator = loop.evaluate(
            built.model.to(precision.device),
            loader,
            num_classes=manifest.num_classes,
            precision=precision,
            should_stop=lambda: context.stop.state is not None,
        )
    except loop.StoppedError:
        raise context.stop.ended() from None
    scores = evaluator.scores()
    log.info("%s on %s: %s", name, job.task.split, dict(scores.values))
    return {
        "config_id": int(identity["config_id"]),
        "fidelity": int(found.manifest["fidelity"]),
        "n": scores.count,
        **scores.values,
    }


def _require_same_run(job: JobDocument, manifest: DatasetManifest, found: Found, name: str) -> None:
    """A checkpoint of another run or data set has another class map."""
    theirs = found.manifest["identity"]
    ours = {"run_uid": job.run_uid, "dataset": manifest.fingerprint}
    for field, value in ours.items():
        if theirs.get(field) != value:
            raise EndedError(
                State.IDENTITY_MISMATCH,
                f"{name}: {field} is {theirs.get(field)!r} there and {value!r} here",
            )


def _store(job: JobDocument, run_dir: Path, scores: Sequence[Mapping[str, Any]]) -> None:
    folder = layout.attempt_folder(
        run_dir, "evaluate", config_id=-1, fidelity_to=0, attempt=job.attempt
    )
    content = {"split": job.task.split, "scores": list(scores)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        volume.replace_json(folder / EVALUATION, content, durable=True)
    except OSError as error:  # mounted read-only: the message carries the scores
        if error.errno not in READ_ONLY_ERRNOS:
            raise
        log.warning("%s was not written: %s", EVALUATION, error)


def _message(job: JobDocument, scores: Sequence[Mapping[str, Any]]) -> StepResult:
    """All metrics where they fit into 4096 bytes, else the objective alone."""
    for names in (tuple(METRICS), (job.task.metric,)):
        kept = ("config_id", "fidelity", "n", *names)
        short = [
            {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items() if k in kept}
            for row in scores
        ]
        message = StepResult(
            attempt=job.attempt, nonce=job.nonce, state=State.OK, scores=tuple(short)
        )
        try:
            message.encode()
        except MessageError:
            continue
        return message
    return message

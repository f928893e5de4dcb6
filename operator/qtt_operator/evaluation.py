"""Scores kept checkpoints on images the search never saw, by an `evaluate` job of the trainer.

Neither the ledger nor the optimizer learns the result: a test split that influenced anything would
be one no more. Results of the run's own test split are kept beside the run, by checkpoint digest.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtt_core.errors import DataError, MessageError, QuickTuneError, VolumeError
from qtt_core.jobs import JobDocument
from qtt_core.plan import CreateJob, JobEnd, JobPhase
from qtt_core.results import EXIT_BAD_DATA, EXIT_COMMITTED, State, StepResult
from qtt_operator.local_backend import LocalBackend

BATCH = 50
"""Checkpoints a job; the trainer takes no more."""

Scores = dict[tuple[int, int], Mapping[str, Any]]
"""(config id, epoch) -> n and every metric's value."""


class EvaluationError(QuickTuneError):
    """The trainer could not score the checkpoints."""


async def evaluate(
    backend: LocalBackend, document: JobDocument, checkpoints: Sequence[str]
) -> Scores:
    """Score checkpoint folders; `document` says on what.

    Raises: DataError if the images cannot be used, VolumeError for a damaged checkpoint,
    EvaluationError if the trainer fails.
    """
    scores: Scores = {}
    for start in range(0, len(checkpoints), BATCH):
        part = replace(document, checkpoints=tuple(checkpoints[start : start + BATCH]))
        end = await _run(backend, part)
        scores |= _scores(part, end)
    return scores


async def _run(backend: LocalBackend, document: JobDocument) -> JobEnd:
    name = f"evaluate-{secrets.token_hex(4)}"
    order = CreateJob(
        kind="evaluate", c=document.step, frm=0, to=1, attempt=document.attempt, decision="",
        timeout_seconds=math.inf,
    )  # fmt: skip
    await backend.create(order, name, document)
    try:
        while True:
            backend.changed.clear()
            for job in (await backend.observe()).jobs:
                if job.name == name and job.phase is JobPhase.ENDED and job.end is not None:
                    return job.end
            await backend.changed.wait()
    except asyncio.CancelledError:
        await backend.kill(name, "Stopped")
        raise
    finally:
        await backend.forget(name)


def _scores(document: JobDocument, end: JobEnd) -> Scores:
    try:
        result = StepResult.parse(end.message, nonce=document.nonce, attempt=document.attempt)
    except MessageError as error:
        words = end.reason or f"exit {end.exit_code}, signal {end.signal}"
        raise EvaluationError(f"evaluation failed: {words} ({error})") from error
    if end.exit_code == EXIT_BAD_DATA:
        raise DataError(result.reason)
    if result.state is State.CHECKPOINT_CORRUPT:
        raise VolumeError(f"{result.reason}: damaged; remove this folder to score the others")
    if end.exit_code != EXIT_COMMITTED:
        raise EvaluationError(f"evaluation failed: {result.state.value}: {result.reason}")
    return {(int(s["config_id"]), int(s["fidelity"])): s for s in result.scores}


# --- kept results -------------------------------------------------------------------------------


def read_kept(path: Path) -> dict[str, Mapping[str, Any]]:
    """Checkpoint digest -> scores on the run's own test split; empty if none were kept."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}

"""The command `garbage`: deletes the folders of a run that its job lists, and nothing else.

Which ones the ledger says; ages and patterns decide nothing here. Loads neither torch nor Pillow,
and writes no file: the volume may be full, or about to be gone.
"""

from __future__ import annotations

import logging
from pathlib import Path

from qtt_core.jobs import JobDocument
from qtt_core.results import EXIT_CODES, State, StepResult
from qtt_trainer import checkpoint, layout, volume
from qtt_trainer.report import Report

log = logging.getLogger(__name__)

WHOLE_RUN = (".",)


def run(job: JobDocument) -> Report:
    """Delete; what is gone already is well. What cannot be deleted ends in `infra_storage`."""
    run_dir = layout.run_folder(job.paths.root, job.run_uid)
    if job.gc == WHOLE_RUN:
        volume.remove_tree(run_dir)
        left = [run_dir.name] if _holds_anything(run_dir) else []
        refused: list[str] = []
    else:
        refused = checkpoint.collect_garbage(run_dir, job.gc)
        left = [name for name in job.gc if (run_dir / name).exists()]
    state = State.INFRA_STORAGE if left else State.OK
    reason = f"{len(left)} of {len(job.gc)} could not be deleted, such as {left[0]}" if left else ""
    log.info("deleted %d of %d", len(job.gc) - len(left), len(job.gc))
    message = StepResult(
        attempt=job.attempt, nonce=job.nonce, state=state, reason=reason, warnings=tuple(refused)
    )
    return Report(message=message, result={}, exit_code=EXIT_CODES[state])


def _holds_anything(folder: Path) -> bool:
    """A mounted folder stays; what counts is what lies in it."""
    return folder.is_dir() and any(folder.iterdir())

"""A trainer that trains nothing: seeded curves, fixed seconds, the real process contract.

`python -m qtt_core.testing.trainer prepare|step` reads the job document from $QTT_STEP, remembers
committed epochs in the run's folder, and answers by termination message and exit code as the real
one does. Scores depend on the configuration alone and the seconds it *reports* are fixed, so that a
run through Jobs decides exactly like a run in one process; how long it really takes is $QTT_SLEEP,
and which images it says to have found is $QTT_DATA.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtt_core.jobs import JobDocument, parse_job
from qtt_core.results import EXIT_CODES, Epoch, State, StepResult
from qtt_core.testing.simulation import toy_score

SECONDS_PER_EPOCH = 2.0
FACTS = {"fingerprint": "f" * 16, "n_train": 100, "n_val": 50, "classes": 5, "metafeatures": {}}


@dataclass(slots=True, kw_only=True)
class Volume:
    """Committed epochs: (config id, epoch) -> value; a file when `path` is given."""

    path: Path | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def load(self) -> Volume:
        """Read what an earlier job left."""
        if self.path is not None and self.path.is_file():
            self.scores = json.loads(self.path.read_text())
        return self

    def save(self) -> None:
        """Replace the file, so that a killed job leaves the old or the new one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(self.scores))
            draft.replace(self.path)


def result_of(command: str, document: JobDocument, volume: Volume) -> StepResult:
    """What the trainer answers to a job; commits its epochs on the volume."""
    result = StepResult(attempt=document.attempt, nonce=document.nonce, state=State.OK)
    if command == "prepare":
        return replace(result, prepared=_facts(os.environ.get("QTT_DATA", "")))
    if command == "weights":
        return result
    if command == "evaluate":
        return replace(result, scores=tuple(map(_scored, document.checkpoints)))
    epochs, cached = [], True
    for epoch in range(document.fidelity_from + 1, document.fidelity_to + 1):
        key = f"{document.config_id}-{epoch}"
        cached = cached and key in volume.scores
        value = volume.scores.setdefault(key, toy_score(document, epoch))
        epochs.append(Epoch(epoch=epoch, value=value, seconds=SECONDS_PER_EPOCH))
    volume.save()
    return replace(result, epochs=tuple(epochs), checkpoint_sha256="0" * 64, cached=cached)


def _facts(data: str) -> dict[str, Any]:
    """What `prepare` found; runs on other data say so by another fingerprint."""
    fingerprint = hashlib.sha256(data.encode()).hexdigest() if data else FACTS["fingerprint"]
    return {**FACTS, "fingerprint": fingerprint}


def _scored(folder: str) -> dict[str, Any]:
    config_id, epoch = (int(part[1:]) for part in folder.split("/"))
    return {"config_id": config_id, "fidelity": epoch, "n": FACTS["n_val"], "top1": 0.5}


def main(arguments: list[str] | None = None) -> int:
    """One job; returns its exit code."""
    command = (arguments or sys.argv[1:])[0]
    document = parse_job(json.loads(os.environ["QTT_STEP"]), command=command)

    def stopped(*_: Any) -> None:
        result = StepResult(
            attempt=document.attempt, nonce=document.nonce, state=State.PREEMPTED, reason="SIGTERM"
        )
        _say(result)
        os._exit(EXIT_CODES[State.PREEMPTED])

    signal.signal(signal.SIGTERM, stopped)
    epochs = max(1, document.fidelity_to - document.fidelity_from)
    time.sleep(float(os.environ.get("QTT_SLEEP", "0")) * epochs)
    run = Path(document.paths.root) / "runs" / document.run_uid
    volume = Volume(path=run / f"simulated-{max(document.config_id, 0)}.json").load()
    try:
        result = result_of(command, document, volume)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        result = StepResult(
            attempt=document.attempt, nonce=document.nonce, state=State.DISK_FULL, reason=str(error)
        )
    _say(result)
    return EXIT_CODES[result.state]


def _say(result: StepResult) -> None:
    path = Path(os.environ.get("QTT_TERMINATION_LOG", "/dev/termination-log"))
    path.write_text(result.encode())


if __name__ == "__main__":
    sys.exit(main())

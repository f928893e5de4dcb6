"""The command `recovery`: tells what the volume knows and the ledger has lost (30-kubernetes 3.3).

Reads the `result.json` of each configuration's newest committed checkpoint, and of attempts that
ended as a fact about the configuration. Answers through the termination message alone, as many
configurations as fit; `more` counts the rest. Trains nothing, writes nothing, loads no torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtt_core.errors import MessageError
from qtt_core.jobs import JobDocument
from qtt_core.results import State, StepResult
from qtt_trainer import layout, volume
from qtt_trainer.layout import ConfigFolder
from qtt_trainer.report import Report

log = logging.getLogger(__name__)

CUT_EPOCHS = 100
"""Of a curve that does not fit into a message with its configuration."""

_CONFIG = re.compile(r"c([0-9]+)")
_FACTS = frozenset({State.OOM.value, State.INFEASIBLE.value})
"""Ends without a committed folder that are still facts about the configuration."""


def run(job: JobDocument) -> Report:
    """What lies behind the epochs that the ledger knows, configuration by configuration."""
    run_dir = layout.run_folder(job.paths.root, job.run_uid)
    found = list(_all(job, run_dir))
    message = StepResult(attempt=job.attempt, nonce=job.nonce, state=State.OK, more=len(found))
    for entry in found:
        fuller = _with(message, entry, whole=True)
        if not _fits(fuller):
            break
        message = fuller
    if found and not message.recovered:  # one long curve: its beginning now, the rest next time
        message = _with(message, _beginning(found[0], job.step_epochs), whole=False)
    log.info("%d of %d configurations told", len(found) - message.more, len(found))
    return Report(message=message, result={}, exit_code=0)


def _with(message: StepResult, entry: Mapping[str, Any], *, whole: bool) -> StepResult:
    more = message.more - 1 if whole else message.more
    return replace(message, recovered=(*message.recovered, entry), more=more)


def _beginning(entry: Mapping[str, Any], step_epochs: int) -> dict[str, Any]:
    """The first whole steps of a curve, without the checkpoint that lies at its end."""
    count = max(1, CUT_EPOCHS // step_epochs) * step_epochs
    rows = entry["epochs"][:count]
    kept = {name: entry[name] for name in ("c", "config") if name in entry}
    return {**kept, "to": rows[-1][0], "state": State.OK.value, "epochs": rows, "held": 0.0}


def _all(job: JobDocument, run_dir: Path) -> Iterator[dict[str, Any]]:
    folders = run_dir.iterdir() if run_dir.is_dir() else ()
    numbers = (int(m[1]) for folder in folders if (m := _CONFIG.fullmatch(folder.name)))
    for config_id in sorted(numbers):
        entry = _of_config(layout.config_folder(run_dir, config_id), config_id, job)
        if entry is not None:
            yield entry


def _of_config(folder: ConfigFolder, config_id: int, job: JobDocument) -> dict[str, Any] | None:
    """The newest result behind the ledger's epoch, shortened for the message; None if none is."""
    head = job.known.get(str(config_id))
    results = sorted(_results(folder), key=lambda item: item[0])
    newest = results[-1] if results else None
    if newest is None or newest[0] <= (head or 0):
        return None
    to, raw = newest
    rows = [row for row in raw.get("curve") or () if row["epoch"] > (head or 0)]
    checkpoint = raw.get("checkpoint") or {}
    entry: dict[str, Any] = {
        "c": config_id,
        "to": to,
        "state": raw["state"],
        "epochs": [
            [row["epoch"], round(row[raw["metric"]], 6), round(row["seconds"], 2)] for row in rows
        ],
        "held": round(_held_seconds(folder, head or 0), 1),
    }
    if checkpoint:
        entry |= {"ck": checkpoint["sha256"], "bytes": checkpoint["bytes"]}
    if raw.get("reason"):
        entry["reason"] = str(raw["reason"])[-200:]
    return entry if head is not None else {**entry, "config": raw["config"]}


def _results(folder: ConfigFolder) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(target epoch, result) of committed steps whose files are all there, and of facts."""
    for fidelity, path in folder.all_committed():
        manifest = volume.read_json(path / layout.MANIFEST)
        raw = volume.read_json(path / layout.RESULT)
        if raw is not None and manifest is not None and _is_whole(path, manifest):
            yield fidelity, raw
    for path in _attempts(folder):
        raw = volume.read_json(path / layout.RESULT)
        if raw is not None and raw.get("state") in _FACTS:
            yield _target(path), raw


def _is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file has its size, and the result its digest; loading verifies the rest."""
    for file in manifest.get("files") or ():
        path = folder / str(file["name"])
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            return False
        if path.name == layout.RESULT and volume.file_sha256(path) != file["sha256"]:
            return False
    return True


def _held_seconds(folder: ConfigFolder, head: int) -> float:
    """How long the attempts behind an epoch held their devices, as far as they say it."""
    total = 0.0
    for path in _attempts(folder):
        raw = volume.read_json(path / layout.RESULT) or {}
        seconds = (raw.get("timing") or {}).get("total")
        if _target(path) > head and isinstance(seconds, int | float):
            total += seconds
    return total


def _attempts(folder: ConfigFolder) -> list[Path]:
    attempts = folder.path / "attempts"
    return sorted(attempts.iterdir()) if attempts.is_dir() else []


def _target(attempt: Path) -> int:
    """`f3.a1` -> 3; 0 for a name that is none of ours."""
    number = attempt.name.split(".")[0].removeprefix("f")
    return int(number) if number.isdecimal() else 0


def _fits(message: StepResult) -> bool:
    try:
        message.encode()
    except MessageError:
        return False
    return True

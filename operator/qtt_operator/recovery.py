"""What an earlier runner's attempt left on disk, read after a `kill -9` of that runner.

The ledger says which attempts were open; the attempt's folder says how far each one came: a result
that carries the attempt's nonce, only a log, or nothing. Reads files, changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtt_core.errors import MessageError
from qtt_core.planner import JobEnd
from qtt_core.results import EXIT_CODES, Epoch, State, StepResult
from qtt_core.steps import Metric
from qtt_operator.names import attempt_folder, checkpoint_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """An attempt that was open when the earlier runner died. `since`: when it was opened."""

    name: str
    kind: str
    c: str
    frm: int
    to: int
    attempt: int
    nonce: str
    since: float
    metric: Metric


def recovered_end(run_dir: Path, orphan: Orphan) -> JobEnd | None:
    """How the attempt ended, or None if it never began (then it is created anew).

    A result of this attempt ends it with that result. A log alone means that the trainer died with
    its runner: `RunnerLost`, charged until the newest file it wrote.
    """
    folder = run_dir / attempt_folder(orphan.c, orphan.to, orphan.attempt)
    newest = newest_mtime(folder)
    result, seconds = None, None
    for place in (folder, run_dir / checkpoint_folder(orphan.c, orphan.to)):
        raw = _read_result(place / "result.json")
        if raw is not None and raw.get("nonce") == orphan.nonce:
            result, seconds = message_of(raw, orphan), _total_seconds(raw)
            newest = newest or newest_mtime(place)
            break
    if newest is None:
        return None
    held = seconds if seconds is not None else max(0.0, newest - orphan.since)
    if result is None:
        return JobEnd(exit_code=None, reason="RunnerLost", device_seconds=held)
    return JobEnd(exit_code=EXIT_CODES[result.state], message=result.encode(), device_seconds=held)


def newest_mtime(folder: Path) -> float | None:
    """When a file of the folder was last written; None if there is none."""
    times = [path.stat().st_mtime for path in folder.glob("*") if path.is_file()]
    return max(times, default=None)


def message_of(raw: Mapping[str, Any], orphan: Orphan) -> StepResult | None:
    """The termination message that belongs to a `result.json`; None if it cannot be rebuilt.

    Values are taken in the metric's native unit; what the reader cannot understand counts as lost,
    and the attempt is then repeated (a committed step answers from its checkpoint at once).
    """
    if isinstance(raw.get("message"), Mapping):
        return _parsed(json.dumps(raw["message"]), orphan)
    try:
        checkpoint, gpu = raw.get("checkpoint") or {}, raw.get("gpu") or {}
        curve = raw.get("curve") or ()
        return StepResult(
            attempt=int(raw["attempt"]),
            nonce=str(raw["nonce"]),
            state=State(raw["state"]),
            reason=str(raw.get("reason") or ""),
            epochs=tuple(_epoch(point, orphan.metric) for point in curve if _asked(point, orphan)),
            checkpoint_sha256=str(checkpoint.get("sha256") or ""),
            checkpoint_bytes=int(checkpoint.get("bytes") or 0),
            timing={str(k): float(v) for k, v in (raw.get("timing") or {}).items()},
            gpu=str(gpu.get("product") or ""),
            memory_mb=int((gpu.get("peak_mem_bytes") or 0) / 2**20),
            micro_batch=int(raw.get("micro_batch") or 0),
            effective_batch=int(raw.get("effective_batch") or 0),
            inert=tuple(str(name) for name in raw.get("inert") or ()),
            cached=bool(raw.get("cached", False)),
            warnings=tuple(str(text) for text in raw.get("warnings") or ()),
            prepared=raw.get("prepared"),
            scores=tuple(raw.get("scores") or ()),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _parsed(text: str, orphan: Orphan) -> StepResult | None:
    try:
        return StepResult.parse(text, nonce=orphan.nonce, attempt=orphan.attempt)
    except MessageError:
        return None


def _asked(point: Mapping[str, Any], orphan: Orphan) -> bool:
    return orphan.frm < int(point["epoch"]) <= orphan.to


def _epoch(point: Mapping[str, Any], metric: Metric) -> Epoch:
    value = point[metric.name] if metric.name in point else point["value"]
    return Epoch(epoch=int(point["epoch"]), value=float(value), seconds=float(point["seconds"]))


def _total_seconds(raw: Mapping[str, Any]) -> float | None:
    timing = raw.get("timing")
    total = timing.get("total") if isinstance(timing, Mapping) else None
    return float(total) if isinstance(total, int | float) and total >= 0 else None


def _read_result(path: Path) -> Mapping[str, Any] | None:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None

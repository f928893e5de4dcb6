"""What a job leaves behind: `result.json`, the termination message, progress (20-trainer 5.5-5.7).

Pure shaping, and small files; without torch, so that failures before any import can be reported
too.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtt_core.errors import MessageError
from qtt_core.results import Epoch, State, StepResult
from qtt_core.steps import METRICS
from qtt_trainer import volume
from qtt_trainer.endings import RETRYABLE

SCHEMA = 1
TERMINATION_LOG = "/dev/termination-log"
PROGRESS_SECONDS = 10.0
CHANNEL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A job's end, for every reader: the message, the file, the exit code."""

    message: StepResult
    result: Mapping[str, Any]
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Which attempt of which step a result belongs to."""

    run_uid: str
    step: str
    config_id: int
    config: Mapping[str, Any]
    attempt: int
    nonce: str
    metric: str = "top1"


def step_result(
    header: Header,
    *,
    state: State,
    reason: str = "",
    curve: Sequence[Mapping[str, Any]] = (),
    fidelity: int = 0,
    cost: float = 0.0,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `result.json` of a step, successful or not.

    `curve`: every epoch of the configuration so far; `cost`: seconds of the epochs newly committed.
    The score is the last epoch's; without one, or when the step failed, the metric's worst value.
    """
    metric = METRICS[header.metric]
    finite = state is State.OK and curve
    score = curve[-1][header.metric] if finite else metric.worst
    best = best_row(curve, header.metric)
    return {
        "schema": SCHEMA,
        "run_uid": header.run_uid,
        "step": header.step,
        "config_id": header.config_id,
        "config": dict(header.config),
        "attempt": header.attempt,
        "nonce": header.nonce,
        "fidelity": fidelity,
        "metric": header.metric,
        "score": score,
        "cost": cost,
        "status": state is State.OK,
        "state": state.value,
        "retryable": state in RETRYABLE,
        "reason": reason,
        "cached": False,
        "curve": [dict(row) for row in curve],
        "best_score": None if best is None else best[header.metric],
        "best_epoch": None if best is None else best["epoch"],
        **(facts or {}),
    }


def best_row(curve: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """The first row with the best value of a metric; None for an empty curve."""
    rule = METRICS[metric]
    return max(curve, key=lambda row: rule.to_score(row[metric]), default=None)


def step_message(result: Mapping[str, Any], *, fidelity_from: int) -> StepResult:
    """The termination message of a step's result: its epochs behind `fidelity_from`."""
    checkpoint = result.get("checkpoint") or {}
    timing = result.get("timing") or {}
    names = {"load": ("startup", "data"), "train": ("train",), "eval": ("eval",)}
    times = {short: sum(timing.get(n, 0.0) for n in long) for short, long in names.items()}
    gpu = result.get("gpu") or {}
    return StepResult(
        attempt=result["attempt"],
        nonce=result["nonce"],
        state=State(result["state"]),
        reason=result["reason"],
        epochs=tuple(
            Epoch(epoch=row["epoch"], value=row[result["metric"]], seconds=row["seconds"])
            for row in result["curve"]
            if row["epoch"] > fidelity_from
        ),
        checkpoint_sha256=checkpoint.get("sha256", ""),
        checkpoint_bytes=checkpoint.get("bytes", 0),
        timing=times
        | {"save": timing.get("checkpoint", 0.0)}
        | {name: timing[name] for name in ("progress", "wait") if timing.get(name)},
        gpu=gpu.get("product", ""),
        memory_mb=int(gpu.get("peak_mem_bytes", 0) / 1e6),
        images_per_second=result.get("images_per_second", 0.0),
        micro_batch=result.get("micro_batch", 0),
        effective_batch=result.get("effective_batch", 0),
        inert=tuple(result.get("inert", ())),
        cached=result["cached"],
        warnings=tuple(result.get("warnings", ())),
    )


def cached_result(stored: Mapping[str, Any], header: Header) -> dict[str, Any]:
    """A committed result, told again for another attempt: nothing was trained, nothing costs."""
    return {
        **stored,
        "attempt": header.attempt,
        "nonce": header.nonce,
        "cached": True,
        "cost": 0.0,
        "timing": {},
    }


def encode_message(message: StepResult) -> str:
    """The message's text; one that is too long becomes `internal` and says so."""
    try:
        return message.encode()
    except MessageError as error:
        short = StepResult(
            attempt=message.attempt,
            nonce=message.nonce,
            state=State.INTERNAL,
            reason=str(error)[:200],
        )
        return short.encode()


def message_path() -> Path | None:
    """Where the message goes: QTT_TERMINATION_LOG, or the kubelet's file if writable."""
    named = os.environ.get("QTT_TERMINATION_LOG")
    if named:
        return Path(named)
    path = Path(TERMINATION_LOG)
    return path if path.is_file() and os.access(path, os.W_OK) else None


def write_message(path: Path | None, text: str) -> None:
    """Write the message in place: the kubelet's file is a mount and cannot be renamed."""
    if path is not None:
        path.write_text(text)


@dataclass(slots=True)
class Progress:
    """Tells the outside how far a step is: stdout, `progress.json`, and a warm parent's pipe.

    stdout gets a line per epoch and every ten seconds; the file is replaced as often; the pipe gets
    a few numbers every half second.
    """

    path: Path | None = None
    channel: Callable[[Mapping[str, Any]], None] | None = None
    housekeep: Callable[[], None] = field(default=lambda: None)
    _next_file: float = field(default=0.0)
    _next_channel: float = field(default=0.0)

    def beat(self, facts: Mapping[str, Any]) -> None:
        """Within an epoch; most calls do nothing."""
        now = time.monotonic()
        if self.channel is not None and now >= self._next_channel:
            self._next_channel = now + CHANNEL_SECONDS
            self.channel(facts)
        if now >= self._next_file:
            self._next_file = now + PROGRESS_SECONDS
            self._publish(facts)

    def epoch(self, facts: Mapping[str, Any]) -> None:
        """At the end of an epoch: everybody is told."""
        if self.channel is not None:
            self.channel(facts)
        self._publish(facts)

    def _publish(self, facts: Mapping[str, Any]) -> None:
        line = {**facts, "time": round(time.time(), 3)}
        sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
        sys.stdout.flush()
        self.housekeep()
        if self.path is not None and self.path.parent.is_dir():
            with contextlib.suppress(OSError):  # a full disk must not end a step for its progress
                volume.replace_json(self.path, line)

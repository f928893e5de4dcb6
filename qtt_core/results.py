"""What a trainer process answers: how it ended, and its termination message (20-trainer 5.4-5.6).

The trainer encodes it, the operator parses it and refuses what is not the attempt's own; both by
this one module. Values are in the metric's native unit here; `qtt_operator.observe` makes scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qtt_core.errors import MessageError
from qtt_core.steps import Metric, canonical_json

MESSAGE_BYTES = 4096


class State(StrEnum):
    """How a trainer process ended (20-trainer 5.4); four are facts of the configuration."""

    OK = "ok"
    DIVERGED = "diverged"
    OOM = "oom"
    INFEASIBLE = "infeasible"
    INVALID_CONFIG = "invalid_config"
    IDENTITY_MISMATCH = "identity_mismatch"
    BAD_DATA = "bad_data"
    DATASET_CHANGED = "dataset_changed"
    INTERNAL = "internal"
    PREEMPTED = "preempted"
    TIMEOUT = "timeout"
    DISK_FULL = "disk_full"
    INFRA_GPU = "infra_gpu"
    INFRA_WORKER = "infra_worker"
    INFRA_STORAGE = "infra_storage"
    WEIGHTS_UNAVAILABLE = "weights_unavailable"
    WEIGHTS_CORRUPT = "weights_corrupt"
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"


EXIT_COMMITTED, EXIT_BAD_JOB, EXIT_BAD_DATA, EXIT_BUG, EXIT_RETRY = 0, 64, 65, 70, 75

EXIT_CODES: Mapping[State, int] = {
    State.OK: EXIT_COMMITTED,
    State.DIVERGED: EXIT_COMMITTED,
    State.OOM: EXIT_COMMITTED,
    State.INFEASIBLE: EXIT_COMMITTED,
    State.INVALID_CONFIG: EXIT_BAD_JOB,
    State.IDENTITY_MISMATCH: EXIT_BAD_JOB,
    State.BAD_DATA: EXIT_BAD_DATA,
    State.DATASET_CHANGED: EXIT_BAD_DATA,
    State.INTERNAL: EXIT_BUG,
    State.PREEMPTED: EXIT_RETRY,
    State.TIMEOUT: EXIT_RETRY,
    State.DISK_FULL: EXIT_RETRY,
    State.INFRA_GPU: EXIT_RETRY,
    State.INFRA_WORKER: EXIT_RETRY,
    State.INFRA_STORAGE: EXIT_RETRY,
    State.WEIGHTS_UNAVAILABLE: EXIT_RETRY,  # 64 when the hub answered 401, 403 or 404
    State.WEIGHTS_CORRUPT: EXIT_RETRY,
    State.CHECKPOINT_CORRUPT: EXIT_RETRY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One trained epoch: absolute number, native metric value, train + evaluation seconds."""

    epoch: int
    value: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The termination message of a trainer process, for every command.

    `epochs` is filled by `step`; `prepared` by `prepare`; `scores` by `evaluate`; `recovered` by
    `recovery`, with the number of configurations that did not fit in `more`.
    """

    attempt: int
    nonce: str
    state: State
    reason: str = ""
    epochs: tuple[Epoch, ...] = ()
    checkpoint_sha256: str = ""
    checkpoint_bytes: int = 0
    timing: Mapping[str, float] = field(default_factory=dict)
    gpu: str = ""
    memory_mb: int = 0
    images_per_second: float = 0.0
    micro_batch: int = 0
    effective_batch: int = 0
    inert: tuple[str, ...] = ()
    cached: bool = False
    warnings: tuple[str, ...] = ()
    prepared: Mapping[str, Any] | None = None
    scores: tuple[Mapping[str, Any], ...] = ()
    recovered: tuple[Mapping[str, Any], ...] = ()
    more: int = 0

    def encode(self) -> str:
        """Compact JSON of at most 4096 bytes; a long reason or warning is cut, never an epoch."""
        for reason_limit in (1000, 200, 40):
            text = canonical_json(self._raw(reason_limit))
            if len(text.encode()) <= MESSAGE_BYTES:
                return text
        raise MessageError(f"termination message of {len(text)} bytes exceeds {MESSAGE_BYTES}")

    def _raw(self, reason_limit: int) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "v": 1,
            "attempt": self.attempt,
            "nonce": self.nonce,
            "state": self.state.value,
            "reason": self.reason[-reason_limit:],
            "t": {name: round(value, 3) for name, value in self.timing.items()},
        }
        if self.epochs:
            raw["epochs"] = [[e.epoch, round(e.value, 6), round(e.seconds, 4)] for e in self.epochs]
        if self.checkpoint_sha256:
            raw |= {"ckpt": self.checkpoint_sha256, "bytes": self.checkpoint_bytes}
        raw |= {
            key: value
            for key, value in (
                ("gpu", self.gpu),
                ("mem_mb", self.memory_mb),
                ("ips", round(self.images_per_second, 2)),
                ("micro", self.micro_batch),
                ("eb", self.effective_batch),
                ("inert", list(self.inert)),
                ("cached", self.cached),
                ("warnings", [text[:reason_limit] for text in self.warnings[:5]]),
                ("prepared", self.prepared),
                ("scores", list(self.scores)),
                ("recovered", list(self.recovered)),
                ("more", self.more),
            )
            if value
        }
        return raw

    @staticmethod
    def parse(text: str, *, nonce: str, attempt: int) -> StepResult:
        """Read a message and refuse what is not this attempt's.

        Raises: MessageError if it is no JSON, of another version, stale, or malformed.
        """
        try:
            raw = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(raw, dict) or raw.get("v") != 1:
                raise MessageError("not a version 1 message")
            if raw["nonce"] != nonce or raw["attempt"] != attempt:
                raise MessageError(
                    f"stale: attempt {raw['attempt']}, nonce {raw['nonce']}; not {attempt}, {nonce}"
                )
            return StepResult(
                attempt=int(raw["attempt"]),
                nonce=str(raw["nonce"]),
                state=State(raw["state"]),
                reason=str(raw.get("reason", "")),
                epochs=tuple(
                    Epoch(epoch=int(e), value=float(v), seconds=float(s))
                    for e, v, s in raw.get("epochs", ())
                ),
                checkpoint_sha256=str(raw.get("ckpt", "")),
                checkpoint_bytes=int(raw.get("bytes", 0)),
                timing={str(k): float(v) for k, v in raw.get("t", {}).items()},
                gpu=str(raw.get("gpu", "")),
                memory_mb=int(raw.get("mem_mb", 0)),
                images_per_second=float(raw.get("ips", 0.0)),
                micro_batch=int(raw.get("micro", 0)),
                effective_batch=int(raw.get("eb", 0)),
                inert=tuple(str(name) for name in raw.get("inert", ())),
                cached=bool(raw.get("cached", False)),
                warnings=tuple(str(text) for text in raw.get("warnings", ())),
                prepared=raw.get("prepared"),
                scores=tuple(raw.get("scores", ())),
                recovered=tuple(raw.get("recovered", ())),
                more=int(raw.get("more", 0)),
            )
        except MessageError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MessageError(f"malformed termination message: {error}") from error

    def check_epochs(self, *, metric: Metric, fidelity_from: int, fidelity_to: int) -> None:
        """Raise MessageError unless the epochs are consecutive, asked for, finite and in range.

        An `ok` result ends at `fidelity_to`; it may begin before `fidelity_from` (a gap was trained
        again), never after. A `diverged` one may stop early or hold no epoch at all.
        """
        numbers = [e.epoch for e in self.epochs]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))) if numbers else False:
            raise MessageError(f"epochs {numbers} are not consecutive")
        if numbers and not (1 <= numbers[0] <= fidelity_from + 1 and numbers[-1] <= fidelity_to):
            raise MessageError(
                f"epochs {numbers[0]}..{numbers[-1]}, asked for {fidelity_from + 1}..{fidelity_to}"
            )
        if self.state is State.OK and (not numbers or numbers[-1] != fidelity_to):
            raise MessageError(f"state ok without epoch {fidelity_to}")
        for e in self.epochs:
            if not metric.in_range(e.value):
                raise MessageError(
                    f"epoch {e.epoch}: {metric.name} {e.value} not in [{metric.low}, {metric.high}]"
                )
            if not math.isfinite(e.seconds) or e.seconds < 0:
                raise MessageError(f"epoch {e.epoch}: {e.seconds} seconds")


def _refuse_constant(name: str) -> float:
    raise MessageError(f"{name} is no JSON number")

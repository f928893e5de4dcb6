"""The types that travel to and from the optimizer: proposals, observations, what it is set up with.

Values flow down the path of one step (optimizer -> planner -> trainer -> ledger -> optimizer);
these are the shapes they flow in. Everything here is frozen, plain data; the wire format is JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qtt_core.errors import MessageError, ObservationError

MAX_JOB_EPOCHS = 150
"""A job never covers more epochs: its termination message must fit into 4096 bytes."""

Scalar = str | int | float | bool | None
Config = Mapping[str, Scalar]
"""A configuration in canonical form: JSON scalars, inactive names absent, off = "none" or 0."""


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces; NaN and infinities are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# --- metrics -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """An objective: its native range and direction, and how it becomes a score in [0, 1]."""

    name: str
    low: float = 0.0
    high: float = 1.0
    maximise: bool = True

    @property
    def worst(self) -> float:
        """The worst native value."""
        return self.low if self.maximise else self.high

    def to_score(self, value: float) -> float:
        """Native value -> score in [0, 1], maximised; `log_loss` by exp(-loss)."""
        return float(value) if self.maximise else math.exp(-value)

    def to_value(self, score: float) -> float:
        """Score -> native value, the inverse of `to_score`."""
        if self.maximise:
            return score
        return self.high if score <= math.exp(-self.high) else -math.log(score)

    def chance(self, num_classes: int) -> float:
        """The score of guessing among balanced classes."""
        if self.name == "top5":
            return min(1.0, 5 / num_classes)
        if self.name == "macro_f1":
            return 1 / num_classes
        return 1 / num_classes  # exp(-log C) for log_loss

    def in_range(self, value: float) -> bool:
        """Whether a native value is finite and possible."""
        return math.isfinite(value) and self.low <= value <= self.high


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="top1"),
        Metric(name="top5"),
        Metric(name="balanced_accuracy"),
        Metric(name="macro_f1"),
        Metric(name="log_loss", high=30.0, maximise=False),
    )
}
"""Every metric the trainer computes each epoch; any of them can be the objective."""


# --- outcomes ----------------------------------------------------------------------------------


class Outcome(StrEnum):
    """What the optimizer is told about a step."""

    OK = "ok"
    DIVERGED = "diverged"
    OOM = "oom"
    INFEASIBLE = "infeasible"


# --- optimizer contract (10-optimizer 5.1) -------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Why a proposal was made: score expected at its horizon, chance to finish, cost, the rule."""

    rule: str
    mean: float | None = None
    sd: float | None = None
    p_finish: float | None = None
    cost_seconds: float | None = None
    rank: int | None = None
    pool: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Only what is known, rounded for reading."""
        raw = {name: getattr(self, name) for name in self.__slots__}
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in raw.items()
            if value is not None
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Why:
        """The inverse of `to_json`; unknown keys of newer versions are dropped."""
        return Why(
            **{name: raw.get(name) for name in Why.__slots__ if name != "rule"},
            rule=str(raw.get("rule", "")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Train `config_id` from its epoch `fidelity_from` to `fidelity_to`."""

    config_id: int
    config: Config
    fidelity_from: int
    fidelity_to: int
    expected_seconds: float
    why: Why

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above."""
        return {
            "config_id": self.config_id,
            "config": dict(self.config),
            "fidelity_from": self.fidelity_from,
            "fidelity_to": self.fidelity_to,
            "expected_seconds": self.expected_seconds,
            "why": self.why.to_json(),
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Proposal:
        """The inverse of `to_json`."""
        return Proposal(**{**raw, "why": Why.from_json(raw["why"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a step showed. `scores` and `seconds` belong to the epochs ending at `fidelity`.

    Units: score in [0, 1] and maximised, seconds of training + evaluation per epoch.
    Both are empty for `oom` and `infeasible` (`fidelity` = the proposal's `fidelity_to`); for
    `diverged` they hold the finite epochs after the last one told; `fidelity` is the failed epoch.
    """

    config_id: int
    fidelity: int
    outcome: Outcome
    scores: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    overhead_seconds: float = 0.0
    gpu: str = ""
    inert: tuple[str, ...] = ()
    effective_batch: int | None = None
    memory_mb: int | None = None

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.seconds):
            raise ObservationError(
                f"configuration {self.config_id}: {len(self.scores)} scores, {len(self.seconds)} s"
            )
        for name, values in (("scores", self.scores), ("seconds", self.seconds)):
            for value in values:
                if not math.isfinite(value) or (name == "seconds" and value < 0):
                    raise ObservationError(
                        f"configuration {self.config_id}: {name} holds {value!r}; use finite ones"
                    )

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above."""
        return {name: _plain(getattr(self, name)) for name in self.__slots__}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Observation:
        """The inverse of `to_json`."""
        return Observation(
            **{
                **raw,
                "outcome": Outcome(raw["outcome"]),
                "scores": tuple(raw["scores"]),
                "seconds": tuple(raw["seconds"]),
                "inert": tuple(raw["inert"]),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetView:
    """What is left to spend; None = not limited. Comes from the ledger, never from a clock."""

    total_seconds: float | None = None
    spent_seconds: float = 0.0
    total_steps: int | None = None
    spent_steps: int = 0
    workers: int = 1

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Predicted scores of a configuration over the epochs t+1 … T."""

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """One observed point: a configuration at a fidelity and its score."""

    config_id: int
    fidelity: int
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The noise-aware incumbent (10-optimizer 5.7), with the best single observation beside it."""

    config_id: int
    fidelity: int
    score: float
    n_val: int | None
    best_observed: Best

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above."""
        best = self.best_observed
        return {
            "config_id": self.config_id,
            "fidelity": self.fidelity,
            "score": self.score,
            "n_val": self.n_val,
            "best_observed": {
                "config_id": best.config_id,
                "fidelity": best.fidelity,
                "score": best.score,
            },
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Recommendation:
        """The inverse of `to_json`."""
        return Recommendation(**{**raw, "best_observed": Best(**raw["best_observed"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Switches of an optimizer, with the product's defaults; None = the algorithm's own."""

    pool_size: int = 512
    initial_configs: tuple[Config, ...] = ()
    goal: float | None = None
    min_gain_per_gpu_hour: float | None = None
    score_range: tuple[float, float] | None = None
    acquisition: str = "EI"
    cost_aware: bool = True
    cost_factor: float | None = None
    init_random: int = 3
    patience: int = 5
    tolerance: float = 1e-3
    refit: str = "Auto"
    steps_per_job: int | None = None
    """Steps a Job, overriding the optimizer's own rung; None = Auto."""
    meta_learning: bool = True
    grey_box: bool = True

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above."""
        return {name: _plain(getattr(self, name)) for name in self.__slots__}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Options:
        """The inverse of `to_json`."""
        score_range = raw.get("score_range")
        return Options(
            **{
                **raw,
                "initial_configs": tuple(raw.get("initial_configs", ())),
                "score_range": None if score_range is None else (score_range[0], score_range[1]),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """An open proposal that ended untold; `retire` = never propose the configuration again.

    `model_gone`: nor any other of its model, whose weights nobody can have.
    """

    config_id: int
    retire: bool = False
    model_gone: bool = False


OptimizerEvent = Proposal | Observation | Abandon
"""What an optimizer is fed, in ledger order: proposals as opened, results, untold ends."""


def event_to_json(event: OptimizerEvent) -> dict[str, Any]:
    """One optimizer event as a JSON object with a single key that names its kind."""
    if isinstance(event, Proposal):
        return {"proposal": event.to_json()}
    if isinstance(event, Observation):
        return {"observation": event.to_json()}
    return {"abandon": {name: getattr(event, name) for name in Abandon.__slots__}}


def event_from_json(raw: Mapping[str, Any]) -> OptimizerEvent:
    """The inverse of `event_to_json`. Raises: MessageError for an unknown kind."""
    if "proposal" in raw:
        return Proposal.from_json(raw["proposal"])
    if "observation" in raw:
        return Observation.from_json(raw["observation"])
    if "abandon" in raw:
        return Abandon(**raw["abandon"])
    raise MessageError(f"unknown optimizer event: {', '.join(sorted(raw)) or 'empty'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSetup:
    """Everything an optimizer worker needs to build its optimizer; plain JSON."""

    algorithm: str
    """The manifest's name (`QuickTune`, …); with `External`, `external` names the entry point."""
    space: str
    hub: Mapping[str, Any]
    """{"name": …, "cards": [...]}, already limited to the run's models."""
    max_fidelity: int
    step: int
    seed: int
    overrides: Mapping[str, str] = field(default_factory=dict)
    in_channels: int = 3
    space_definition: str = ""
    """ConfigSpace's JSON where `space` is `custom` (`configSpaceRef`)."""
    external: str | None = None
    metafeatures: Mapping[str, float] = field(default_factory=dict)
    prior: str = ""
    """A `catalogue.PriorRef` as text; empty: the search starts cold."""
    priors: str = ""
    """Folder of own priors."""
    metric: str = "top1"
    options: Options = Options()

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above."""
        raw = {name: _plain(getattr(self, name)) for name in self.__slots__}
        return raw | {"options": self.options.to_json()}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> OptimizerSetup:
        """The inverse of `to_json`."""
        return OptimizerSetup(**{**raw, "options": Options.from_json(raw["options"])})


# --- decisions -----------------------------------------------------------------------------------


def step_key(config: int | str, fidelity_to: int) -> str:
    """`c12-f3`, or `prepare-f1` for a pseudo-configuration."""
    return f"{'c' if isinstance(config, int) else ''}{config}-f{fidelity_to}"


def decision_hash(
    *,
    uid: str,
    config: int | str,
    fidelity_from: int,
    fidelity_to: int,
    config_digest: str,
    space_sha: str,
    seed: int,
    position: str,
) -> str:
    """Identity of a decision (30-kubernetes 3.1); `position`: last stream id it was told."""
    return digest(
        {
            "uid": uid,
            "c": config,
            "from": fidelity_from,
            "to": fidelity_to,
            "config": config_digest,
            "space": space_sha,
            "seed": seed,
            "position": position,
        }
    )


def nonce(decision: str, attempt: int) -> str:
    """First 16 hex digits of SHA-256(decision, attempt); a result without it is stale."""
    return hashlib.sha256(f"{decision}:{attempt}".encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value

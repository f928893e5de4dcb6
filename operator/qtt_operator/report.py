"""What a run's ledger says to people: leaderboard, statistics, and why the winner won. Pure.

Built from events and configurations alone, so that a finished run, a running one and an exported
ledger give the same rows. Scores become the metric's own value here, for display only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qtt_core.history import ConfigHistory, Standing, histories
from qtt_core.ledger.events import EVALUATION, Done, Event, Note, Open, is_pseudo
from qtt_core.steps import METRICS, Config, Metric, Why
from qtt_operator.names import checkpoint_folder

KEY_SETTINGS = (
    "batch_size", "pct_to_freeze", "linear_probing", "sched", "weight_decay", "data_augmentation",
    "mixup", "smoothing", "drop", "sp_reg", "delta_reg", "bss_reg", "cotuning_reg", "stoch_norm",
)  # fmt: skip
"""Shown after model, optimizer and learning rate, in this order, where they are not off."""

OFF = frozenset({"none", "0", "0.0", "False", "None", ""})


Scores = Mapping[tuple[int, int], Mapping[str, Any]]
"""(config id, epoch) -> n and every metric's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed step: its score in [0, 1] at absolute epoch `epoch`."""

    config_id: int
    epoch: int
    score: float
    sha256: str
    size_bytes: int

    @property
    def folder(self) -> str:
        """Relative to the run's folder."""
        return checkpoint_folder(str(self.config_id), self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A configuration as every verb prints it; first the five of the paper's result dictionary."""

    config_id: int
    score: float | None
    """In [0, 1], maximised, at `fidelity`; None without a result."""
    cost: float
    """Training + evaluation seconds of its epochs."""
    fidelity: int
    """Epochs trained to reach `score`."""
    status: bool
    """False for a configuration that failed (diverged, out of memory, infeasible, refused)."""
    state: str
    value: float | None
    """The metric's own value at `fidelity` (a loss for `log_loss`)."""
    best_score: float | None
    best_epoch: int | None
    epochs: int
    steps: int
    attempts: int
    model: str
    hyperparameters: Config
    device_seconds: float
    """Charged: every attempt, start-up and saving included."""
    overhead_seconds: float
    checkpoint: str
    """Folder relative to the run's; empty without one."""
    reason: str
    rank: int | None = None
    best: bool = False
    """The run's own recommendation."""
    test: float | None = None
    """The metric's value on held-out images, where it was measured."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above."""
        raw = {name: getattr(self, name) for name in self.__slots__}
        return {**raw, "hyperparameters": dict(self.hyperparameters)}


def checkpoints(events: Iterable[Event]) -> dict[int, list[Checkpoint]]:
    """Every committed checkpoint per configuration, oldest first."""
    found: dict[int, list[Checkpoint]] = {}
    for event in events:
        if isinstance(event, Done) and event.ck and event.epochs:
            epoch, score, _ = event.epochs[-1]
            found.setdefault(int(event.c), []).append(
                Checkpoint(
                    config_id=int(event.c), epoch=epoch, score=score,
                    sha256=event.ck, size_bytes=event.bytes,
                )
            )  # fmt: skip
    return found


def with_test(rows: Sequence[Row], scores: Scores, metric: str) -> list[Row]:
    """Rows with the metric's value from an evaluation, where there is one."""
    return [
        replace(row, test=float(found[metric]))
        if (found := scores.get((row.config_id, row.fidelity))) is not None
        else row
        for row in rows
    ]


def evaluated(events: Iterable[Event]) -> Scores:
    """Scores on held-out images that Jobs of a cluster measured, the newest of each checkpoint."""
    found: dict[tuple[int, int], Mapping[str, Any]] = {}
    for event in events:
        if isinstance(event, Note) and event.what == EVALUATION:
            for row in json.loads(event.new):
                found[int(row["config_id"]), int(row["fidelity"])] = row
    return found


def best_checkpoint(of_config: Sequence[Checkpoint]) -> Checkpoint | None:
    """The best-scored one; the earlier of equals, which cost less."""
    return max(of_config, key=lambda item: (item.score, -item.epoch), default=None)


def statistics(
    events: Sequence[Event],
    configs: Mapping[str, Config],
    *,
    metric: Metric,
    recommended: int | None = None,
    kept: Callable[[Checkpoint], bool] | None = None,
) -> list[Row]:
    """Every configuration in the order it was first opened.

    `kept` says whether a checkpoint still exists; without it every committed one counts.
    """
    saved = checkpoints(events)
    return [
        _row(past, _kept(saved.get(past.config_id, []), kept), metric, recommended)
        for past in histories(events, configs).values()
    ]


def leaderboard(
    events: Sequence[Event],
    configs: Mapping[str, Config],
    *,
    metric: Metric,
    recommended: int | None = None,
    top: int | None = None,
    kept: Callable[[Checkpoint], bool] | None = None,
) -> list[Row]:
    """Configurations with a checkpoint, best first; each is shown at its best checkpoint."""
    rows = statistics(events, configs, metric=metric, recommended=recommended, kept=kept)
    scored = [row for row in rows if row.checkpoint and row.score is not None]
    scored.sort(key=lambda row: (-(row.score or 0.0), row.cost, row.config_id))
    ranked = [_ranked(row, position) for position, row in enumerate(scored, start=1)]
    return ranked if top is None else ranked[:top]


def metric_of(spec: Mapping[str, Any]) -> Metric:
    """The objective of a recorded spec; one in [0, 1] for a custom trainer's own name."""
    objective = spec.get("objective") or {}
    name = str(objective.get("metric", "top1"))
    minimise = objective.get("direction") == "Minimize"
    return METRICS.get(name, Metric(name=name, maximise=not minimise))


def _kept(
    saved: Sequence[Checkpoint], kept: Callable[[Checkpoint], bool] | None
) -> Sequence[Checkpoint]:
    return saved if kept is None else [item for item in saved if kept(item)]


def _ranked(row: Row, rank: int) -> Row:
    values = {name: getattr(row, name) for name in row.__slots__}
    return Row(**{**values, "rank": rank})


def _row(
    past: ConfigHistory, saved: Sequence[Checkpoint], metric: Metric, recommended: int | None
) -> Row:
    best = best_checkpoint(saved)
    score = best.score if best else past.last_score
    failed = past.standing.is_closed and past.standing is not Standing.FINISHED
    return Row(
        config_id=past.config_id,
        score=score,
        cost=past.trained_seconds,
        fidelity=best.epoch if best else past.fidelity,
        status=not (failed and past.standing is not Standing.RETIRED),
        state=past.standing.value,
        value=None if score is None else metric.to_value(score),
        best_score=past.best_score,
        best_epoch=past.best_epoch,
        epochs=past.fidelity,
        steps=past.steps,
        attempts=past.attempts,
        model=str(past.config.get("model", "")),
        hyperparameters={k: v for k, v in past.config.items() if k != "model"},
        device_seconds=past.charged_seconds,
        overhead_seconds=past.overhead_seconds,
        checkpoint=best.folder if best else "",
        reason=past.reason,
        best=past.config_id == recommended,
    )


# --- words --------------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """A number as short as it is exact enough: 0.001, 1e-05, 12.3."""
    return f"{value:.{digits}g}"


def shown(value: float, metric: Metric) -> str:
    """A score's value for people: a fraction with four digits, a loss with four."""
    return f"{value:.4f}" if metric.maximise else f"{value:.4g}"


def settings(config: Config, limit: int = 3) -> str:
    """What makes a configuration differ, in a few words: `adamw lr 0.001, batch 32, freeze 0.4`."""
    lr = config.get("lr")
    head = str(config.get("opt", ""))
    if isinstance(lr, int | float):
        head = f"{head} lr {number(lr)}".strip()
    parts = [head] if head else []
    for name in KEY_SETTINGS:
        value = config.get(name)
        if len(parts) > limit or value is None or str(value) in OFF:
            continue
        parts.append(_setting(name, value))
    return ", ".join(parts)


_SHORT = {
    "batch_size": "batch", "pct_to_freeze": "freeze", "weight_decay": "decay",
    "data_augmentation": "augment", "linear_probing": "probe first", "stoch_norm": "stoch-norm",
}  # fmt: skip


def _setting(name: str, value: object) -> str:
    short = _SHORT.get(name, name.removesuffix("_reg").replace("_", " "))
    if value is True:
        return short
    if name == "sched":
        return str(value)
    return f"{short} {number(value) if isinstance(value, int | float) else value}"


def why_it_won(
    events: Sequence[Event],
    board: Sequence[Row],
    *,
    winner: Row,
    metric: Metric,
    spent_seconds: float,
    n_val: int = 0,
) -> str:
    """One sentence: who proposed the winner, what was predicted, what came, and at what price."""
    why = _first_why(events, winner.config_id)
    parts = [f"c{winner.config_id} ({winner.model}, {settings(winner.hyperparameters, 1)})"]
    parts.append(_proposed(why, metric))
    reached = "" if winner.value is None else shown(winner.value, metric)
    share = f"{winner.device_seconds:.1f} of {spent_seconds:.1f} device-seconds"
    parts.append(f"and reached {metric.name} {reached} at epoch {winner.fidelity} using {share}")
    sentence = " ".join(part for part in parts if part)
    runner_up = next((row for row in board if row.config_id != winner.config_id), None)
    if runner_up is not None and runner_up.value is not None:
        other = f"c{runner_up.config_id} ({runner_up.model})"
        ahead = (runner_up.score or 0.0) > (winner.score or 0.0)
        role = "a single better measurement, within the noise, came from" if ahead else "runner-up:"
        sentence += f"; {role} {other} with {shown(runner_up.value, metric)}"
    if n_val:
        sentence += f" ({n_val} validation images)"
    return sentence + "."


def _first_why(events: Iterable[Event], config_id: int) -> Why:
    for event in events:
        if isinstance(event, Open) and not is_pseudo(event.c) and int(event.c) == config_id:
            return Why.from_json(event.why)
    return Why(rule="")


def _proposed(why: Why, metric: Metric) -> str:
    """`was proposed by expected improvement at predicted 0.93 ± 0.03, rank 2 of 512,`."""
    if not why.rule:
        return "was proposed"
    text = f"was proposed by {why.rule}"
    if why.mean is not None:
        text += f" at predicted {predicted(why, metric)}"
    if why.rank is not None and why.pool is not None:
        text += f", rank {why.rank} of {why.pool}"
    return text + ","


def predicted(why: Why, metric: Metric) -> str:
    """Predicted final value ± one deviation, in the metric's own unit; empty if not predicted."""
    if why.mean is None:
        return ""
    value = metric.to_value(why.mean)
    if why.sd is None:
        return f"{value:.3f}"
    half = abs(metric.to_value(min(1.0, why.mean + why.sd)) - value)
    return f"{value:.3f} ± {half:.3f}"

"""A seeded family of made-up finetuning tasks: curves, seconds and failures of any configuration.

For tests and benchmarks of the optimizers only. The shapes are those that real finetuning shows:
rising, saturating, crossing (slow learners that win late), over-fitting, a warm-up that does
nothing, divergence, noise, scores rounded to 1 / n_val, and seconds that span far more than 24 x.
Nothing is fitted to data; a task is a pure function of its seed.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qtt_core.encoding import trainable_share
from qtt_core.hub import Hub
from qtt_core.optimizer import Optimizer
from qtt_core.steps import BudgetView, Config, Observation, Outcome, Proposal, canonical_json

ADAPTIVE = frozenset(("adam", "adamw", "adamp"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What training a configuration to T would show; `diverges_at` is the epoch that fails."""

    truth: tuple[float, ...]
    scores: tuple[float, ...]
    seconds: tuple[float, ...]
    diverges_at: int | None = None


class Task(Protocol):
    """One data set: whatever answers what training a configuration on it shows."""

    def curve(self, config: Config) -> Curve:
        """The curve of a configuration, always the same one."""

    def seconds(self, config: Config) -> float:
        """Mean seconds of an epoch."""


def measured(
    truth: NDArray[np.float64], n_val: int, noise: float, seconds: float, rng: np.random.Generator
) -> Curve:
    """A curve seen through `n_val` images, noise of training and seconds that vary by 8 %."""
    noisy = truth + rng.normal(0, noise, len(truth))
    scores = rng.binomial(n_val, np.clip(noisy, 0, 1)) / n_val
    took = seconds * np.exp(rng.normal(0, 0.08, len(truth)))
    return Curve(
        truth=tuple(truth.tolist()), scores=tuple(scores.tolist()), seconds=tuple(took.tolist())
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTask:
    """One made-up data set. `difficulty` shifts every logit; `n_val` sets noise and rounding."""

    seed: int
    hub: Hub
    max_fidelity: int
    n_val: int = 200
    num_classes: int = 10
    n_train: int = 1000
    _memory: dict[str, Curve] = field(default_factory=dict, repr=False)

    @property
    def metafeatures(self) -> dict[str, float]:
        """What `prepare` would report."""
        return {
            "n_train": self.n_train, "n_val": self.n_val, "num_classes": self.num_classes
        }  # fmt: skip

    def curve(self, config: Config) -> Curve:
        """The curve of a configuration, always the same one."""
        text = canonical_json(dict(config))
        if text not in self._memory:
            self._memory[text] = self._draw(config, zlib.crc32(text.encode()))
        return self._memory[text]

    def _draw(self, config: Config, identity: int) -> Curve:
        rng = np.random.default_rng([self.seed, identity])
        truth = self._truth(config, rng)
        curve = measured(truth, self.n_val, 0.006, self.seconds(config), rng)
        return replace(curve, diverges_at=self._divergence(config, rng))

    def seconds(self, config: Config) -> float:
        """Mean seconds of an epoch."""
        card = self.hub.card(str(config["model"]))
        share = 0.35 + 0.65 * trainable_share(config)
        batch = 1 + 4 / float(config.get("batch_size") or 32)
        compute = 0.3 + math.pow(card.gmacs, 0.75)
        return 1e-3 * self.n_train * compute * share * batch

    # --- the landscape -----------------------------------------------------------------------

    def _effect(self, *parts: object) -> float:
        """A standard normal number that belongs to this task and these words."""
        words = canonical_json([str(part) for part in parts])
        return float(np.random.default_rng([self.seed, zlib.crc32(words.encode())]).normal())

    def _mismatch(self, config: Config) -> float:
        """Decades between the learning rate and the best one for this model and optimizer."""
        best = -3.3 + 0.5 * self._effect("lr") + 0.25 * self._effect("lr", config["model"])
        if config.get("opt") not in ADAPTIVE:
            best += 1.2 if config.get("opt") == "sgd" else 0.8
        if trainable_share(config) == 0:
            best += 0.7
        return math.log10(float(config["lr"] or 1e-5)) - best

    def _asymptote(self, config: Config) -> float:
        """Logit of the score that endless training approaches."""
        accuracy = self.hub.card(str(config["model"])).accuracy or 0.8
        level = 1.2 + 0.8 * self._effect("difficulty")
        level += 9 * (accuracy - 0.86) + 0.6 * self._effect("model", config["model"])
        level -= 0.9 * min(self._mismatch(config) ** 2, 6.0)
        level -= 1.0 * (1 - trainable_share(config)) * abs(self._effect("freeze"))
        for name in sorted(config):
            if name not in {"model", "lr", "batch_size", "pct_to_freeze", "linear_probing"}:
                level += 0.18 * self._effect(name, config[name])
        level += 0.25 * self._effect("pair", config["model"], config.get("data_augmentation"))
        return level

    def _truth(self, config: Config, rng: np.random.Generator) -> np.ndarray:
        """Noise-free scores of the epochs 1..T: a saturating rise, late decline for some."""
        epochs = np.arange(1, self.max_fidelity + 1, dtype=np.float64)
        chance = 1 / self.num_classes
        top = chance + (1 - chance) / (1 + math.exp(-self._asymptote(config)))
        slowness = (
            0.12 * self.max_fidelity * math.exp(0.5 * rng.normal() - 0.5 * self._mismatch(config))
        )
        warm = float(config.get("warmup_epochs") or 0) * self.max_fidelity / 50
        effective = np.maximum(epochs - warm, 0.05)
        rise = 1 - np.exp(-((effective / min(slowness, 3 * self.max_fidelity)) ** 0.7))
        overfit = max(0.0, 0.03 * rng.normal()) * np.maximum(epochs / self.max_fidelity - 0.4, 0)
        return np.asarray(np.clip(chance + (top - chance) * rise - overfit, 0.0, 1.0))

    def _divergence(self, config: Config, rng: np.random.Generator) -> int | None:
        excess = self._mismatch(config) - 1.3 + (0.5 if config.get("clip_grad") == "none" else 0.0)
        if rng.random() >= 1 / (1 + math.exp(-6 * excess)):
            return None
        return 1 + int(rng.integers(max(1, self.max_fidelity // 3)))


# --- simulated runs -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """True score of the recommended checkpoint after each result, by device seconds spent."""

    seconds: tuple[float, ...]
    scores: tuple[float, ...]
    steps: int

    def at(self, seconds: float) -> float:
        """The true score of what was recommended by then; 0 before the first result."""
        count = sum(s <= seconds for s in self.seconds)
        return self.scores[count - 1] if count else 0.0


def answer(task: Task, proposal: Proposal, start_up: float = 0.0) -> Observation:
    """What running a proposal shows."""
    curve = task.curve(proposal.config)
    start, stop = proposal.fidelity_from, proposal.fidelity_to
    failed = curve.diverges_at is not None and curve.diverges_at <= stop
    end = (curve.diverges_at or 1) - 1 if failed else stop
    return Observation(
        config_id=proposal.config_id,
        fidelity=end + 1 if failed else stop,
        outcome=Outcome.DIVERGED if failed else Outcome.OK,
        scores=curve.scores[start:end],
        seconds=curve.seconds[start:end],
        overhead_seconds=start_up,
    )


def simulate(
    optimizer: Optimizer,
    task: Task,
    *,
    total_seconds: float,
    workers: int = 1,
    start_up: float = 0.0,
) -> Trajectory:
    """Run an optimizer against a task with asynchronous workers until the seconds are spent."""
    spent, clock, steps = 0.0, 0.0, 0
    running: list[tuple[float, int, Proposal, Observation]] = []
    times: list[float] = []
    scores: list[float] = []
    while True:
        budget = BudgetView(total_seconds=total_seconds, spent_seconds=spent, workers=workers)
        free = workers - len(running) if spent < total_seconds else 0
        for proposal in optimizer.ask(free, budget) if free else ():
            result = answer(task, proposal, start_up)
            used = sum(result.seconds) + start_up + _lost_epoch(task, proposal, result)
            spent += used
            steps += 1
            heapq.heappush(running, (clock + used, steps, proposal, result))
        if not running:
            return Trajectory(seconds=tuple(times), scores=tuple(scores), steps=steps)
        clock, _, _, result = heapq.heappop(running)
        optimizer.tell(result)
        if clock * workers <= total_seconds * 1.001:
            times.append(clock * workers)
            scores.append(recommended_truth(optimizer, task))


def recommended_truth(optimizer: Optimizer, task: Task) -> float:
    """The noise-free score of what the optimizer recommends now, 0 before it can."""
    found = optimizer.recommend()
    if found is None:
        return 0.0
    config = optimizer.trials.trial(found.config_id).config
    return task.curve(config).truth[found.fidelity - 1]


def _lost_epoch(task: Task, proposal: Proposal, result: Observation) -> float:
    """An epoch that failed was paid for as well."""
    return 0.0 if result.outcome is Outcome.OK else task.seconds(proposal.config)


def best_and_worst(task: Task, configs: Sequence[Config]) -> tuple[float, float]:
    """Highest true score that training any of them reaches, and the lowest first one."""
    curves = [task.curve(config) for config in configs]
    reached = [c.truth[: None if c.diverges_at is None else c.diverges_at - 1] for c in curves]
    return max(max(r) for r in reached if r), min(min(r) for r in reached if r)

"""Learning rate as a pure function of configuration, T and the absolute update (20-trainer 4.2).

Built last, after a checkpoint was loaded: timm's scheduler constructors rewrite every group's rate.
Nothing here is saved; a resumed run computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2

from qtt_core.steps import Config

PLATEAU_THRESHOLD = 1e-4
UPSTREAM_MILESTONES = (90, 180, 270)


@dataclass(frozen=True, slots=True, kw_only=True)
class Horizon:
    """T epochs of the whole curve and the updates in each."""

    epochs: int
    updates_per_epoch: int


class LearningRate:
    """Sets the groups' rates; `lr_scale` of layer decay is multiplied in."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: Config, horizon: Horizon, *, native: bool
    ) -> None:
        self.optimizer, self.config, self.horizon, self.native = optimizer, config, horizon, native
        self.base = float(config["lr"])  # type: ignore[arg-type]  # a number in every space
        self.plateau = config.get("sched") == "plateau"
        self._scheduler: Any = None if self.plateau else self._build()

    def set_epoch(self, epoch: int, history: Sequence[float]) -> None:
        """Before the first update of a (0-based) epoch; `history`: the scores before it."""
        if self.plateau:
            factor = plateau_factor(
                history[:epoch],
                patience=int(self.config.get("patience_epochs") or 5),
                rate=float(self.config.get("decay_rate") or 0.1),
            )
            for group in self.optimizer.param_groups:
                group["lr"] = self.base * factor * float(group.get("lr_scale", 1.0))
        elif not self.native:
            self._scheduler.step(epoch)

    def set_update(self, update: int) -> None:
        """Before the (absolute, 0-based) update."""
        if self.native and not self.plateau:
            self._scheduler.step_update(update)

    def span(self) -> tuple[float, float]:
        """Smallest and largest rate now."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return min(rates), max(rates)

    def _build(self) -> Any:
        warmup = effective_warmup(self.config, self.horizon.epochs)
        sched = self.config.get("sched")
        if sched in (None, "none"):
            sched = "cosine"  # upstream's None ran as cosine
        if sched == "multistep" and self.native:
            return self._multistep(warmup)
        scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=str(sched),
            num_epochs=self.horizon.epochs,
            warmup_epochs=warmup,
            warmup_lr=float(self.config.get("warmup_lr") or 0.0),
            decay_epochs=float(self.config.get("decay_epochs") or 10),
            decay_rate=float(self.config.get("decay_rate") or 0.1),
            decay_milestones=list(UPSTREAM_MILESTONES),
            step_on_epochs=not self.native,
            updates_per_epoch=self.horizon.updates_per_epoch,
        )
        return scheduler

    def _multistep(self, warmup: int) -> MultiStepLRScheduler:
        """Decay at the beginning of the milestones' epochs."""
        updates = self.horizon.updates_per_epoch
        # timm compares milestones with t + 1: one more makes the decay begin at t = milestone.
        milestones = [m * updates + 1 for m in native_milestones(self.horizon.epochs)]
        return MultiStepLRScheduler(
            self.optimizer,
            decay_t=milestones,
            decay_rate=float(self.config.get("decay_rate") or 0.1),
            warmup_t=warmup * updates,
            warmup_lr_init=float(self.config.get("warmup_lr") or 0.0),
            warmup_prefix=False,
            t_in_epochs=False,
        )


def effective_warmup(config: Config, epochs: int) -> int:
    """Warm-up epochs, fewer than T (`warmup >= T` becomes T-1); none for plateau."""
    if config.get("sched") == "plateau":
        return 0
    return min(int(config.get("warmup_epochs") or 0), epochs - 1)


def native_milestones(epochs: int) -> tuple[int, int]:
    """60 and 85 % of T, not before epoch 1; timm's 90, 180, 270 lie beyond most T."""
    return max(1, epochs * 6 // 10), max(1, epochs * 85 // 100)


def plateau_factor(history: Sequence[float], *, patience: int, rate: float) -> float:
    """Product of the decays that a plateau rule has made after the scores in `history`.

    Relative threshold 1e-4, cooldown 0, maximising. Source: torch's `ReduceLROnPlateau`, replayed,
    because a scheduler that is rebuilt at every step never sees a plateau.
    """
    factor, bad = 1.0, 0
    best = float("-inf")
    for score in history:
        if score > best * (1.0 + PLATEAU_THRESHOLD) or best == float("-inf"):
            best, bad = score, 0
        else:
            bad += 1
        if bad > patience:
            factor, bad = factor * rate, 0
    return factor

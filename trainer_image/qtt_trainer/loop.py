"""One epoch of training and its evaluation (20-trainer 4.3-4.7).

Works on a `Session`; told by `step` which epoch and from which update. Every update is seeded by
(epoch, update), so that a resumed epoch continues as if nothing had happened. It writes no files.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from qtt_trainer.freezing import apply_trainable, set_training_modes
from qtt_trainer.keys import key, key32
from qtt_trainer.loaders import EpochBatches
from qtt_trainer.metrics import Evaluator
from qtt_trainer.mixing import mix, soft_cross_entropy
from qtt_trainer.model import has_batchnorm
from qtt_trainer.penalties import (
    batch_spectral_shrinkage,
    co_tuning,
    delta_maps,
    delta_pooled,
    l2_sp,
    pull_to_origin,
)
from qtt_trainer.precision import Precision
from qtt_trainer.session import Session

READ_EVERY = 20
"""Updates between two looks at the device's counters: reading waits for the device."""
DIVERGED_AFTER = 3
MAX_HALVINGS = 6


class DivergedError(Exception):
    """Training produced non-finite numbers; the curve before this epoch stands."""


class StoppedError(Exception):
    """A stop was asked for; the session stands at a clean update."""


class DoesNotFitError(Exception):
    """Out of accelerator memory with the smallest micro-batch."""


@dataclass(slots=True, kw_only=True)
class Pulse:
    """What progress reports show; the loop refreshes it, `report` reads it."""

    epoch: int = 0
    update: int = 0
    updates: int = 0
    train_loss: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    lr: tuple[float, float] = (0.0, 0.0)
    images_per_second: float = 0.0
    data_wait_ratio: float = 0.0
    micro_batch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Callbacks of an epoch: `ready` when the first batch is there, `should_stop` before each
    update, the others after it.
    """

    ready: Callable[[], None]
    should_stop: Callable[[], bool]
    beat: Callable[[Pulse], None]
    save_is_due: Callable[[], bool]
    save: Callable[[], None]


def train_epoch(
    session: Session, loader: DataLoader[Any], *, seed: int, config_id: int, watch: Watch
) -> float:
    """Train from (session.epoch, session.batch) to the end of that epoch; returns the mean loss.

    Units: `session.partial["seconds"]` grows by the productive seconds.
    Raises: StoppedError at a clean update; DivergedError; DoesNotFitError.
    """
    trainer = _Epoch(session, seed=seed, config_id=config_id, should_stop=watch.should_stop)
    batches: EpochBatches = loader.batch_sampler  # type: ignore[assignment]  # set by train_loader
    batches.epoch, batches.start = session.epoch, session.batch
    mark = time.monotonic()
    for images, labels in loader:
        watch.ready()
        if watch.should_stop():
            trainer.sync()
            raise StoppedError
        waited = time.monotonic() - mark
        try:
            trainer.update(images, labels)
        except StoppedError:
            trainer.sync()
            raise
        now = time.monotonic()
        trainer.account(len(labels), seconds=now - mark, waited=waited)
        mark = now
        watch.beat(trainer.pulse)
        if watch.save_is_due():
            trainer.sync()
            watch.save()
            mark = time.monotonic()
    return trainer.finish()


class _Epoch:
    """The state of one epoch's training; lives as long as the epoch."""

    def __init__(
        self, session: Session, *, seed: int, config_id: int, should_stop: Callable[[], bool]
    ) -> None:
        self.session = session
        # An abandoned accumulation leaves its mark on BatchNorm statistics: such models finish it.
        self.may_abandon = should_stop if not has_batchnorm(session.model) else _never
        self.tags = (seed, config_id, "step", session.epoch)
        self.head_only = session.epoch < session.plan.head_only_until
        apply_trainable(session.model, session.plan.names_at(session.epoch))
        set_training_modes(session.model)
        session.schedule.set_epoch(  # type: ignore[union-attr]  # started before the first epoch
            session.epoch, [row["top1"] for row in session.history]
        )
        if session.batch:
            # Where only the evaluation was left, no update sets the rate that the curve tells.
            session.schedule.set_update(session.update - 1)  # type: ignore[union-attr]
        device = session.precision.device
        self.owned = [p for group in session.optimizer.param_groups for p in group["params"]]
        self.loss_sum = torch.tensor(session.partial.get("loss_sum", 0.0), device=device)
        self.bad_run = torch.zeros((), dtype=torch.int64, device=device)
        self.hit = torch.zeros((), dtype=torch.bool, device=device)
        self.parts: dict[str, torch.Tensor] = {}
        self.waited = 0.0
        self.seen_here = 0
        self.seconds_here = 0.0
        self.pulse = Pulse(
            epoch=session.epoch,
            updates=session.horizon.updates_per_epoch,
            micro_batch=session.micro_batch,
        )

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One optimizer update on a logical batch; the session moves on only when it is done."""
        session = self.session
        device = session.precision.device
        session.schedule.set_update(session.update)  # type: ignore[union-attr]
        tags = (*self.tags, session.batch)
        np.random.seed(key32(*tags))
        images = images.to(device, non_blocking=True)
        if session.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        mixed, dense = mix(images, labels.to(device, non_blocking=True), session.targets)
        loss = self._gradients(mixed, dense, tags)
        self._apply()
        bad = ~torch.isfinite(loss)
        self.bad_run = torch.where(bad, self.bad_run + 1, torch.zeros_like(self.bad_run))
        self.hit |= self.bad_run >= DIVERGED_AFTER
        self.loss_sum += torch.where(bad, torch.zeros_like(loss), loss) * len(labels)
        session.batch += 1

    def _gradients(
        self, mixed: torch.Tensor, dense: torch.Tensor, tags: tuple[Any, ...]
    ) -> torch.Tensor:
        """Gradients of the whole batch in micro-batches; halves them when memory runs out."""
        session = self.session
        for _ in range(MAX_HALVINGS + 1):
            torch.manual_seed(key(*tags))
            session.optimizer.zero_grad(set_to_none=True)
            loss = self._accumulate(mixed, dense)
            if loss is not None:
                return loss
            # Here, outside the except block, nothing holds the failed graph any more.
            gc.collect()
            torch.cuda.empty_cache()
            if session.micro_batch <= 2:
                break
            session.micro_batch = max(2, session.micro_batch // 2)
            self.pulse.micro_batch = session.micro_batch
        raise DoesNotFitError(f"micro-batch {session.micro_batch} does not fit into memory")

    def _accumulate(self, mixed: torch.Tensor, dense: torch.Tensor) -> torch.Tensor | None:
        """Loss of the batch with its gradients added up; None when memory ran out."""
        session, total = self.session, torch.zeros((), device=mixed.device)
        self.parts = {}
        try:
            count = micro_batches(len(mixed), session.micro_batch)
            for images, targets in zip(
                mixed.tensor_split(count), dense.tensor_split(count), strict=True
            ):
                if self.may_abandon():
                    raise StoppedError
                share = len(images) / len(mixed)
                loss = self._loss(images, targets, share)
                session.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return total

    def _loss(self, images: torch.Tensor, dense: torch.Tensor, share: float) -> torch.Tensor:
        """`share` * (cross entropy + regularisers) of a micro-batch."""
        session, penalties = self.session, self.session.penalties
        with session.precision.autocast():
            logits, maps = self._forward(images)
        parts = {"ce": soft_cross_entropy(logits, dense, session.targets.class_weights)}
        if not self.head_only:
            if penalties.sp:
                parts["sp"] = penalties.sp * l2_sp(penalties.origins)
            if penalties.delta:
                parts["delta"] = penalties.delta * self._delta(images, maps)
            if penalties.bss and penalties.head_input is not None:
                parts["bss"] = penalties.bss * batch_spectral_shrinkage(
                    penalties.head_input.features
                )
        if penalties.source_head is not None:
            parts["cotuning"] = penalties.cotuning * self._co_tuning(dense)
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + share * value.detach()
        return share * torch.stack(list(parts.values())).sum()

    def _forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits, and the feature maps where DELTA compares them, in one pass."""
        model: Any = self.session.model
        stages = self.session.penalties.stages
        if not stages or self.head_only:
            return model(images), []
        last, maps = model.forward_intermediates(images, indices=list(stages))
        return model.forward_head(last), maps

    def _delta(self, images: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
        session, penalties = self.session, self.session.penalties
        teacher: Any = penalties.teacher
        with torch.no_grad(), session.precision.autocast():
            if penalties.stages:
                theirs = teacher.forward_intermediates(
                    images, indices=list(penalties.stages), intermediates_only=True
                )
            else:
                theirs = teacher.forward_head(teacher.forward_features(images), pre_logits=True)
        if penalties.stages:
            return delta_maps(maps, theirs)
        assert penalties.head_input is not None
        return delta_pooled(penalties.head_input.features, theirs.flatten(1))

    def _co_tuning(self, dense: torch.Tensor) -> torch.Tensor:
        penalties = self.session.penalties
        assert penalties.head_input is not None
        assert penalties.source_head is not None
        assert penalties.relation is not None
        logits = penalties.source_head(penalties.head_input.raw).flatten(1)
        return co_tuning(logits, dense @ penalties.relation)

    def _apply(self) -> None:
        """Unscale, clip, decoupled pull, step, moving average."""
        session = self.session
        limit = session.config.get("clip_grad")
        clip = 0.0 if limit in (None, "none") else float(limit)
        look = session.batch % READ_EVERY == 0
        if clip > 0 or look:
            session.scaler.unscale_(session.optimizer)
            # Over the optimizer's parameters only: fp16 leaves all others scaled.
            gradients = [p.grad for p in self.owned if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if clip > 0:
                torch.nn.utils.clip_grads_with_norm_(self.owned, clip, norm)
            if look:
                self.pulse.grad_norm = _finite(float(norm))
        if session.penalties.decoupled_sp and not self.head_only:
            self._pull()
        session.scaler.step(session.optimizer)
        session.scaler.update()
        if session.ema is not None:
            session.ema.update(session.model, step=session.update)

    def _pull(self) -> None:
        """Apply w <- w - lr * alpha * (w - w0), with each group's own rate."""
        session = self.session
        rates = {
            id(p): float(group["lr"])
            for group in session.optimizer.param_groups
            for p in group["params"]
        }
        alpha = session.penalties.decoupled_sp
        pull_to_origin(
            session.penalties.origins,
            [alpha * rates[id(w)] for w, _ in session.penalties.origins],
        )

    def account(self, images: int, *, seconds: float, waited: float) -> None:
        """Add up seconds and images; look at the device every so often."""
        partial = self.session.partial
        partial["seconds"] = partial.get("seconds", 0.0) + seconds
        partial["images"] = partial.get("images", 0.0) + images
        partial["waited"] = partial.get("waited", 0.0) + waited
        self.waited += waited
        self.seen_here += images
        self.seconds_here += seconds
        self.pulse.update = self.session.batch
        self.pulse.lr = self.session.schedule.span()  # type: ignore[union-attr]
        self.pulse.images_per_second = self.seen_here / max(1e-9, self.seconds_here)
        self.pulse.data_wait_ratio = self.waited / max(1e-9, self.seconds_here)
        if self.session.batch % READ_EVERY == 0:
            self._read()

    def _read(self) -> None:
        if bool(self.hit) and self._scale_is_exhausted():
            raise DivergedError(f"{DIVERGED_AFTER} updates in a row had a non-finite loss")
        partial = self.session.partial
        partial["loss_sum"] = float(self.loss_sum)
        self.pulse.train_loss = _finite(partial["loss_sum"] / max(1.0, partial["images"]))
        # JSON knows no NaN: a term that is not finite is left out.
        parts = {name: float(value) for name, value in self.parts.items()}
        self.pulse.parts = {name: value for name, value in parts.items() if np.isfinite(value)}

    def _scale_is_exhausted(self) -> bool:
        """fp16 skips updates on purpose while it looks for a scale; below 1 it has none left."""
        scaler = self.session.scaler
        if not scaler.is_enabled() or scaler.get_scale() < 1.0:
            return True
        self.hit.zero_()
        return False

    def sync(self) -> None:
        """Bring the device's sums into the session, for a checkpoint."""
        self.session.partial["loss_sum"] = float(self.loss_sum)

    def finish(self) -> float:
        """Mean loss of the epoch. Raises: DivergedError."""
        self._read()
        for parameter in self.owned:
            if not bool(torch.isfinite(parameter).all()):
                raise DivergedError("parameters are no longer finite")
        loss = float(self.loss_sum) / max(1.0, self.session.partial["images"])
        if not np.isfinite(loss):
            raise DivergedError("the sum of the training losses is not finite")
        return loss


def micro_batches(batch: int, largest: int) -> int:
    """Into how many parts of nearly equal size a batch is cut; none has a single image.

    Equal parts, not full ones and a rest: BatchNorm cannot normalise one image. Pairs of an odd
    batch become one part of three.
    """
    return max(1, min(-(-batch // largest), batch // 2))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the accelerator's memory ran out: torch's own error, or a library's workspace."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        "ALLOC_FAILED" in text or "ALLOCATION_FAILED" in text
    )


def _never() -> bool:
    return False


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    num_classes: int,
    precision: Precision,
    should_stop: Callable[[], bool],
) -> Evaluator:
    """Score a model on every image of a loader: nothing dropped, nothing padded.

    Raises: StoppedError between two batches.
    """
    model.eval()
    device = precision.device
    evaluator = Evaluator(num_classes, device)
    for images, labels in loader:
        if should_stop():
            raise StoppedError
        with precision.autocast():
            logits = model(images.to(device, non_blocking=True))
        evaluator.add(logits.float(), labels.to(device, non_blocking=True))
    return evaluator

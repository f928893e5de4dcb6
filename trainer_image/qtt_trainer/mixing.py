"""Targets and mixing: mixup, cutmix, label smoothing, class weights (20-trainer 3.9, 3.12).

Between the loader and the model. Draws from NumPy's global generator through timm's `Mixup`: the
loop seeds it per update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.mixup import Mixup
from torch.nn import functional

from qtt_core.errors import Fault, SpecError
from qtt_core.steps import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """How labels become targets. `mixer` None = nothing is mixed."""

    num_classes: int
    smoothing: float
    mixer: Mixup | None
    class_weights: torch.Tensor | None


def plan_targets(
    config: Config,
    *,
    num_classes: int,
    loss: Mapping[str, Any],
    class_names: Sequence[str],
    train_counts: Sequence[int],
) -> Targets:
    """Targets of a configuration.

    mixup: arXiv 1710.09412, cutmix: 1905.04899, smoothing: 1512.00567 (on = 1-e+e/C, off = e/C).
    Mixing is off when its probability or both strengths are 0.
    Raises: SpecError for class weights that name no class or are not positive.
    """
    smoothing = float(config.get("smoothing") or 0.0)
    mixup, cutmix = float(config.get("mixup") or 0.0), float(config.get("cutmix") or 0.0)
    raw = config.get("mixup_prob")
    probability = 1.0 if raw is None else float(raw)
    mixer = None
    if probability > 0 and (mixup > 0 or cutmix > 0):
        mixer = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=probability,
            switch_prob=0.5,
            mode="batch",
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
    weights = class_weights(loss, class_names=class_names, train_counts=train_counts)
    return Targets(num_classes=num_classes, smoothing=smoothing, mixer=mixer, class_weights=weights)


def class_weights(
    loss: Mapping[str, Any], *, class_names: Sequence[str], train_counts: Sequence[int]
) -> torch.Tensor | None:
    """`task.loss.class_weights` as a vector (C,) whose mean over the training images is 1.

    none, balanced (inverse frequency) or {class: weight}, where absent classes weigh 1.
    Raises: SpecError.
    """
    unknown = sorted(loss.keys() - {"class_weights"})
    if unknown:
        raise SpecError(
            [Fault(f"job.task.loss.{name}", loss[name], "use class_weights") for name in unknown]
        )
    wanted = loss.get("class_weights", "none")
    if wanted in (None, "none"):
        return None
    counts = torch.tensor(train_counts, dtype=torch.float64)
    if wanted == "balanced":
        weights = torch.where(counts > 0, 1.0 / counts.clamp_min(1), 0.0)
    elif isinstance(wanted, Mapping):
        weights = _named_weights(wanted, class_names)
    else:
        expected = "use none, balanced or a mapping {class: weight}"
        raise SpecError([Fault("job.task.loss.class_weights", wanted, expected)])
    return (weights * counts.sum() / (weights * counts).sum()).float()


def _named_weights(wanted: Mapping[str, Any], class_names: Sequence[str]) -> torch.Tensor:
    faults = []
    weights = torch.ones(len(class_names), dtype=torch.float64)
    for name, value in wanted.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name not in class_names:
            faults.append(Fault(f"job.task.loss.class_weights.{name}", value, "no such class"))
        elif not number or not 0 < value < 1e9:
            faults.append(
                Fault(f"job.task.loss.class_weights.{name}", value, "use a positive number")
            )
        else:
            weights[class_names.index(name)] = float(value)
    if faults:
        raise SpecError(faults)
    return weights


def mix(
    images: torch.Tensor, labels: torch.Tensor, targets: Targets
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed images (B, …) and dense targets (B, C) of a *logical* batch, before any splitting.

    timm's mixer needs an even batch: the last sample of an odd one stays as it is. May write into
    `images`.
    """
    dense = one_hot(labels, targets)
    if targets.mixer is None or len(images) < 2:
        return images, dense
    even = len(images) // 2 * 2
    mixed, soft = targets.mixer(images[:even], labels[:even])
    if even < len(images):
        mixed, soft = torch.cat([mixed, images[even:]]), torch.cat([soft, dense[even:]])
    return mixed, soft


def one_hot(labels: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Smoothed one-hot targets, (B,) -> (B, C)."""
    off = targets.smoothing / targets.num_classes
    on = 1.0 - targets.smoothing + off
    dense = torch.full((len(labels), targets.num_classes), off, device=labels.device)
    return dense.scatter_(1, labels[:, None], on)


def soft_cross_entropy(
    logits: torch.Tensor, dense: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Mean over the batch of -sum_c w_c * t_c * log softmax(logits)_c; w = 1 without weights."""
    terms = dense * functional.log_softmax(logits.float(), dim=1)
    if weights is not None:
        terms = terms * weights
    return -terms.sum(dim=1).mean()

"""Regularisers towards the pretrained model: L2-SP, DELTA, BSS, Co-Tuning (20-trainer 3).

| Symbol | Meaning | Shape |
|---|---|---|
| w, w0 | trained and pretrained weights of the backbone | |
| F | pre-logits of a (micro-)batch, dropout included | (B, D) |
| FM_j | feature map j of student or teacher | (B, C_j, H_j, W_j) |
| sigma_{-i} | i-th smallest singular value of F | |
| P | source-class distribution of each target class | (C, C_source) |

Each value is a scalar in float32, computed outside autocast; the loop adds coefficient * value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from qtt_trainer import volume

BSS_VALUES = 1
BSS_MIN_BATCH = 8
"""With two samples the "smallest" singular value holds half of the energy."""
MAX_STAGES = 4


def l2_sp(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Sum of squares of w - w0 over (w, w0) pairs; its gradient at w = w0 is 0.

    Source: Li et al., ICML 2018 (arXiv 1802.01483): alpha/2 times this. The public tool (compat)
    uses alpha times it; there the caller's coefficient is twice as large.
    """
    total = torch.zeros((), dtype=torch.float32)
    for weight, origin in pairs:
        total = total.to(weight.device) + (weight.float() - origin).square().sum()
    return total


@torch.no_grad()
def pull_to_origin(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], strengths: Iterable[float]
) -> None:
    """Decoupled L2-SP: w <- w - strength * (w - w0), strength = learning rate * alpha.

    As decoupled weight decay (arXiv 1711.05101), with w0 in place of the origin.
    """
    for (weight, origin), strength in zip(pairs, strengths, strict=True):
        weight.lerp_(origin.to(weight.dtype), strength)


def delta_pooled(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of the squared L2 distance of pooled pre-logits, (B, D) each.

    Source: Li et al., DELTA, ICLR 2019 (arXiv 1901.09229), unweighted ("behavioural"), as the
    public
    tool has it on one layer; the mean instead of its sum, which made the strength follow the batch.
    """
    return (student.float() - teacher.float()).square().sum(dim=1).mean()


def delta_maps(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over the stages of the mean square difference of the feature maps.

    Source: DELTA without the channel weights, over several stages.
    """
    terms = [
        (mine.float() - theirs.float()).square().mean()
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).sum()


def evenly_spaced(count: int, most: int = MAX_STAGES) -> list[int]:
    """At most `most` indices out of `count`, evenly spaced, the last one included."""
    taken = min(count, most)
    return [round((i + 1) * count / taken) - 1 for i in range(taken)]


def batch_spectral_shrinkage(features: torch.Tensor, k: int = BSS_VALUES) -> torch.Tensor:
    """Sum of squares of the k smallest singular values of the (B, D) pre-logits.

    Source: Chen et al., Batch Spectral Shrinkage, NeurIPS 2019, eq. 3. Computed as the smallest
    eigenvalues of the smaller Gram matrix, in float64: half precision has no such decomposition
    and float32 would lose what is small. Zero, without a gradient, when F is not finite.
    """
    wide = features.double()
    if not bool(torch.isfinite(wide).all()):
        return torch.zeros((), device=features.device)
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values: torch.Tensor = torch.linalg.eigvalsh(gram)  # ascending
    return values[:k].clamp_min(0).sum().float()


def co_tuning(source_logits: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the source head against p(y_s | y_t), both (B, C_source).

    Source: You et al., Co-Tuning, NeurIPS 2020, eq. 3 (direct relationship).
    """
    return -(relation * functional.log_softmax(source_logits.float(), dim=1)).sum(dim=1).mean()


@torch.no_grad()
def relationship(
    pretrained: nn.Module,
    loader: DataLoader[tuple[torch.Tensor, torch.Tensor]],
    *,
    num_classes: int,
    device: torch.device,
) -> torch.Tensor:
    """P: mean source softmax of each target class over the training images, (C, C_source).

    `loader` must use the evaluation transform on the *training* split; validation labels are never
    read. A class without images gets the uniform row.
    Source: You et al., section 3.2, direct form (the reverse form needs source data).
    """
    sums: torch.Tensor | None = None
    counts = torch.zeros(num_classes, device=device)
    for images, labels in loader:
        labels = labels.to(device)
        probabilities = pretrained(images.to(device)).float().softmax(dim=1)
        if sums is None:
            sums = torch.zeros(num_classes, probabilities.shape[1], device=device)
        sums.index_add_(0, labels, probabilities)
        counts += torch.bincount(labels, minlength=num_classes)
    assert sums is not None
    uniform = torch.full_like(sums, 1.0 / sums.shape[1])
    return torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), uniform)


def load_relationship(path: Path) -> torch.Tensor | None:
    """A cached P, or None; a damaged file counts as absent."""
    if not path.is_file():
        return None
    try:
        return load_file(path).get("relationship")
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # its own class derives from Exception alone
            raise
        return None


def store_relationship(path: Path, relation: torch.Tensor) -> None:
    """Cache P; losing a race against another step is fine, both hold the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save({"relationship": relation.cpu().contiguous()})
    fresh = path.with_name(f".{path.name}.{id(relation)}")
    try:
        volume.write_durably(fresh, lambda file: (file.write(data), None)[1])
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)

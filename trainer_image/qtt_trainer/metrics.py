"""The five metrics of an evaluation, from counts on the device (20-trainer 4.6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SMALLEST_PROBABILITY = 1e-13
"""log_loss clips here, so that its worst value stays below 30."""
MAX_CONFUSION_CLASSES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The five metrics in their native range; `recall` and `confusion` for the report."""

    values: Mapping[str, float]
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    count: int

    @property
    def finite(self) -> bool:
        """False when the model put out NaN."""
        return all(np.isfinite(value) for value in self.values.values())


class Evaluator:
    """Adds up batches; `scores` reads the totals."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        wide = num_classes if num_classes <= MAX_CONFUSION_CLASSES else 0
        self._hits = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._support = torch.zeros_like(self._hits)
        self._predicted = torch.zeros_like(self._hits)
        self._confusion = torch.zeros(wide * wide, dtype=torch.int64, device=device)
        self._top5 = torch.zeros((), dtype=torch.int64, device=device)
        # Some accelerators have no float64; float32 is enough for a sum of 1e5 losses.
        kind = torch.float64 if device.type in {"cpu", "cuda"} else torch.float32
        self._loss = torch.zeros((), dtype=kind, device=device)

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: logits (B, C), labels (B,)."""
        guess = logits.argmax(dim=1)
        right = guess == labels
        count = self.num_classes
        self._hits += torch.bincount(labels[right], minlength=count)
        self._support += torch.bincount(labels, minlength=count)
        self._predicted += torch.bincount(guess, minlength=count)
        if len(self._confusion):
            self._confusion += torch.bincount(labels * count + guess, minlength=count * count)
        best = logits.topk(min(5, count), dim=1).indices
        self._top5 += (best == labels[:, None]).any(dim=1).sum()
        chosen = logits.float().softmax(dim=1).gather(1, labels[:, None])
        self._loss -= chosen.clamp_min(SMALLEST_PROBABILITY).log().sum().to(self._loss.dtype)

    def scores(self) -> Scores:
        """The metrics of everything added so far.

        balanced_accuracy and macro_f1 are means over the classes present, as scikit-learn's with
        `labels=` the classes present.
        """
        hits, support, predicted = (
            t.cpu().numpy().astype(np.float64) for t in (self._hits, self._support, self._predicted)
        )
        total = support.sum()
        present = support > 0
        recall = np.divide(hits, support, out=np.zeros_like(hits), where=present)
        f1 = 2 * hits / np.maximum(support + predicted, 1)
        values = {
            "top1": hits.sum() / total,
            "top5": int(self._top5) / total,
            "balanced_accuracy": recall[present].mean(),
            "macro_f1": f1[present].mean(),
            "log_loss": float(self._loss) / total,
        }
        return Scores(
            values={name: float(value) for name, value in values.items()},
            recall=tuple(float(r) if p else None for r, p in zip(recall, present, strict=True)),
            confusion=self._matrix(),
            count=int(total),
        )

    def _matrix(self) -> tuple[tuple[int, ...], ...] | None:
        if not len(self._confusion):
            return None
        rows: list[list[int]] = self._confusion.view(self.num_classes, -1).tolist()
        return tuple(tuple(row) for row in rows)

    def per_class(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Recall per class name and the confusion matrix, as JSON."""
        scores = self.scores()
        return {
            "recall": dict(zip(names, scores.recall, strict=True)),
            "confusion": None if scores.confusion is None else [list(r) for r in scores.confusion],
        }

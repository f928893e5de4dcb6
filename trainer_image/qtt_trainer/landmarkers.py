"""Two numbers that say how far a data set is from what a model was pretrained on.

1-NN and linear-probe top-1 on frozen features of the smallest model of the hub whose weights are at
hand (20-trainer 8). The number of images follows from the model's GMACs, not from a clock: the same
data set gives the same numbers on any machine. Loads torch; called by `prepare` when all is well.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qtt_core.hub import ModelCard
from qtt_trainer.dataset_manifest import Sample
from qtt_trainer.decode import read_image
from qtt_trainer.metafeatures import spread
from qtt_trainer.pretrained import find_weights
from qtt_trainer.splits import Assignment

if TYPE_CHECKING:
    from torch import nn

    from qtt_trainer.transforms import Transform

log = logging.getLogger(__name__)

GMACS = 40.0
"""Work allowed: a few seconds of one CPU core."""
MAX_IMAGES, MIN_IMAGES = 2000, 200
MAX_SIDE = 128
FIT_SHARE = 0.75
BATCH = 64
RIDGE = 1e-2

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def smallest(cards: Sequence[ModelCard], cache: str = "") -> ModelCard | None:
    """The card of fewest parameters whose weights are at hand."""
    by_size = sorted(cards, key=lambda card: (card.params, card.name))
    return next((card for card in by_size if find_weights(card, cache) is not None), None)


def landmarkers(
    card: ModelCard,
    assignment: Assignment,
    root: Path,
    *,
    cache: str = "",
    img_size: int | None = None,
    channels: int = 3,
) -> dict[str, float]:
    """Top-1 in [0, 1] on validation images of a 1-NN (cosine) and of a ridge probe.

    Raises: EndedError if the weights are damaged or do not fit their architecture.
    """
    side = _side(card, img_size)
    limit = int(min(MAX_IMAGES, max(MIN_IMAGES, GMACS / card.gmacs_at(side))))
    model, transform = _frozen(card, cache, side, channels)
    fit, score = (
        _features(model, transform, root, _some(assignment, split, int(limit * share)), channels)
        for split, share in (("train", FIT_SHARE), ("val", 1 - FIT_SHARE))
    )
    return {
        "landmarker_1nn": round(nearest_neighbour(*fit, *score), 4),
        "landmarker_probe": round(ridge_probe(*fit, *score), 4),
    }


def nearest_neighbour(x: Floats, y: Labels, x_new: Floats, y_new: Labels) -> float:
    """Top-1 of the nearest training feature by cosine. Shapes: x (n, d), y (n,), x_new (m, d)."""
    similarity = _unit(x_new) @ _unit(x).T
    return float((y[similarity.argmax(axis=1)] == y_new).mean())


def ridge_probe(x: Floats, y: Labels, x_new: Floats, y_new: Labels) -> float:
    """Top-1 of ridge regression onto one-hot labels, in closed form. Shapes as above."""
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
    a, b = ((values.astype(np.float64) - mean) / std for values in (x, x_new))
    targets = np.eye(int(max(y.max(), y_new.max())) + 1)[y]
    penalty = RIDGE * len(a) * np.eye(a.shape[1])
    coefficients = np.linalg.solve(a.T @ a + penalty, a.T @ (targets - targets.mean(axis=0)))
    predicted = (b @ coefficients + targets.mean(axis=0)).argmax(axis=1)
    return float((predicted == y_new).mean())


def _side(card: ModelCard, img_size: int | None) -> int:
    wanted = img_size or card.input_size
    if not card.fits(wanted):
        return card.input_size
    return wanted if card.fixed_size else min(wanted, max(MAX_SIDE, 32))


def _some(assignment: Assignment, split: str, limit: int) -> list[Sample]:
    samples = assignment.splits[split].samples
    return [samples[i] for i in spread(len(samples), limit)]


def _frozen(card: ModelCard, cache: str, side: int, channels: int) -> tuple[nn.Module, Transform]:
    """The pretrained model in evaluation mode and its evaluation transform."""
    from qtt_trainer.model import BuildRequest, build_model
    from qtt_trainer.transforms import build_transforms

    request = BuildRequest(
        card=card,
        num_classes=2,  # the head is not used
        in_chans=channels,
        img_size=side,
        weights_cache=cache,
        offline=True,
    )
    built = build_model(request)
    return built.model.eval(), build_transforms(built.data_config, {}, side, train=False)


def _features(
    model: nn.Module, transform: Transform, root: Path, samples: Sequence[Sample], channels: int
) -> tuple[Floats, Labels]:
    """(pre-logits (n, d) float32, labels (n,))."""
    import torch

    parts = []
    with torch.no_grad():
        for start in range(0, len(samples), BATCH):
            images = [
                transform(read_image(root / path, channels=channels))
                for path, _ in samples[start : start + BATCH]
            ]
            features = model.forward_features(torch.stack(images))  # type: ignore[operator]
            head = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
            parts.append(head.flatten(1).numpy())
    return np.concatenate(parts), np.array([label for _, label in samples], np.int64)


def _unit(values: Floats) -> Floats:
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.maximum(norms, 1e-12), np.float32)

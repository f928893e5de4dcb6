"""Mixup, cutmix, smoothing and class weights against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from qtt_core.errors import SpecError
from qtt_trainer.mixing import class_weights, mix, one_hot, plan_targets, soft_cross_entropy

NAMES = ("cat", "dog", "owl")


def plan(settings: dict[str, Any], **loss: Any) -> Any:
    return plan_targets(
        settings, num_classes=3, loss=loss, class_names=NAMES, train_counts=(6, 3, 1)
    )


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(n))
    return images, torch.arange(n) % 3


@pytest.mark.parametrize(
    "settings",
    [{}, {"mixup": 0, "cutmix": 0}, {"mixup": 0.4, "mixup_prob": 0}, {"mixup": None}],
    ids=["absent", "zero", "never", "null"],
)
def test_without_strength_or_probability_nothing_is_mixed(settings: dict[str, Any]) -> None:
    images, labels = batch(4)

    mixed, dense = mix(images.clone(), labels, plan(settings))

    assert torch.equal(mixed, images)
    assert torch.equal(dense, functional.one_hot(labels, 3).float())


def test_mixup_blends_each_image_with_its_mirror_and_the_targets_alike() -> None:
    images, labels = batch(4)
    np.random.seed(5)
    mixed, dense = mix(images.clone(), labels, plan({"mixup": 1.0}))
    np.random.seed(5)
    np.random.rand()
    share = np.random.beta(1.0, 1.0)

    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    hard = functional.one_hot(labels, 3).float()
    torch.testing.assert_close(dense, share * hard + (1 - share) * hard.flip(0))


def test_cutmix_targets_follow_the_pasted_area() -> None:
    images, labels = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    images[1] = 1.0
    np.random.seed(3)

    mixed, dense = mix(images, labels, plan({"cutmix": 1.0}))

    pasted = float(mixed[0].mean())
    assert 0 < pasted < 1
    assert float(dense[0, 1]) == pytest.approx(pasted, abs=1e-6)


def test_the_last_of_an_odd_batch_stays_unmixed() -> None:
    images, labels = batch(5)
    np.random.seed(0)

    mixed, dense = mix(images.clone(), labels, plan({"mixup": 1.0, "smoothing": 0.1}))

    assert torch.equal(mixed[4], images[4])
    assert not torch.equal(mixed[0], images[0])
    torch.testing.assert_close(dense[4], one_hot(labels, plan({"smoothing": 0.1}))[4])


def test_smoothing_gives_torchs_label_smoothing_loss() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 2, 1, 0])

    got = soft_cross_entropy(logits, one_hot(labels, plan({"smoothing": 0.1})), None)

    torch.testing.assert_close(got, functional.cross_entropy(logits, labels, label_smoothing=0.1))


def test_balanced_weights_are_inverse_frequencies_with_mean_one_over_the_images() -> None:
    weights = class_weights(
        {"class_weights": "balanced"}, class_names=NAMES, train_counts=(6, 3, 1)
    )

    assert weights is not None
    torch.testing.assert_close(weights * torch.tensor([6.0, 3.0, 1.0]), torch.full((3,), 10 / 3))


def test_named_weights_scale_the_loss_of_their_class() -> None:
    weights = class_weights(
        {"class_weights": {"owl": 3}}, class_names=NAMES, train_counts=(1, 1, 1)
    )
    logits, labels = torch.zeros(3, 3), torch.arange(3)

    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([0.6, 0.6, 1.8]))
    got = soft_cross_entropy(logits, one_hot(labels, plan({})), weights)
    assert float(got) == pytest.approx(np.log(3))


@pytest.mark.parametrize(
    ("loss", "field"),
    [
        ({"class_weights": "heavy"}, "class_weights"),
        ({"class_weights": {"fox": 1}}, "class_weights.fox"),
        ({"class_weights": {"cat": 0}}, "class_weights.cat"),
        ({"class_weights": {"cat": True}}, "class_weights.cat"),
        ({"focal": 2}, "loss.focal"),
    ],
)
def test_a_wrong_loss_is_named(loss: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError, match=field):
        class_weights(loss, class_names=NAMES, train_counts=(1, 1, 1))


@pytest.mark.parametrize("probability", [0.25, 0.75])
def test_a_batch_is_mixed_as_often_as_its_probability_says(probability: float) -> None:
    targets = plan({"mixup": 0.4, "cutmix": 0.4, "mixup_prob": probability})
    images, labels = batch(4)
    mixed = by_mixup = 0
    for number in range(800):
        np.random.seed(number)
        got, _ = mix(images.clone(), labels, targets)
        changed = not torch.equal(got, images)
        mixed += changed
        # Mixup changes every pixel of every image, cutmix a box of each.
        by_mixup += changed and bool((got != images).flatten(1).all())

    assert mixed / 800 == pytest.approx(probability, abs=0.06)
    assert by_mixup / mixed == pytest.approx(0.5, abs=0.1)

"""The five metrics against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from qtt_core.steps import METRICS
from qtt_trainer.metrics import Evaluator


def evaluate(logits: torch.Tensor, labels: torch.Tensor, batch: int) -> Evaluator:
    evaluator = Evaluator(logits.shape[1], torch.device("cpu"))
    for part in zip(logits.split(batch), labels.split(batch), strict=True):
        evaluator.add(*part)
    return evaluator


@pytest.mark.parametrize("classes", [2, 3, 7, 250])
@pytest.mark.parametrize("batch", [1, 17, 1000])
def test_all_metrics_equal_scikit_learns(classes: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(400, classes, generator=generator)
    # One class is missing in val: means go over the classes present.
    labels = torch.randint(0, classes - (classes > 2), (400,), generator=generator)
    logits[torch.arange(400), labels] += 1.5
    guess, truth = logits.argmax(1).numpy(), labels.numpy()
    present = np.unique(truth)
    probabilities = logits.double().softmax(1).numpy()

    values = evaluate(logits, labels, batch).scores().values

    assert values.keys() == METRICS.keys()
    assert values["top1"] == pytest.approx(reference.accuracy_score(truth, guess))
    assert values["balanced_accuracy"] == pytest.approx(
        reference.recall_score(truth, guess, labels=present, average="macro")
    )
    assert values["macro_f1"] == pytest.approx(
        reference.f1_score(truth, guess, labels=present, average="macro")
    )
    assert values["log_loss"] == pytest.approx(
        reference.log_loss(truth, probabilities, labels=np.arange(classes)), rel=1e-5
    )
    expected = 1.0
    if classes > 5:
        expected = reference.top_k_accuracy_score(truth, probabilities, k=5, labels=range(classes))
    assert values["top5"] == pytest.approx(expected)


def test_recall_and_confusion_are_reported_per_class() -> None:
    logits = torch.eye(3)[[0, 1, 1, 0]]
    labels = torch.tensor([0, 1, 0, 0])

    report = evaluate(logits, labels, 4).per_class(("a", "b", "c"))

    assert report["recall"] == {"a": pytest.approx(2 / 3), "b": 1.0, "c": None}
    expected = reference.confusion_matrix(labels, logits.argmax(1), labels=[0, 1, 2])
    assert report["confusion"] == expected.tolist()


def test_the_worst_loss_stays_in_the_metrics_range() -> None:
    logits, labels = torch.tensor([[1000.0, -1000.0]]), torch.tensor([1])

    loss = evaluate(logits, labels, 1).scores().values["log_loss"]

    assert METRICS["log_loss"].in_range(loss)
    assert loss == pytest.approx(29.934, abs=1e-2)


def test_nan_outputs_are_not_finite_scores() -> None:
    scores = evaluate(torch.full((2, 3), float("nan")), torch.tensor([0, 1]), 2).scores()

    assert not scores.finite

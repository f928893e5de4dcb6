"""L2-SP, DELTA, BSS and Co-Tuning against closed forms, NumPy and autograd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from qtt_trainer.penalties import (
    batch_spectral_shrinkage,
    co_tuning,
    delta_maps,
    delta_pooled,
    evenly_spaced,
    l2_sp,
    load_relationship,
    pull_to_origin,
    relationship,
    store_relationship,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_l2_sp_pulls_with_twice_the_distance_and_not_at_all_at_the_origin() -> None:
    origin = rand(4, 3)
    moved = (origin + rand(4, 3, seed=1)).requires_grad_()
    at_origin = origin.clone().requires_grad_()

    l2_sp([(moved, origin), (at_origin, origin)]).backward()

    torch.testing.assert_close(moved.grad, 2 * (moved.detach() - origin))
    assert torch.equal(at_origin.grad, torch.zeros(4, 3))


def test_decoupled_l2_sp_moves_by_strength_times_the_distance() -> None:
    origin, weight = rand(5), rand(5, seed=1)
    expected = weight - 0.02 * (weight - origin)

    pull_to_origin([(weight, origin)], [0.02])

    torch.testing.assert_close(weight, expected)


def test_delta_on_pooled_features_is_the_mean_squared_distance_of_the_samples() -> None:
    a, b = rand(6, 8), rand(6, 8, seed=1)

    expected = np.mean([np.sum((a[i].numpy() - b[i].numpy()) ** 2) for i in range(6)])

    assert float(delta_pooled(a, b)) == pytest.approx(expected, rel=1e-5)
    assert float(delta_pooled(a, a)) == 0.0


def test_delta_on_maps_adds_the_stages_means() -> None:
    mine, theirs = (
        [rand(2, 3, 4, 4), rand(2, 5, 2, 2)],
        [rand(2, 3, 4, 4, seed=1), rand(2, 5, 2, 2)],
    )

    expected = float(((mine[0] - theirs[0]) ** 2).mean())

    assert float(delta_maps(mine, theirs)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [0]), (4, [0, 1, 2, 3]), (12, [2, 5, 8, 11]), (24, [5, 11, 17, 23])]
)
def test_stages_are_evenly_spaced_and_end_with_the_last(count: int, chosen: list[int]) -> None:
    assert evenly_spaced(count) == chosen


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
@pytest.mark.parametrize("k", [1, 3])
def test_bss_is_the_sum_of_the_smallest_squared_singular_values(
    shape: tuple[int, int], k: int
) -> None:
    features = rand(*shape).requires_grad_()
    values = np.linalg.svd(features.detach().double().numpy(), compute_uv=False)

    got = batch_spectral_shrinkage(features, k)
    got.backward()

    expected = float(np.sum(np.sort(values)[:k] ** 2))
    assert float(got.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    reference = features.detach().double().requires_grad_()
    (torch.linalg.svdvals(reference)[-k:] ** 2).sum().backward()
    torch.testing.assert_close(features.grad.double(), reference.grad, atol=1e-5, rtol=1e-4)


def test_bss_is_zero_for_features_that_are_not_finite() -> None:
    assert float(batch_spectral_shrinkage(torch.full((8, 8), float("nan")))) == 0.0


def test_bss_works_on_half_precision_features() -> None:
    features = rand(8, 16)

    exact = float(batch_spectral_shrinkage(features))

    assert float(batch_spectral_shrinkage(features.bfloat16())) == pytest.approx(exact, rel=0.1)


def test_co_tuning_is_the_cross_entropy_of_two_distributions() -> None:
    logits, relation = rand(5, 7), rand(5, 7, seed=1).softmax(1)

    got = co_tuning(logits, relation)

    expected = torch.nn.functional.cross_entropy(logits, relation)
    torch.testing.assert_close(got, expected)


def test_the_relationship_is_the_classes_mean_source_prediction() -> None:
    source = nn.Linear(4, 9)
    inputs, labels = rand(10, 4), torch.tensor([0, 0, 0, 2, 2, 0, 2, 2, 2, 0])
    loader = DataLoader(list(zip(inputs, labels, strict=True)), batch_size=3)  # type: ignore[arg-type]

    got = relationship(source, loader, num_classes=3, device=torch.device("cpu"))

    with torch.no_grad():
        p = source(inputs).softmax(1)
    torch.testing.assert_close(got[0], p[labels == 0].mean(0))
    torch.testing.assert_close(got[2], p[labels == 2].mean(0))
    torch.testing.assert_close(got[1], torch.full((9,), 1 / 9))
    torch.testing.assert_close(got.sum(1), torch.ones(3))


def test_a_stored_relationship_comes_back_and_a_damaged_one_counts_as_absent(
    tmp_path: Path,
) -> None:
    path, relation = tmp_path / "deep" / "p.safetensors", rand(3, 4)

    assert load_relationship(path) is None
    store_relationship(path, relation)

    torch.testing.assert_close(load_relationship(path), relation)
    path.write_bytes(b"no tensors here")
    assert load_relationship(path) is None
    assert [p.name for p in path.parent.iterdir()] == ["p.safetensors"]

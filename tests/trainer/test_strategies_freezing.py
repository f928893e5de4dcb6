"""pct_to_freeze, linear probing and LP-FT on the architectures of timm's test family."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from qtt_trainer.freezing import (
    apply_trainable,
    frozen_names,
    layer_groups,
    plan_freezing,
    set_training_modes,
)
from qtt_trainer.model import classifier_prefixes, is_head

MODELS = ("test_resnet", "test_convnext", "test_vit", "test_efficientnet", "test_byobnet")
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return timm.create_model(request.param, num_classes=5)


def head_names(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_parameters() if is_head(n, classifier_prefixes(model))}


def test_more_is_frozen_with_a_larger_share_and_all_of_the_backbone_at_one(
    model: nn.Module,
) -> None:
    frozen = [frozen_names(model, share) for share in SHARES]

    assert frozen[0] == frozenset()
    assert all(less <= more for less, more in pairwise(frozen))
    assert frozen[-1] == {n for n, _ in model.named_parameters()} - head_names(model)


def test_group_i_of_n_is_frozen_from_the_share_i_plus_one_over_n_on(model: nn.Module) -> None:
    groups = group_parameters(model, model.group_matcher(coarse=False))
    head = head_names(model)
    ordered = [set(names) - head for _, names in sorted(groups.items())]
    ordered = [names for names in ordered if names]

    for i, names in enumerate(ordered):
        share = (i + 1) / len(ordered)
        assert names <= frozen_names(model, share)
        assert not names & frozen_names(model, share - 1e-6)


def test_a_model_without_a_group_matcher_falls_back_to_blocks_of_parameters() -> None:
    plain = nn.Sequential(*[nn.Linear(4, 4) for _ in range(8)])
    plain.pretrained_cfg = {"classifier": "7"}

    groups = layer_groups(plain)

    assert groups["7.weight"] == max(groups.values())
    assert len(frozen_names(plain, 1.0)) == 14


def test_probing_then_finetuning_switches_at_half_of_the_whole_curve(model: nn.Module) -> None:
    settings = {"linear_probing": True, "pct_to_freeze": 0.2}

    plan = plan_freezing(model, settings, max_fidelity=9, native=True)

    assert [plan.names_at(e) == plan.head for e in range(9)] == [True] * 4 + [False] * 5
    assert plan.names_at(4) == {n for n, _ in model.named_parameters()} - frozen_names(model, 0.2)


def test_upstream_spaces_probe_for_the_whole_run(model: nn.Module) -> None:
    plan = plan_freezing(model, {"linear_probing": True}, max_fidelity=9, native=False)

    assert plan.trainable == plan.head == head_names(model)
    assert not plan.backbone_trains


def test_frozen_parts_keep_weights_and_statistics_in_training(model: nn.Module) -> None:
    plan = plan_freezing(model, {"pct_to_freeze": 0.6}, max_fidelity=4, native=True)
    apply_trainable(model, plan.names_at(0))
    set_training_modes(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(0)

    for _ in range(2):
        loss = model(torch.randn(4, 3, 32, 32, generator=generator)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    frozen = frozen_names(model, 0.6)
    owners = {n.rsplit(".", 1)[0] for n in frozen}
    still = {n for n in before if n in frozen or n.rsplit(".", 1)[0] in owners}
    assert all(torch.equal(before[n], model.state_dict()[n]) for n in still)
    assert any(not torch.equal(before[n], model.state_dict()[n]) for n in plan.head)


def test_head_only_training_builds_no_graph_in_the_backbone(model: nn.Module) -> None:
    plan = plan_freezing(model, {"pct_to_freeze": 1.0}, max_fidelity=4, native=True)
    apply_trainable(model, plan.names_at(0))
    set_training_modes(model)

    features: Any = model.forward_features(torch.zeros(2, 3, 32, 32))  # type: ignore[operator]

    assert not features.requires_grad
    assert model(torch.zeros(2, 3, 32, 32)).requires_grad


def test_dropout_of_the_head_stays_on_and_of_frozen_blocks_is_off() -> None:
    model = timm.create_model("test_vit", num_classes=5, drop_rate=0.5, proj_drop_rate=0.5)
    plan = plan_freezing(model, {"pct_to_freeze": 1.0}, max_fidelity=4, native=True)
    apply_trainable(model, plan.names_at(0))
    set_training_modes(model)

    modes = {n: m.training for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p}

    assert modes["head_drop"]
    assert not any(on for name, on in modes.items() if name.startswith("blocks."))

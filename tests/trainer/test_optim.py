"""Parameter groups against timm's own factory, and updates against formulas written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from qtt_trainer.optim import (
    build_optimizer,
    group_names,
    layer_scales,
    parameter_groups,
    parse_betas,
    smallest_scale,
)

MODELS = ("test_resnet", "test_convnext", "test_vit", "test_efficientnet")


def all_names(model: nn.Module) -> frozenset[str]:
    return frozenset(n for n, _ in model.named_parameters())


def by_parameter(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    return {
        id(p): (round(float(g.get("lr_scale", 1.0)), 12), float(g["weight_decay"]))
        for g in groups
        for p in g["params"]
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decay", ["none", 0.65, 0.75])
def test_groups_have_the_rates_and_decays_of_timms_factory(name: str, decay: Any) -> None:
    model = timm.create_model(name, num_classes=5)
    settings = {"weight_decay": 0.05, "layer_decay": decay}
    ours = parameter_groups(model, all_names(model), settings, native=False)

    theirs = create_optimizer_v2(
        model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=None if decay == "none" else decay
    )

    assert by_parameter(ours) == by_parameter(theirs.param_groups)


def test_the_native_space_bounds_the_smallest_rate() -> None:
    scales = layer_scales({"stem": 0, "middle": 30, "head": 56}, 0.65, 1e-3)

    assert scales == {"stem": 1e-3, "middle": 1e-3, "head": 1.0}
    assert layer_scales({"stem": 0, "head": 56}, 0.65)["stem"] == pytest.approx(3.3e-11, rel=0.01)


def test_only_what_ever_trains_is_in_a_group_with_its_name() -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    chosen = frozenset({"fc.weight", "fc.bias", "layer4.0.conv1.weight"})

    groups = parameter_groups(model, chosen, {"weight_decay": 0.1}, native=True)

    parameters = dict(model.named_parameters())
    seen = {n: p for g in groups for n, p in zip(g["names"], g["params"], strict=True)}
    assert seen.keys() == chosen
    assert all(parameters[n] is p for n, p in seen.items())


def test_l2_sp_replaces_the_backbones_weight_decay_in_the_native_space_only() -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    settings = {"weight_decay": 0.1, "sp_reg": 0.01}

    native = by_parameter(parameter_groups(model, all_names(model), settings, native=True))
    compat = by_parameter(parameter_groups(model, all_names(model), settings, native=False))

    assert native[id(model.fc.weight)][1] == 0.1
    assert native[id(model.layer4[0].conv1.weight)][1] == 0.0
    assert compat[id(model.layer4[0].conv1.weight)][1] == 0.1


def quadratic(name: str, native: bool, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two updates on a matrix with gradient w itself; returns (before, after)."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    before = weight.detach().clone()
    group = {"params": [weight], "names": ["w"], "lr_scale": 1.0, "weight_decay": 0.1}
    optimizer = build_optimizer([group], {"opt": name, "lr": 0.1, **settings}, native=native)
    for _ in range(2):
        weight.grad = weight.detach().clone()
        optimizer.step()
    return before, weight.detach()


def test_sgd_is_plain_in_the_native_space() -> None:
    before, after = quadratic("sgd", native=True)

    torch.testing.assert_close(after, before * (1 - 0.1 * 1.1) ** 2)


def heavy_ball(before: torch.Tensor, momentum: float, nesterov: bool) -> torch.Tensor:
    w, v = before.clone(), torch.zeros_like(before)
    for step in range(2):
        g = 1.1 * w
        v = g.clone() if step == 0 else momentum * v + g
        w = w - 0.1 * (g + momentum * v if nesterov else v)
    return w


def test_sgd_of_upstream_spaces_is_nesterov_as_timm_means_it() -> None:
    before, after = quadratic("sgd", native=False)

    torch.testing.assert_close(after, heavy_ball(before, 0.9, nesterov=True))


@pytest.mark.parametrize("momentum", [0.0, 0.8, 0.99])
def test_momentum_is_a_heavy_ball_with_the_searched_value(momentum: float) -> None:
    before, after = quadratic("momentum", native=True, momentum=momentum)

    torch.testing.assert_close(after, heavy_ball(before, momentum, nesterov=False))


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_adam_couples_weight_decay_and_adamw_does_not(decoupled: bool) -> None:
    name = "adamw" if decoupled else "adam"

    before, after = quadratic(name, native=True, opt_betas="(0.9, 0.99)")

    w, m, v = before.clone(), torch.zeros(2, 2), torch.zeros(2, 2)
    for t in (1, 2):
        g = w if decoupled else 1.1 * w
        w = w * (1 - 0.1 * 0.1) if decoupled else w
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    torch.testing.assert_close(after, w)


def test_adamp_is_timms_with_nesterov_momentum() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    group = {"params": [weight], "names": ["w"], "lr_scale": 1.0, "weight_decay": 0.0}

    optimizer = build_optimizer([group], {"opt": "adamp", "lr": 0.1}, native=True)

    assert type(optimizer).__name__ == "AdamP"
    assert optimizer.defaults["nesterov"]
    assert group_names(optimizer) == [["w"]]
    assert smallest_scale(optimizer) == 1.0


@pytest.mark.parametrize("value", ["(0.9, 0.99)", "(.9,.99)", [0.9, 0.99], (0.9, 0.99)], ids=str)
def test_betas_are_read_from_text_and_pairs(value: object) -> None:
    assert parse_betas(value) == (0.9, 0.99)


def test_absent_betas_are_the_usual_ones() -> None:
    assert parse_betas(None) == (0.9, 0.999)


@pytest.mark.parametrize("along", [False, True], ids=["across", "along"])
def test_adamp_projects_the_radial_part_of_its_step_away(along: bool) -> None:
    """Algorithm 2 of arXiv 2006.08217 with Nesterov momentum, by hand in NumPy.

    A gradient nearly orthogonal to a channel's weights marks a scale-invariant weight: the step
    then keeps to the sphere, and decay is a hundredth (timm's wd_ratio). One along them is Adam's.
    """
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 400))
    drawn = rng.normal(size=w.shape)
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    across = drawn - (drawn * unit).sum(1, keepdims=True) * unit
    g = (across + (0.9 if along else 0.0) * w).astype(np.float64)
    weight = nn.Parameter(torch.tensor(w))
    group = {"params": [weight], "names": ["w"], "lr_scale": 1.0, "weight_decay": 0.05}
    settings = {"opt": "adamp", "lr": 0.1, "opt_betas": "(0.9, 0.99)"}
    optimizer = build_optimizer([group], settings, native=True)

    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in (1, 2):
        weight.grad = torch.tensor(g)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        denominator = np.sqrt(v) / np.sqrt(1 - 0.99**t) + 1e-8
        step, ratio = (0.9 * m + 0.1 * g) / denominator, 1.0
        cosine = np.abs((g * w).sum(1)) / np.linalg.norm(g, axis=1) / np.linalg.norm(w, axis=1)
        if cosine.max() < 0.1 / np.sqrt(w.shape[1]):
            unit = w / np.linalg.norm(w, axis=1, keepdims=True)
            step, ratio = step - (step * unit).sum(1, keepdims=True) * unit, 0.01
        assert (ratio == 0.01) is not along or t == 2
        w = w * (1 - 0.1 * 0.05 * ratio) - 0.1 / (1 - 0.9**t) * step

    np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-6, atol=1e-9)

"""StochNorm against torch's BatchNorm, on plain layers and on timm's BatchNorm with activation."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from qtt_trainer.stoch_norm import convert_stoch_norm

LAYERS = {
    "1d": (nn.BatchNorm1d(6), (8, 6)),
    "2d": (nn.BatchNorm2d(6), (4, 6, 5, 5)),
    "act": (BatchNormAct2d(6, act_layer=nn.SiLU, inplace=False), (4, 6, 5, 5)),
    "cumulative": (nn.BatchNorm2d(6, momentum=None), (4, 6, 5, 5)),
}


def converted(layer: nn.Module, p: float) -> nn.Module:
    box = nn.ModuleDict({"norm": copy.deepcopy(layer)})
    assert convert_stoch_norm(box, frozenset({"norm.weight", "norm.bias"}), p) == 1
    return box["norm"]


@pytest.fixture(params=list(LAYERS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    layer, shape = LAYERS[request.param]
    layer = copy.deepcopy(layer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean"):
            getattr(layer, name).copy_(torch.randn(6, generator=generator))
        layer.running_var.copy_(torch.rand(6, generator=generator) + 0.5)
    return layer, torch.randn(shape, generator=generator) * 3 + 1


def test_with_probability_one_it_is_batchnorm(case: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = case
    theirs, ours = copy.deepcopy(layer).train(), converted(layer, 1.0).train()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()

    expected, got = theirs(a), ours(b)
    expected.square().sum().backward()
    got.square().sum().backward()

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_with_probability_zero_it_normalises_by_the_moving_statistics(
    case: tuple[nn.Module, torch.Tensor],
) -> None:
    layer, x = case

    expected = copy.deepcopy(layer).eval()(x)

    torch.testing.assert_close(converted(layer, 0.0).train()(x), expected, atol=1e-5, rtol=1e-5)


def test_each_channel_takes_one_of_the_two_statistics_by_a_fair_coin(
    case: tuple[nn.Module, torch.Tensor],
) -> None:
    layer, x = case
    batch, moving = converted(layer, 1.0).train()(x), converted(layer, 0.0).train()(x)
    by_batch = 0
    torch.manual_seed(0)
    for _ in range(200):
        got = converted(layer, 0.5).train()(x)
        from_batch = [torch.allclose(got[:, c], batch[:, c], atol=1e-5) for c in range(6)]
        from_moving = [torch.allclose(got[:, c], moving[:, c], atol=1e-5) for c in range(6)]
        assert all(a != b for a, b in zip(from_batch, from_moving, strict=True))
        by_batch += sum(from_batch)

    assert 0.45 < by_batch / 1200 < 0.55


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilevit_xxs"])
def test_conversion_keeps_outputs_in_eval_mode_and_parameter_objects(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before, parameters = model(x), dict(model.named_parameters())

    count = convert_stoch_norm(model, frozenset(parameters))

    assert count == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert torch.equal(model.eval()(x), before)
    assert all(p is parameters[n] for n, p in model.named_parameters())


def test_frozen_layers_and_models_without_batchnorm_are_left_alone() -> None:
    resnet = timm.create_model("test_resnet")
    plain = timm.create_model("test_convnext")

    assert convert_stoch_norm(resnet, frozenset({"bn1.weight", "bn1.bias"})) == 1
    assert convert_stoch_norm(plain, frozenset(n for n, _ in plain.named_parameters())) == 0

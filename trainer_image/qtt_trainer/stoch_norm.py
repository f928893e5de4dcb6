"""StochNorm: BatchNorm whose statistics are drawn per channel (20-trainer 3.4).

Kou et al., Stochastic Normalization, NeurIPS 2020. Per layer and channel c of each training pass
s_c ~ Bernoulli(p); (mu, var)_c are the batch's if s_c = 1, the moving ones if 0; the output is
gamma * (x - mu) / sqrt(var + eps) + beta. Moving statistics are updated as in BatchNorm; eval is
plain BatchNorm. Layers are converted in place by their class: parameters, buffers, names, and the
activation of timm's `BatchNormAct2d` stay the same objects.
"""

from __future__ import annotations

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

PROBABILITY = 0.5


class StochNorm1d(nn.BatchNorm1d):
    """BatchNorm1d with drawn statistics."""

    stoch_p: float = PROBABILITY

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name
        """As BatchNorm in eval mode."""
        return _normalise(self, input) if self.training else super().forward(input)


class StochNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with drawn statistics."""

    stoch_p: float = PROBABILITY

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name
        """As BatchNorm in eval mode."""
        return _normalise(self, input) if self.training else super().forward(input)


class StochNormAct2d(BatchNormAct2d):
    """timm's BatchNorm with activation, with drawn statistics."""

    stoch_p: float = PROBABILITY

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `BatchNormAct2d` in eval mode."""
        if not self.training:
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]  # untyped in timm
        return self.act(self.drop(_normalise(self, x)))  # type: ignore[no-any-return]


_CONVERSIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: StochNorm1d,
    nn.BatchNorm2d: StochNorm2d,
    BatchNormAct2d: StochNormAct2d,
}


def convert_stoch_norm(model: nn.Module, names: frozenset[str], p: float = PROBABILITY) -> int:
    """Convert the BatchNorm layers that own a parameter in `names`; returns how many there were.

    Layers without moving statistics are left alone: there is nothing to draw from.
    """
    converted = 0
    for prefix, module in model.named_modules():
        target = _CONVERSIONS.get(type(module))
        owned = any(
            f"{prefix}.{name}" in names for name, _ in module.named_parameters(recurse=False)
        )
        if target is None or not owned or module.running_mean is None:
            continue
        module.__class__ = target
        module.stoch_p = p
        converted += 1
    return converted


def _normalise(layer: nn.modules.batchnorm._BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Normalise once, statistics chosen per channel; moving ones as before this update."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = x.float()
    mean, variance = wide.mean(axes), wide.var(axes, unbiased=False)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    chosen = torch.rand(mean.shape, device=x.device) < float(layer.stoch_p)  # type: ignore[arg-type]
    mu = torch.where(chosen, mean, layer.running_mean)
    var = torch.where(chosen, variance, layer.running_var)
    _update_statistics(layer, mean.detach(), variance.detach(), x.numel() // x.shape[1])
    shape = [1, -1, *([1] * (x.dim() - 2))]
    scale = torch.rsqrt(var + layer.eps)
    shift = -mu * scale
    if layer.affine:
        scale, shift = scale * layer.weight, shift * layer.weight + layer.bias
    return (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)


def _update_statistics(
    layer: nn.modules.batchnorm._BatchNorm, mean: torch.Tensor, variance: torch.Tensor, count: int
) -> None:
    """Moving statistics as in torch: unbiased variance, momentum None = cumulative average."""
    assert layer.num_batches_tracked is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    if momentum is None:
        momentum = 1.0 / float(layer.num_batches_tracked)
    with torch.no_grad():
        # torch.where above kept the old values alive by copying, so updating in place is safe.
        layer.running_mean.lerp_(mean, momentum)
        layer.running_var.lerp_(variance * (count / max(1, count - 1)), momentum)

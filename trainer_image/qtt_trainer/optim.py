"""Optimizers of a configuration: parameter groups and timm's factory (20-trainer 3.2, 4.1).

Built after the freeze plan and before a checkpoint is loaded. Groups carry the parameters' names,
because optimizer state is positional: a checkpoint with other names is refused, never shifted.
"""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2
from torch import nn

from qtt_core.steps import Config
from qtt_trainer.freezing import layer_groups
from qtt_trainer.model import classifier_prefixes, is_head

NATIVE_MIN_SCALE = 1e-3
"""Smallest layer-decay factor of the native space: .65 over 57 groups would be 2e-11."""

DECOUPLED = frozenset({"adamw", "adamp"})
_ADAMS = frozenset({"adam", "adamw", "adamp"})


def layer_scales(
    groups: Mapping[str, int], decay: float, min_scale: float = 0.0
) -> dict[str, float]:
    """Learning-rate factor of each parameter: decay^(L-1-i) for group i of L, at least `min_scale`.

    Source: BEiT, arXiv 2106.08254, appendix; as timm's `param_groups_layer_decay`.
    """
    last = max(groups.values())
    return {name: max(min_scale, decay ** (last - group)) for name, group in groups.items()}


def parameter_groups(
    model: nn.Module,
    names: frozenset[str],
    config: Config,
    *,
    native: bool,
    extra_head: Mapping[str, nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """Groups of equal (learning-rate factor, weight decay), with `params` and `names`.

    Vectors, biases and the model's `no_weight_decay` names are not decayed. Where L2-SP is on
    (native) the backbone has no weight decay: two attractors would fight. `extra_head`: parameters
    outside the model that learn like the classifier (Co-Tuning's source head).
    """
    decay = float(config.get("weight_decay") or 0.0)
    attracted = native and float(config.get("sp_reg") or 0.0) > 0
    scales = _scales(model, config, native)
    prefixes = classifier_prefixes(model)
    undecayed = set(getattr(model, "no_weight_decay", set)())
    parts: dict[tuple[float, float], dict[str, Any]] = {}

    def add(name: str, parameter: nn.Parameter, scale: float, weight_decay: float) -> None:
        group = parts.setdefault(
            (scale, weight_decay),
            {"params": [], "names": [], "lr_scale": scale, "weight_decay": weight_decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)

    for name, parameter in model.named_parameters():
        if name in names:
            plain = _is_plain(name, parameter, undecayed)
            off = plain or (attracted and not is_head(name, prefixes))
            add(name, parameter, scales.get(name, 1.0), 0.0 if off else decay)
    for name, parameter in (extra_head or {}).items():
        add(name, parameter, 1.0, 0.0 if _is_plain(name, parameter, set()) else decay)
    return list(parts.values())


def _scales(model: nn.Module, config: Config, native: bool) -> dict[str, float]:
    decay = config.get("layer_decay")
    if decay in (None, "none", 0):
        return {}
    minimum = NATIVE_MIN_SCALE if native else 0.0
    return layer_scales(layer_groups(model), float(decay), minimum)


def _is_plain(name: str, parameter: nn.Parameter, undecayed: set[str]) -> bool:
    """Whether a parameter is never decayed."""
    return (
        parameter.ndim <= 1
        or name.endswith(".bias")
        or any(fnmatch.fnmatch(name, pattern) for pattern in undecayed)
    )


def build_optimizer(
    groups: list[dict[str, Any]], config: Config, *, native: bool, fused: bool = False
) -> torch.optim.Optimizer:
    """The configuration's optimizer over parameter groups.

    sgd: plain (native) or Nesterov .9, timm's meaning of the word (compat); momentum: heavy ball;
    adam: coupled decay; adamw (arXiv 1711.05101) and adamp (arXiv 2006.08217): decoupled.
    """
    name = str(config["opt"])
    lr = float(config["lr"])  # type: ignore[arg-type]  # a number in every space
    kinds: dict[str, Any] = {}
    if name in _ADAMS:
        kinds["betas"] = parse_betas(config.get("opt_betas"))
    if name == "sgd":
        name, momentum = ("momentum", 0.0) if native else ("sgd", 0.9)
    else:
        raw = config.get("momentum")
        momentum = 0.9 if raw is None else float(raw)
    if fused and name == "adamw":
        kinds["fused"] = True
    return create_optimizer_v2(
        groups, opt=name, lr=lr, weight_decay=0.0, momentum=momentum, **kinds
    )


def parse_betas(value: object) -> tuple[float, float]:
    """Betas from their text form `(0.9, 0.999)`, a list or a tuple; the usual ones when absent."""
    if value in (None, "none"):
        return (0.9, 0.999)
    pair = ast.literal_eval(value) if isinstance(value, str) else value
    first, second = pair  # type: ignore[misc]  # legal values are pairs
    return (float(first), float(second))


def group_names(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The parameters' names per group, to be stored beside the optimizer's state."""
    return [list(group["names"]) for group in optimizer.param_groups]


def smallest_scale(optimizer: torch.optim.Optimizer) -> float:
    """The smallest learning-rate factor, 1.0 without layer decay."""
    return min(float(group.get("lr_scale", 1.0)) for group in optimizer.param_groups)

"""Configurations as the search draws them: each is legal, and each one learns.

Of the published tool's sampled configurations 18.8 % could train a backbone at all: clipping at 0
removed every gradient, a layer decay of 0 every rate but the head's, probing never ended.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch
from one_epoch import train_one_epoch
from torch import nn

from qtt_core.hub import load_hub
from qtt_core.space import SPACES, build_space, check_values
from qtt_core.steps import Config
from qtt_trainer.freezing import plan_freezing
from qtt_trainer.optim import build_optimizer, parameter_groups
from qtt_trainer.schedule import effective_warmup
from qtt_trainer.transforms import UPSTREAM_SPACES

HUB = load_hub("tiny")


def sampled(space: str, count: int, seed: int = 7) -> list[Config]:
    """Configurations of a named space, drawn as the pool of candidates is."""
    cs = build_space(space, HUB, max_fidelity=20).configspace
    cs.seed(seed)
    return [check_values(space, dict(config)) for config in cs.sample_configuration(count)]


@cache
def architecture(name: str) -> nn.Module:
    return timm.create_model(HUB.card(name).tag, num_classes=4)


@pytest.mark.parametrize("space", SPACES)
def test_all_but_those_that_freeze_the_backbone_give_each_layer_a_rate(space: str) -> None:
    trainable = 0
    configs = sampled(space, 300)
    for config in configs:
        model = architecture(str(config["model"]))
        native = space not in UPSTREAM_SPACES
        plan = plan_freezing(model, config, max_fidelity=20, native=native)
        optimizer = build_optimizer(
            parameter_groups(model, plan.trainable, config, native=native), config, native=native
        )
        assert all(g["lr"] * g["lr_scale"] > 0 for g in optimizer.param_groups)
        owned = sum(len(group["params"]) for group in optimizer.param_groups)
        assert owned == len(plan.trainable)
        frozen = config.get("pct_to_freeze") == 1
        for_ever = not native and bool(config.get("linear_probing"))
        assert plan.backbone_trains is not (frozen or for_ever)
        trainable += plan.backbone_trains

    assert trainable / len(configs) > 0.35
    if space == "native":
        assert trainable / len(configs) > 0.75


def learns(jobs: Any, space: str, config: Config) -> None:
    """One epoch changes parameters, and all that must is finite."""
    rest = {name: value for name, value in config.items() if name != "model"}
    model = str(config["model"])
    run = train_one_epoch(jobs, rest, model=model, space=space, config_id=1, horizon=20)

    before, after = run.start, run.states[-1]
    parameters = {name for name, _ in run.before.named_parameters()}
    moved = {name for name in parameters if not torch.equal(before[name], after[name])}
    # The published schedules spend their first epoch at the warm-up's own rate, which may be 0.
    warm = space in UPSTREAM_SPACES and effective_warmup(config, 20) > 0
    still = warm and not config.get("warmup_lr")
    assert bool(moved) is not still, config
    names = run.session.plan.names_at(0)
    assert moved <= names
    assert all(bool(torch.isfinite(after[name]).all()) for name in after)


@pytest.mark.parametrize("space", SPACES)
def test_a_sampled_configuration_learns(jobs: Any, space: str) -> None:
    for config in sampled(space, 2):
        learns(jobs, space, config)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("space", SPACES)
def test_every_sampled_configuration_learns(jobs: Any, space: str, seed: int) -> None:
    for config in sampled(space, 12, seed):
        learns(jobs, space, config)

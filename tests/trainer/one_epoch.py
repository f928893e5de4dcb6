"""One epoch through the session and the loop of a step, with the model's tensors after each update.

What the tests of strategies look at: no process, no checkpoint, nothing of the code under test
replaced.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtt_core.jobs import parse_job
from qtt_trainer import loop, work
from qtt_trainer.context import Context
from qtt_trainer.data import TrainSet
from qtt_trainer.loaders import train_loader
from qtt_trainer.loop import Watch
from qtt_trainer.session import Session
from qtt_trainer.stopping import Stop
from qtt_trainer.transforms import build_transforms

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A session after an epoch: the model as it was, its tensors after each update, the batches."""

    session: Session
    before: nn.Module
    states: list[Tensors]
    averages: list[Tensors]
    batches: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def start(self) -> Tensors:
        return _copied(self.before.state_dict())

    def prefixes(self) -> tuple[str, ...]:
        name = self.before.pretrained_cfg["classifier"]  # type: ignore[index]
        return (f"{name}.",)


def _copied(state: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.clone() for name, tensor in state.items()}


def train_one_epoch(
    jobs: Any, config: Mapping[str, Any], *, model: str, space: str, **fields: Any
) -> Trained:
    """Train the first epoch of a configuration. `jobs`: the fixture of this folder."""
    raw = jobs.step(1, model=model, settings=config, space_id=space, **fields)
    job = parse_job(raw, command="step")
    context = Context(stop=Stop(), born=time.monotonic())
    task = work.prepare_work(job, raw["config"], context)
    session = work.build_session(task)
    session.start_schedule()
    before = copy.deepcopy(session.model)
    for module in before.modules():  # a copy brings our hook along, which would keep its tensor
        module._forward_pre_hooks.clear()
    transform = build_transforms(session.data_config, config, None, True, space_id=space)
    images = TrainSet(
        task.manifest, "train", jobs.data, transform, seed=job.seed, config_id=job.config_id
    )
    loader = train_loader(
        images,
        batch=session.batch_size,
        updates=session.horizon.updates_per_epoch,
        workers=0,
        pin=False,
    )
    batches = [(x.clone(), y.clone()) for x, y in loader]
    states: list[Tensors] = []
    averages: list[Tensors] = []

    def look(pulse: Any) -> None:
        states.append(_copied(session.model.state_dict()))
        if session.ema is not None:
            averages.append(_copied(session.ema.module.state_dict()))

    watch = Watch(
        ready=lambda: None,
        should_stop=lambda: False,
        beat=look,
        save_is_due=lambda: False,
        save=lambda: None,
    )
    loop.train_epoch(session, loader, seed=job.seed, config_id=job.config_id, watch=watch)
    return Trained(
        session=session, before=before, states=states, averages=averages, batches=batches
    )

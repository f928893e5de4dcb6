"""How images reach the loop: keyed batches, workers that outlive a signal (20-trainer 4.5).

Between the data sets and the training loop; knows nothing of models.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from qtt_trainer.data import EvalSet, TrainSet, epoch_order

EVAL_BATCH = 64


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The batches of an epoch as lists of (epoch, number), from update `start` on.

    One object for all epochs, so that persistent workers serve them all.
    """

    def __init__(self, size: int, *, batch: int, updates: int, seed: int, config_id: int) -> None:
        self.size, self.batch, self.updates = size, batch, updates
        self.seed, self.config_id = seed, config_id
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.updates - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = epoch_order(self.size, seed=self.seed, config_id=self.config_id, epoch=epoch)
        for update in range(self.start, self.updates):
            chosen = order[update * self.batch : (update + 1) * self.batch]
            yield [(epoch, number) for number in chosen]


def train_loader(
    dataset: TrainSet, *, batch: int, updates: int, workers: int, pin: bool
) -> DataLoader[Any]:
    """The loader of all epochs; set its `batch_sampler`'s epoch and start before iterating."""
    batches = EpochBatches(
        len(dataset),
        batch=batch,
        updates=updates,
        seed=dataset.seed,
        config_id=dataset.config_id,
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=quiet_worker if workers else None,
        pin_memory=pin,
        # Its own generator: drawing the workers' base seed must not move the global one.
        generator=torch.Generator(),
    )


def quiet_worker(worker: int) -> None:
    """A signal to the group must not kill the workers before the parent has saved.

    The next SIGTERM does: torch ends a worker that reported an error by no other means, and a
    process whose worker ignores it for good never exits.
    """
    signal.signal(signal.SIGTERM, _ignore_once)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def eval_loader(dataset: EvalSet, *, batch: int, workers: int, pin: bool) -> DataLoader[Any]:
    """The images of a split in the manifest's order, 64 to 256 at a time."""
    return DataLoader(
        dataset,
        batch_size=min(256, max(EVAL_BATCH, 4 * batch)),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=quiet_worker if workers else None,
        pin_memory=pin,
        generator=torch.Generator(),
    )

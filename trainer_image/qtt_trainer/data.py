"""The data sets of a step: keyed order, keyed augmentation, strict decoding (20-trainer 4.5, 7).

Sits between `dataset.json` and the training loop. Nothing here depends on the number of workers or
on where a step began: sample i of epoch e looks the same whenever and wherever it is drawn. It
never replaces an unreadable image; it stops the job with a named state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from qtt_trainer.data_errors import (
    BadDataError,
    DatasetChangedError,
    DataUnreachableError,
    DecodeError,
)
from qtt_trainer.dataset_manifest import (
    DatasetManifest,
    Sample,
    SplitList,
    load_manifest,
    quick_check,
)
from qtt_trainer.decode import read_image
from qtt_trainer.keys import key, key32
from qtt_trainer.scan import scan_split
from qtt_trainer.transforms import Transform, TransformPlan, build_transforms, plan_transforms

__all__ = [
    "BadDataError",
    "DataUnreachableError",
    "DatasetChangedError",
    "DatasetManifest",
    "EvalSet",
    "KeyedSampler",
    "Sample",
    "TrainSet",
    "Transform",
    "TransformPlan",
    "build_transforms",
    "epoch_order",
    "load_manifest",
    "plan_transforms",
    "quick_check",
    "with_split",
]


class EvalSet(Dataset[tuple[torch.Tensor, int]]):
    """The images of a split in the manifest's order. Item: (tensor (C, H, W), class index)."""

    def __init__(
        self, manifest: DatasetManifest, split: str, data_root: Path, transform: Transform
    ) -> None:
        self.samples = manifest.samples(split)
        self.root = Path(data_root)
        self.transform = transform
        self.channels = manifest.channels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(_read_twice(self.root / path, self.channels)), label


class TrainSet(Dataset[tuple[torch.Tensor, int]]):
    """The images of a split under augmentation. Index: (epoch, number), from `KeyedSampler`.

    `random`, `numpy` and `torch` (CPU) are seeded with the sample's key before the transform; the
    training loop must seed its own noise after it has drawn a batch.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        split: str,
        data_root: Path,
        transform: Transform,
        *,
        seed: int,
        config_id: int,
    ) -> None:
        self.samples = manifest.samples(split)
        self.root = Path(data_root)
        self.transform = transform
        self.channels = manifest.channels
        self.seed, self.config_id = seed, config_id

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, number = index
        path, label = self.samples[number]
        image = _read_twice(self.root / path, self.channels)
        _seed_all(self.seed, self.config_id, "aug", epoch, number)
        return self.transform(image), label


class KeyedSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, number) in the epoch's own order; set `epoch` (and `start`) before iterating.

    `start` skips samples already seen: a resume within an epoch.
    """

    def __init__(self, size: int, *, seed: int, config_id: int) -> None:
        self.size, self.seed, self.config_id = size, seed, config_id
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.size - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = epoch_order(self.size, seed=self.seed, config_id=self.config_id, epoch=epoch)
        for number in order[self.start :]:
            yield epoch, number


def epoch_order(size: int, *, seed: int, config_id: int, epoch: int) -> list[int]:
    """The permutation of 0 … size-1 of an epoch; depends on the arguments alone."""
    generator = torch.Generator().manual_seed(key(seed, config_id, "perm", epoch))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def with_split(manifest: DatasetManifest, data_root: Path, folder: str) -> DatasetManifest:
    """The manifest with one more split, read now and labelled by the run's class map (`evaluate`).

    Unreadable images are left out and listed in `excluded`.
    Raises: BadDataError if the folder is missing, empty, or holds a class that train lacks.
    """
    from qtt_trainer.verify import verify_files

    found = scan_split(Path(data_root), folder)
    if found is None:
        raise BadDataError(
            f"{Path(data_root) / folder} does not exist; name the folder of the split"
        )
    labels = {name: label for label, name in enumerate(manifest.class_names)}
    unknown = [name for name, files in found.classes.items() if files and name not in labels]
    if unknown:
        raise BadDataError(
            f"{Path(data_root) / folder}: class {', '.join(map(repr, unknown[:5]))} is not among "
            f"the {manifest.num_classes} classes this run was trained on"
        )
    checked = verify_files(Path(data_root), list(found.files))
    samples = tuple(
        (item.path, labels[name])
        for name, files in found.classes.items()
        for item in files
        if item.path not in checked.faults
    )
    if not samples:
        raise BadDataError(f"{Path(data_root) / folder} holds no readable image")
    splits = {**manifest.splits, folder: SplitList(folder=folder, samples=samples)}
    return replace(manifest, splits=splits, excluded={**manifest.excluded, **checked.faults})


def _read_twice(path: Path, channels: int) -> Image.Image:
    """Read an image that `prepare` found good; a second failure means that the data changed."""
    try:
        return read_image(path, channels=channels)
    except (DecodeError, OSError):
        pass
    try:
        return read_image(path, channels=channels)
    except (DecodeError, OSError) as error:
        raise DatasetChangedError(
            f"{path} was readable in prepare and no longer is ({error}); restore it, "
            "or start a new run"
        ) from error


def _seed_all(seed: int, *tags: int | str) -> None:
    """Seed the three global generators; torch's CPU one only, its CUDA ones keep a call log."""
    random.seed(key(seed, *tags))
    np.random.seed(key32(seed, *tags))
    torch.default_generator.manual_seed(key(seed, *tags))

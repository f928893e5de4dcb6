"""Which image trains and which validates: the rules on folders and classes (20-trainer 7).

Pure: takes what `scan` and `verify` found and returns an assignment or every fault at once. The
class map is train's; val is mapped onto it by name. Training images never validate.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qtt_trainer.data_errors import BadDataError
from qtt_trainer.dataset_manifest import AutoSplit, Sample, SplitList
from qtt_trainer.scan import FoundSplit

MAX_CORRUPT_SHARE = 0.01
MAX_OVERLAP_SHARE = 0.01
SHOWN = 5
LINE_LIMIT, MESSAGE_LIMIT = 400, 850


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Class names, the files of both roles, and what the user should know."""

    class_names: tuple[str, ...]
    splits: Mapping[str, SplitList]
    auto_split: AutoSplit | None
    val_missing_classes: tuple[str, ...]
    warnings: tuple[str, ...]


def check_layout(
    root: str,
    train: FoundSplit | None,
    val: FoundSplit | None,
    *,
    names: tuple[str, str],
    auto_split: float | None,
    present: Sequence[str],
    num_classes: int | None = None,
) -> None:
    """Check folders and class names, before anything is decoded.

    `names` are the folders asked for (train, val), `present` the folders that exist below `root`.
    Raises: BadDataError with every fault.
    """
    faults: list[str] = []
    if train is None:
        faults.append(_missing(root, names[0], present, "training"))
    else:
        faults += _class_faults(root, train, num_classes)
    if val is None and auto_split is None:
        hint = 'add it, or set dataset.autoSplit (such as "0.2") to hold out a share of train'
        faults.append(f"{_missing(root, names[1], present, 'validation')}; {hint}")
    if val is not None and train is not None:
        faults += _val_faults(root, train, val)
    raise_data_faults(faults)


def check_corrupt(split: FoundSplit, faults: Mapping[str, str]) -> list[str]:
    """What makes a training split unusable: a class without a readable image, or above 1 % of all.

    Broken validation images are left out for every configuration alike, and warned about.
    """
    found: list[str] = []
    for name, files in split.classes.items():
        if files and all(item.path in faults for item in files):
            found.append(
                f"{split.folder}/{name}: none of its {len(files)} images can be read "
                f"({_examples(faults, [item.path for item in files])})"
            )
    total = sum(len(files) for files in split.classes.values())
    broken = [item.path for item in split.files if item.path in faults]
    if not found and len(broken) > MAX_CORRUPT_SHARE * total:
        found.append(
            f"{split.folder}: {len(broken)} of {total} images cannot be read, more than 1 % "
            f"({_examples(faults, broken)}); replace or delete them"
        )
    return found


def assign(
    train: FoundSplit,
    val: FoundSplit | None,
    *,
    broken: Collection[str],
    auto_split: float | None,
    seed: int,
) -> Assignment:
    """Give every readable image its class index and its role.

    Raises: BadDataError if no image is left to validate on.
    """
    names = tuple(name for name, files in train.classes.items() if files)
    labels = {name: label for label, name in enumerate(names)}
    pool = _samples(train, labels, broken)
    auto: AutoSplit | None = None
    if val is not None:
        held = _samples(val, labels, broken)
    else:
        assert auto_split is not None, "checked by check_layout"
        auto = AutoSplit(share=auto_split, seed=seed)
        pool, held = stratified(pool, auto_split, np.random.default_rng(seed))
    val_folder = val.folder if val else train.folder
    if not held:
        raise BadDataError(
            f"no image is left to validate on in {val_folder}; add images, or raise autoSplit"
        )
    seen = {label for _, label in held}
    missing = tuple(name for label, name in enumerate(names) if label not in seen)
    return Assignment(
        class_names=names,
        splits={
            "train": SplitList(folder=train.folder, samples=tuple(pool)),
            "val": SplitList(folder=val_folder, samples=tuple(held)),
        },
        auto_split=auto,
        val_missing_classes=missing,
        warnings=tuple(_notes(val, auto_split, missing, len(names))),
    )


def stratified(
    samples: Sequence[Sample], share: float, rng: np.random.Generator
) -> tuple[list[Sample], list[Sample]]:
    """(kept, held out): of each class the nearest whole number to `share`, at least one of two.

    A class of one image stays in train whole. Both lists keep the order of `samples`.
    """
    by_class: dict[int, list[int]] = {}
    for index, (_, label) in enumerate(samples):
        by_class.setdefault(label, []).append(index)
    held: set[int] = set()
    for label in sorted(by_class):
        indices = by_class[label]
        if len(indices) > 1:
            count = min(len(indices) - 1, max(1, math.floor(share * len(indices) + 0.5)))
            held.update(int(i) for i in rng.choice(indices, size=count, replace=False))
    return (
        [sample for index, sample in enumerate(samples) if index not in held],
        [sample for index, sample in enumerate(samples) if index in held],
    )


def raise_data_faults(faults: Sequence[str]) -> None:
    """Raise one BadDataError that lists the faults, as many as a termination message holds."""
    if not faults:
        return
    shown: list[str] = []
    for fault in faults:
        line = fault if len(fault) <= LINE_LIMIT else fault[: LINE_LIMIT - 1] + "…"
        if shown and sum(map(len, shown)) + len(line) > MESSAGE_LIMIT:
            break
        shown.append(line)
    if len(faults) > len(shown):
        shown.append(f"and {len(faults) - len(shown)} more faults")
    raise BadDataError("\n".join(shown))


def _notes(
    val: FoundSplit | None, auto_split: float | None, missing: Sequence[str], classes: int
) -> Iterator[str]:
    if val is not None and auto_split is not None:
        yield f"autoSplit has no effect: {val.folder} exists and is used"
    if missing:
        yield f"{len(missing)} of {classes} classes have no validation image: {_some(missing)}"


def _class_faults(root: str, train: FoundSplit, num_classes: int | None) -> list[str]:
    where = f"{root}/{train.folder}"
    if train.loose and not train.classes:
        example = train.loose[0]
        return [f"{where}: images lie directly in it (such as {example}); use one folder a class"]
    filled = [name for name, files in train.classes.items() if files]
    empty = [name for name, files in train.classes.items() if not files]
    faults = []
    if empty:
        faults.append(
            f"{where}: class folder {_some(empty)} holds no image (jpg, png, webp, bmp, tiff, "
            "gif); fill or delete it"
        )
    if train.loose:
        faults.append(
            f"{where}: {len(train.loose)} images lie outside a class folder, such as "
            f"{train.loose[0]}; move them into one"
        )
    if len(filled) < 2:
        count = f"only the class {filled[0]!r}" if filled else "no class folder with images"
        faults.append(f"{where}: {count}; classification needs at least two")
    if num_classes is not None and len(filled) != num_classes and len(filled) >= 2:
        faults.append(f"{where}: {len(filled)} classes, but dataset.numClasses is {num_classes}")
    return faults


def _val_faults(root: str, train: FoundSplit, val: FoundSplit) -> list[str]:
    where = f"{root}/{val.folder}"
    filled = [name for name, files in val.classes.items() if files]
    unknown = [name for name in filled if name not in train.classes]
    faults = []
    if unknown:
        faults.append(
            f"{where}: class {_some(unknown)} does not exist in {train.folder} "
            f"(which has {_some(list(train.classes))}); add training images, or remove the folder"
        )
    if not filled:
        hint = f"images lie directly in it (such as {val.loose[0]})" if val.loose else "no images"
        faults.append(f"{where}: {hint}; use one folder a class, with the names of {train.folder}")
    return faults


def _missing(root: str, folder: str, present: Sequence[str], use: str) -> str:
    there = f"it holds {_some(present)}" if present else "it holds no folder"
    return f"{root}: no folder {folder!r} with the {use} images; {there}"


def _samples(split: FoundSplit, labels: Mapping[str, int], broken: Collection[str]) -> list[Sample]:
    return [
        (item.path, labels[name])
        for name, files in split.classes.items()
        if name in labels
        for item in files
        if item.path not in broken
    ]


def _examples(faults: Mapping[str, str], paths: Sequence[str]) -> str:
    return "; ".join(f"{path}: {faults[path]}" for path in paths[:2])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"

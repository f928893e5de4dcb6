"""`dataset.json`: what `prepare` found, and what every later job of the run reads.

It holds class names, the files of each split in a fixed order, excluded files with reasons, the
fingerprint and the facts of the quick check. Reading it must not import torch or Pillow.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtt_core.steps import canonical_json
from qtt_trainer.data_errors import DatasetChangedError
from qtt_trainer.scan import FoundFile, QuickFacts, fingerprint, scan_split
from qtt_trainer.volume import replace_file

SCHEMA = 1

Sample = tuple[str, int]
"""(path relative to the data root, class index)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitList:
    """The images of one split; `folder` is where they lie (the train folder for an auto split)."""

    folder: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoSplit:
    """How val was taken from train: share per class and the seed of the choice."""

    share: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetManifest:
    """One data set as read by `prepare`; `digest` is the SHA-256 of the stored file.

    `splits` has the keys `train` and `val`, whatever their folders are called.
    """

    class_names: tuple[str, ...]
    splits: Mapping[str, SplitList]
    fingerprint: str
    quick: QuickFacts
    excluded: Mapping[str, str] = field(default_factory=dict)
    auto_split: AutoSplit | None = None
    val_missing_classes: tuple[str, ...] = ()
    channels: int = 3
    metafeatures: Mapping[str, float] = field(default_factory=dict)
    metafeatures_version: int = 1
    landmarker_model: str = ""
    warnings: tuple[str, ...] = ()
    digest: str = ""

    @property
    def num_classes(self) -> int:
        """C, the width of the classifier."""
        return len(self.class_names)

    @property
    def n_train(self) -> int:
        """Images to train on."""
        return len(self.splits["train"].samples)

    @property
    def n_val(self) -> int:
        """Images behind every validation score."""
        return len(self.splits["val"].samples)

    def samples(self, split: str) -> tuple[Sample, ...]:
        """The images of `train`, `val`, or a split added by `data.with_split`."""
        return self.splits[split].samples

    def class_counts(self, split: str) -> tuple[int, ...]:
        """Images per class, in the order of `class_names`."""
        counts = Counter(label for _, label in self.samples(split))
        return tuple(counts[label] for label in range(self.num_classes))

    def excluded_counts(self) -> dict[str, int]:
        """Excluded files per folder of a split."""
        return dict(Counter(path.split("/", 1)[0] for path in self.excluded))


def load_manifest(run_dir: Path, class_map: str = "dataset.json") -> DatasetManifest:
    """Read the manifest that `prepare` left in the run's folder.

    Raises: DatasetChangedError if it is missing, damaged or of another schema.
    """
    path = Path(run_dir) / class_map
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DatasetChangedError(f"{path} does not exist; run prepare first") from error
    try:
        raw = json.loads(content)
        if raw["schema"] != SCHEMA:
            raise DatasetChangedError(
                f"{path} has schema {raw['schema']!r}, this trainer reads {SCHEMA}; prepare again"
            )
        return replace(_parse(raw), digest=hashlib.sha256(content).hexdigest())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DatasetChangedError(f"{path} is damaged ({error}); run prepare again") from error


def save_manifest(manifest: DatasetManifest, run_dir: Path, class_map: str = "dataset.json") -> str:
    """Write the manifest so that a crash leaves the old file or the new one; returns its digest.

    Raises: OSError, ENOSPC included; no temporary file is left then.
    """
    path = Path(run_dir) / class_map
    path.parent.mkdir(parents=True, exist_ok=True)
    content = canonical_json(_to_json(manifest)).encode()
    replace_file(path, content, durable=True)
    return hashlib.sha256(content).hexdigest()


def quick_check(manifest: DatasetManifest, data_root: Path) -> None:
    """Compare number, bytes and newest modification of the files with what `prepare` saw.

    A copied volume has new times and the same content: where only the times differ, the whole
    fingerprint decides. Raises: DatasetChangedError, DataUnreachableError.
    """
    found = list(_files(manifest, Path(data_root)))
    seen, now = manifest.quick, QuickFacts.of(found)
    if now == seen:
        return
    same_size = (now.count, now.size_bytes) == (seen.count, seen.size_bytes)
    if same_size and fingerprint(Path(data_root), found) == manifest.fingerprint:
        return
    raise DatasetChangedError(
        f"{data_root}: the data set has changed since prepare: {seen.count} files, "
        f"{seen.size_bytes} bytes then, {now.count} files, {now.size_bytes} bytes now"
        f"{', with other content' if same_size else ''}; restore it, or start a new run"
    )


def _files(manifest: DatasetManifest, root: Path) -> list[FoundFile]:
    folders = sorted({manifest.splits[role].folder for role in ("train", "val")})
    files: list[FoundFile] = []
    for folder in folders:
        split = scan_split(root, folder)
        if split is None:
            raise DatasetChangedError(f"{root / folder} is gone since prepare; restore it")
        files.extend(split.files)
    return files


def _to_json(manifest: DatasetManifest) -> dict[str, Any]:
    auto = manifest.auto_split
    quick = manifest.quick
    return {
        "schema": SCHEMA,
        "class_names": list(manifest.class_names),
        "splits": {
            role: {"folder": split.folder, "files": _by_class(split, manifest.class_names)}
            for role, split in manifest.splits.items()
        },
        "fingerprint": manifest.fingerprint,
        "quick": [quick.count, quick.size_bytes, quick.newest_mtime_ns],
        "excluded": dict(manifest.excluded),
        "auto_split": None if auto is None else {"share": auto.share, "seed": auto.seed},
        "val_missing_classes": list(manifest.val_missing_classes),
        "channels": manifest.channels,
        "metafeatures": dict(manifest.metafeatures),
        "metafeatures_version": manifest.metafeatures_version,
        "landmarker_model": manifest.landmarker_model,
        "warnings": list(manifest.warnings),
        "counts": {role: list(manifest.class_counts(role)) for role in manifest.splits},
    }


def _by_class(split: SplitList, names: Sequence[str]) -> list[list[str]]:
    """Paths below `<folder>/<class>/`, one list a class: a third of the bytes of full paths."""
    files: list[list[str]] = [[] for _ in names]
    for path, label in split.samples:
        files[label].append(path.removeprefix(f"{split.folder}/{names[label]}/"))
    return files


def _parse(raw: Mapping[str, Any]) -> DatasetManifest:
    names = tuple(str(name) for name in raw["class_names"])
    auto = raw["auto_split"]
    count, size, newest = raw["quick"]
    return DatasetManifest(
        class_names=names,
        splits={role: _parse_split(split, names) for role, split in raw["splits"].items()},
        fingerprint=str(raw["fingerprint"]),
        quick=QuickFacts(count=count, size_bytes=size, newest_mtime_ns=newest),
        excluded=dict(raw["excluded"]),
        auto_split=None if auto is None else AutoSplit(share=auto["share"], seed=auto["seed"]),
        val_missing_classes=tuple(raw["val_missing_classes"]),
        channels=int(raw["channels"]),
        metafeatures=dict(raw["metafeatures"]),
        metafeatures_version=int(raw["metafeatures_version"]),
        landmarker_model=str(raw["landmarker_model"]),
        warnings=tuple(raw["warnings"]),
    )


def _parse_split(raw: Mapping[str, Any], names: Sequence[str]) -> SplitList:
    folder = str(raw["folder"])
    samples = tuple(
        (f"{folder}/{names[label]}/{path}", label)
        for label, paths in enumerate(raw["files"])
        for path in paths
    )
    return SplitList(folder=folder, samples=samples)

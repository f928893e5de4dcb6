"""Checkpoints: committed by a manifest written last, verified by digest when read (20-trainer 5).

Between the training loop and the volume. The commit point is a folder under its final name whose
manifest verifies; nothing is ever overwritten. Tensors pass through `save_state` and `load_state`
only: no pickle of ours, `weights_only=True` on the way in.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qtt_core.errors import QuickTuneError
from qtt_core.results import State
from qtt_core.steps import digest
from qtt_trainer import layout, volume
from qtt_trainer.endings import EndedError
from qtt_trainer.layout import ConfigFolder
from qtt_trainer.volume import Written

SCHEMA = 1
SPACE_FACTOR = 2.2
"""Free space wanted before training, in units of the estimated checkpoint size."""

Writer = Callable[[IO[bytes], Mapping[str, Written]], None]
"""Fills one file; is told the files written before it, so that a result can name a digest."""


class CorruptCheckpointError(QuickTuneError):
    """A folder that is no commit: manifest missing or unreadable, wrong size, wrong digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Which attempt writes, what, and on top of what."""

    fidelity: int
    attempt: int
    nonce: str
    identity: Mapping[str, Any]
    state: State = State.OK
    epoch: int = 0
    """Whole epochs trained."""
    batch: int = 0
    """Updates done in the epoch after that; 0 in a committed step."""
    previous: int = 0
    """The fidelity that a reader falls back to."""
    meta: Mapping[str, Any]

    def to_json(self, files: Sequence[Written]) -> dict[str, Any]:
        """The manifest, with the digest of everything else in it."""
        manifest = {
            "schema": SCHEMA,
            "fidelity": self.fidelity,
            "epoch": self.epoch,
            "batch": self.batch,
            "state": self.state.value,
            "previous": self.previous,
            "attempt": self.attempt,
            "nonce": self.nonce,
            "identity": dict(self.identity),
            "meta": dict(self.meta),
            "files": [file.to_json() for file in files],
        }
        return manifest | {"digest": digest(manifest)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A folder whose manifest and files verify."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def position(self) -> tuple[int, int]:
        """(whole epochs, updates in the next epoch)."""
        return int(self.manifest["epoch"]), int(self.manifest["batch"])

    @property
    def has_state(self) -> bool:
        """Whether training can go on from here (a diverged step stores no weights)."""
        return any(file["name"] == layout.STATE for file in self.manifest["files"])

    def sha256(self, name: str) -> str:
        """The digest of one of its files, empty when there is none."""
        for file in self.manifest["files"]:
            if file["name"] == name:
                return str(file["sha256"])
        return ""


def commit(
    folder: ConfigFolder,
    label: Label,
    files: Mapping[str, Writer],
    *,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Found | None:
    """Write a step durably and give it its final name; None when another writer was first.

    `on_stage` is called after each durable stage (tests kill the process there).
    Raises: OSError (nothing is left behind but what was committed before).
    """
    target = folder.committed(label.fidelity)
    staging = folder.staging(label.fidelity, label.attempt, label.nonce)
    return _write_and_move(staging, target, label, files, on_stage)


def save_part(
    folder: ConfigFolder,
    label: Label,
    files: Mapping[str, Writer],
    *,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Found:
    """Write a mid-epoch state as the step's next part, then delete the parts before it.

    Raises: OSError.
    """
    parts = folder.parts(label.fidelity)
    parts.mkdir(parents=True, exist_ok=True)
    older = {number: path for step, number, path in folder.all_parts() if step == label.fidelity}
    name = f".f{label.fidelity}.part.a{label.attempt}.{layout.safe_name(label.nonce)}"
    number = max(older, default=0) + 1
    found = _write_and_move(folder.path / name, parts / str(number), label, files, on_stage)
    while found is None:  # another attempt took the number
        number += 1
        found = _write_and_move(folder.path / name, parts / str(number), label, files, on_stage)
    for path in older.values():
        volume.remove_tree(path)
    return found


def _write_and_move(
    staging: Path,
    target: Path,
    label: Label,
    files: Mapping[str, Writer],
    on_stage: Callable[[str], None],
) -> Found | None:
    volume.remove_tree(staging)  # an earlier process of this very attempt
    try:
        staging.mkdir(parents=True)
        manifest = _write_all(staging, label, files, on_stage)
        volume.sync_folder(staging)
        on_stage("staged")
        if not volume.move_without_replacing(staging, target):
            volume.remove_tree(staging)
            return None
        on_stage("renamed")
        volume.sync_folder(target.parent)
    except (OSError, RuntimeError):
        volume.remove_tree(staging)
        raise
    on_stage("committed")
    return Found(folder=target, manifest=manifest)


def _write_all(
    staging: Path, label: Label, files: Mapping[str, Writer], on_stage: Callable[[str], None]
) -> dict[str, Any]:
    written: dict[str, Written] = {}
    for name, write in files.items():
        written[name] = volume.write_durably(
            staging / name,
            lambda file, write=write: write(file, written),  # type: ignore[misc]
        )
        on_stage(name)
    manifest = label.to_json(list(written.values()))
    volume.write_json(staging / layout.MANIFEST, manifest)
    on_stage(layout.MANIFEST)
    return manifest


def verify(folder: Path) -> Found:
    """Read a folder's manifest, then check size and digest of every file it lists.

    Raises: CorruptCheckpointError naming the file and the fault; OSError of the volume itself.
    """
    manifest = volume.read_json(folder / layout.MANIFEST)
    if manifest is None or manifest.get("schema") != SCHEMA:
        raise CorruptCheckpointError(f"{folder}: no readable manifest of schema {SCHEMA}")
    try:
        if digest({k: v for k, v in manifest.items() if k != "digest"}) != manifest["digest"]:
            raise CorruptCheckpointError(f"{folder}: the manifest is not as it was written")
        for file in manifest["files"]:
            _verify_file(folder / str(file["name"]), int(file["bytes"]), str(file["sha256"]))
        int(manifest["epoch"]), int(manifest["batch"])
        dict(manifest["identity"]), dict(manifest["meta"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{folder}: malformed manifest ({error!r})") from error
    return Found(folder=folder, manifest=manifest)


def _verify_file(path: Path, size: int, sha256: str) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{path}: missing") from error
    if found != size:
        raise CorruptCheckpointError(f"{path}: {found} bytes, written with {size}")
    if volume.file_sha256(path) != sha256:
        raise CorruptCheckpointError(f"{path}: its SHA-256 is not the one it was written with")


def require_identity(
    found: Found, identity: Mapping[str, Any], *, allow_dtype_change: bool = False
) -> None:
    """Refuse a checkpoint of another identity; it is never adapted.

    Raises: EndedError `identity_mismatch` naming the fields that differ.
    """
    theirs = dict(found.manifest["identity"])
    ignored = {"dtype"} if allow_dtype_change else set()
    differing = [
        f"{name} is {theirs.get(name)!r} there and {identity.get(name)!r} here"
        for name in sorted(theirs.keys() | identity.keys())
        if name not in ignored and theirs.get(name) != identity.get(name)
    ]
    if differing:
        raise EndedError(
            State.IDENTITY_MISMATCH, f"{found.folder}: {'; '.join(differing)}; never adapted"
        )


def resumable(folder: ConfigFolder, fidelity_to: int) -> Iterator[Found | CorruptCheckpointError]:
    """Every state to go on from towards `fidelity_to`, newest first; a committed one before a part.

    Folders that do not verify come as the error that says why: the caller falls back to the next.
    Raises: OSError of the volume itself.
    """
    candidates = [
        (fidelity, 0, 1, path)
        for fidelity, path in folder.all_committed()
        if fidelity <= fidelity_to
    ]
    candidates += [(*_part_position(path), 0, path) for _, _, path in folder.all_parts()]
    for epoch, batch, _, path in sorted(candidates, reverse=True):
        if (epoch, batch) > (fidelity_to, 0):
            continue
        try:
            found = verify(path)
        except CorruptCheckpointError as error:
            yield error
        else:
            if found.has_state:
                yield found


def _part_position(path: Path) -> tuple[int, int]:
    """Where a part claims to be; unreadable ones sort last and fail to verify."""
    manifest = volume.read_json(path / layout.MANIFEST) or {}
    epoch, batch = manifest.get("epoch"), manifest.get("batch")
    return (epoch, batch) if isinstance(epoch, int) and isinstance(batch, int) else (0, 0)


def make_room(folder: ConfigFolder, fidelity: int, nonce: str) -> None:
    """Move a folder that has the final name but does not verify out of the way."""
    target = folder.committed(fidelity)
    if target.exists():
        aside = folder.quarantine(fidelity, nonce)
        volume.remove_tree(aside)
        target.rename(aside)


def clean_up(folder: ConfigFolder, fidelity: int, attempt: int, nonce: str) -> None:
    """After a commit: delete the step's parts and what lower attempts left while writing."""
    volume.remove_tree(folder.parts(fidelity))
    volume.remove_tree(folder.quarantine(fidelity, nonce))
    for path in folder.stale_staging(fidelity, attempt):
        volume.remove_tree(path)


def collect_garbage(run: Path, paths: Sequence[str], *, keep: Path | None = None) -> list[str]:
    """Delete relative paths inside the run; returns a warning for each that was refused.

    Refused are the run itself, what a link leads out of it, and the folders around `keep`.
    """
    root = run.resolve()
    warnings = []
    for relative in paths:
        path = root / relative
        inside = path.parent.resolve().is_relative_to(root) and path != root
        used = keep is not None and keep.resolve().is_relative_to(path.resolve())
        if not inside or used:
            warnings.append(f"gc: {relative} was not deleted: outside the run or in use")
        else:
            volume.remove_tree(path)
    return warnings


def save_state(state: Mapping[str, Any]) -> Writer:
    """A writer for `state.pt`: tensors, numbers, strings, lists and dicts only."""

    def write(file: IO[bytes], written: Mapping[str, Written]) -> None:
        import torch

        torch.save(dict(state), file)

    return write


def load_state(found: Found) -> dict[str, Any]:
    """The tensors of a verified folder, on the CPU.

    Raises: CorruptCheckpointError if the archive cannot be read in spite of its digest.
    """
    import torch

    path = found.folder / layout.STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CorruptCheckpointError(f"{path}: cannot be loaded ({error})") from error
    if not isinstance(state, dict):
        raise CorruptCheckpointError(f"{path}: holds no state")
    return state

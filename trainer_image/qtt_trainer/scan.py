"""Finds the images of a split, `<split>/<class>/**/<file>`, by name; nothing is decoded.

First part of `prepare`, and the quick check of every step. Own scanner: torchvision and timm build
the class index of each split by itself, so that a class missing in val shifts every later label.
It imports neither torch nor Pillow, so that a wrong folder is reported within a second.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qtt_trainer.data_errors import BadDataError, DataUnreachableError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EDGE_BYTES = 4096
STORAGE_ERRNOS = frozenset({errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT})


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """One candidate image; `path` is relative to the data root, with forward slashes."""

    path: str
    size: int
    mtime_ns: int
    regular: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSplit:
    """What a split's folder holds. `loose`: images beside the class folders; `other`: no images."""

    folder: str
    classes: Mapping[str, tuple[FoundFile, ...]]
    loose: tuple[str, ...] = ()
    other: int = 0

    @property
    def files(self) -> Iterator[FoundFile]:
        """Every candidate image, class by class."""
        return (found for files in self.classes.values() for found in files)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickFacts:
    """Cheap facts that change with the data set: number of files, bytes, newest modification."""

    count: int
    size_bytes: int
    newest_mtime_ns: int

    @staticmethod
    def of(files: Iterable[FoundFile]) -> QuickFacts:
        """The facts of some files."""
        count = size = newest = 0
        for found in files:
            count, size, newest = count + 1, size + found.size, max(newest, found.mtime_ns)
        return QuickFacts(count=count, size_bytes=size, newest_mtime_ns=newest)


def scan_split(root: Path, folder: str) -> FoundSplit | None:
    """The images below `root/folder`, in lexicographic order; None if there is no such folder.

    A class is a folder directly below the split; deeper folders belong to it. Hidden entries are
    ignored, links are followed (a link back to an own ancestor is not).
    Raises: DataUnreachableError if the volume fails; BadDataError for a folder that may not be
    read.
    """
    top = root / folder
    if not folder or not _is_folder(top):
        return None
    classes: dict[str, tuple[FoundFile, ...]] = {}
    loose: list[str] = []
    other = 0
    for entry in _entries(top):
        if _is_folder(entry):
            found, foreign = _scan_class(root, Path(entry.path))
            classes[entry.name] = found
            other += foreign
        elif _is_image_name(entry.name):
            loose.append(f"{folder}/{entry.name}")
        else:
            other += 1
    return FoundSplit(folder=folder, classes=classes, loose=tuple(loose), other=other)


def folders(root: Path) -> list[str]:
    """Names of the folders directly below `root`, hidden ones left out.

    Raises: BadDataError if it cannot be read, DataUnreachableError if the volume fails.
    """
    return [entry.name for entry in _entries(root) if _is_folder(entry)]


def fingerprint(root: Path, files: Iterable[FoundFile]) -> str:
    """SHA-256 over the sorted (relative path, size, hash of the first and last 4 KiB)."""
    return combine_edges((found.path, found.size, edge_hash(root / found.path)) for found in files)


def combine_edges(rows: Iterable[tuple[str, int, str]]) -> str:
    """The fingerprint of (relative path, size, edge hash) rows."""
    total = hashlib.sha256()
    for path, size, edges in sorted(rows):
        total.update(f"{path}\0{size}\0{edges}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def edge_hash(path: Path) -> str:
    """Hash of a file's first and last 4 KiB; empty for what cannot be opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with path.open("rb") as file:
            head = file.read(EDGE_BYTES)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - EDGE_BYTES))
            return hash_edges(head, file.read(EDGE_BYTES))
    except OSError as error:
        raise_storage(error, path)
        return ""


def hash_edges(head: bytes, tail: bytes) -> str:
    """The edge hash of a file whose ends are known."""
    return hashlib.sha256(head + b"\0" + tail).hexdigest()


def raise_storage(error: OSError, path: Path) -> None:
    """Turn errors of the volume itself into DataUnreachableError; return for all others."""
    if error.errno in STORAGE_ERRNOS:
        raise DataUnreachableError(f"{path}: the data volume failed ({error.strerror})") from error


def _scan_class(root: Path, folder: Path) -> tuple[tuple[FoundFile, ...], int]:
    found: list[FoundFile] = []
    other = 0
    stack: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while stack:
        here, ancestors = stack.pop()
        identity = _identity(here)
        if identity in ancestors:
            continue
        for entry in _entries(here):
            if _is_folder(entry):
                stack.append((Path(entry.path), ancestors | {identity}))
            elif _is_image_name(entry.name):
                found.append(_found(root, entry))
            else:
                other += 1
    return tuple(sorted(found, key=lambda item: item.path)), other


def _found(root: Path, entry: os.DirEntry[str]) -> FoundFile:
    path = Path(entry.path).relative_to(root).as_posix()
    try:
        facts = entry.stat()
    except OSError as error:  # a dangling link: listed, so that it is reported and excluded
        raise_storage(error, Path(entry.path))
        return FoundFile(path=path, size=0, mtime_ns=0, regular=False)
    regular = stat.S_ISREG(facts.st_mode)
    return FoundFile(path=path, size=facts.st_size, mtime_ns=facts.st_mtime_ns, regular=regular)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as listing:
            entries = [entry for entry in listing if not entry.name.startswith(".")]
    except OSError as error:
        raise_storage(error, folder)
        raise BadDataError(f"{folder}: the folder cannot be read ({error.strerror})") from error
    return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str] | Path) -> bool:
    """Follows links; a loop of links or a closed door is no folder."""
    try:
        return entry.is_dir()
    except OSError as error:
        raise_storage(error, Path(entry))
        return False


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)

"""Durable files: written with a digest, synced, and moved into place without replacing anything.

Under `checkpoint` and `report`. Everything goes through Python file objects: saving to a *path* on
a full disk ends in an opaque RuntimeError of torch, through a file object in `OSError ENOSPC`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qtt_core.results import State
from qtt_trainer.endings import EndedError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file as it was written."""

    name: str
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As a manifest lists it."""
        return {"name": self.name, "bytes": self.size_bytes, "sha256": self.sha256}


class _HashingFile(io.RawIOBase):
    """A write-only file that hashes what passes; not seekable, so that writers append only."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.sha = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._raw.write(view)
        except OSError as error:
            self.error = error
            raise
        self.sha.update(view)
        self.size += view.nbytes
        return view.nbytes


def write_durably(path: Path, write: Callable[[IO[bytes]], None]) -> Written:
    """Create `path`, let `write` fill it, flush and fsync.

    Raises: OSError, ENOSPC included; FileExistsError if the file is there already.
    """
    with path.open("xb") as raw:
        file = _HashingFile(raw)
        try:
            write(file)  # type: ignore[arg-type]  # a RawIOBase serves as IO[bytes] for writers
        except RuntimeError as error:
            # torch's writer, unwinding from a full disk, hides it behind an error of its own.
            raise (file.error or error) from error
        raw.flush()
        os.fsync(raw.fileno())
    return Written(name=path.name, size_bytes=file.size, sha256=file.sha.hexdigest())


def write_json(path: Path, value: Mapping[str, Any]) -> Written:
    """`write_durably` for JSON; NaN is refused."""
    data = json_bytes(value)
    return write_durably(path, lambda file: _write_all(file, data))


def replace_json(path: Path, value: Mapping[str, Any], *, durable: bool = False) -> None:
    """`replace_file` for JSON; NaN is refused."""
    replace_file(path, json_bytes(value), durable=durable)


def replace_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Put bytes in place of a file atomically: readers see the old or the new one, also in a crash.

    `durable`: return only when a power cut cannot undo it. Raises: OSError, ENOSPC included; no
    temporary file is left then.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Readable JSON with a final newline; NaN and infinities are refused."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when it is not there or not readable as one."""
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file. Raises: OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable; NFS answers EINVAL, which means nothing was needed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def move_without_replacing(source: Path, target: Path) -> bool:
    """Rename a folder to a name that must be free; False if a non-empty folder has it already."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def remove_tree(path: Path) -> None:
    """Delete a folder or file; what is gone is no error, links are not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise EndedError `disk_full` when the volume cannot take `needed_bytes` more."""
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if free < needed_bytes:
        raise EndedError(
            State.DISK_FULL,
            f"{folder}: {free / 1e6:.0f} MB free, a checkpoint needs {needed_bytes / 1e6:.0f} MB",
        )


def _write_all(file: IO[bytes], data: bytes) -> None:
    for start in range(0, len(data), CHUNK_BYTES):
        file.write(data[start : start + CHUNK_BYTES])

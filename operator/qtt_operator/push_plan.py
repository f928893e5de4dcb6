"""What `qtt data push` sends: a folder's contents with digests, as tar, and the pod's side of it.

Nothing here talks to a cluster. Files are compared by SHA-256 on both sides, links by their target;
the pod's side is a POSIX shell with tar, find and sha256sum, which every small image has.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qtt_core.errors import Fault, SpecError
from qtt_core.fields import raise_faults

CHUNK = 1 << 17
BLOCK = tarfile.BLOCKSIZE
BATCH_BYTES, BATCH_FILES = 64 << 20, 2000
"""Of one stream: what a lost connection costs at most, and one large file more."""

STAGE = ".qtt-push"
"""Beside the target while it is sent; what lies in it when a push broke off is not sent again."""

_UNSENDABLE = "\n\r\t\\"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A file by its digest, or a link by its target; `path` is relative to the target's parent."""

    path: str
    mark: str
    size: int = 0
    source: Path = Path()

    @property
    def is_link(self) -> bool:
        """Whether it is a link."""
        return self.mark.startswith("->")

    @property
    def top(self) -> str:
        """The name that appears at the target in one go."""
        return self.path.partition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`CLAIM[:path]`, as folders of the pod that mounts the claim at `MOUNT`."""

    claim: str
    path: str = ""

    @property
    def parent(self) -> str:
        """Where the names that are sent appear."""
        return str(PurePosixPath(MOUNT) / PurePosixPath(self.path).parent)

    @property
    def name(self) -> str:
        """The folder to make, empty: what DIR holds lies at the top of the claim."""
        return PurePosixPath(self.path).name

    @property
    def stage(self) -> str:
        """One for each target: two pushes to different folders do not meet."""
        return f"{self.parent}/{STAGE}-{self.name}" if self.name else f"{self.parent}/{STAGE}"


MOUNT = "/claim"


def parse_target(text: str) -> Target:
    """Raises: SpecError unless it is CLAIM or CLAIM:path, the path inside the claim."""
    claim, _, path = text.partition(":")
    pure = PurePosixPath(path.strip("/"))
    if not claim or path.startswith("/") or ".." in pure.parts:
        remedy = "use CLAIM or CLAIM:path, a relative path inside the claim"
        raise SpecError([Fault("CLAIM[:path]", text, remedy)])
    return Target(claim=claim, path="" if str(pure) == "." else str(pure))


def scan(folder: Path, target: Target) -> list[Item]:
    """Every file and link of a folder, sorted; links that leave it are sent as the files they name.

    Raises: SpecError for no folder, an empty one, or names and links that cannot be sent; OSError.
    """
    if not folder.is_dir():
        raise SpecError([Fault("DIR", str(folder), "no such folder")])
    root, faults = folder.resolve(), list[Fault]()
    items = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        sent = f"{target.name}/{inside}" if target.name else inside
        if any(character in inside for character in _UNSENDABLE):
            faults.append(Fault("DIR", inside, "rename it: no line breaks, no backslashes"))
        elif path.is_symlink() and path.resolve().is_relative_to(root):
            items.append(Item(path=sent, mark=f"->{path.readlink()}"))
        elif path.is_symlink() and not path.is_file():
            faults.append(Fault("DIR", inside, "a link to elsewhere: put the folder itself there"))
        elif path.is_file():
            size, mark = path.stat().st_size, _sha256(path)
            items.append(Item(path=sent, mark=mark, size=size, source=path))
    if not items and not faults:
        faults.append(Fault("DIR", str(folder), "holds no file"))
    raise_faults(faults)
    return items


def batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Items in streams of bounded size, in order."""
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and (size + item.size > BATCH_BYTES or len(batch) >= BATCH_FILES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.size
    if batch:
        yield batch


def tar_size(items: Sequence[Item]) -> int:
    """Bytes of `tar_stream`: the pod reads so many, as stdin cannot be closed everywhere."""
    blocks = sum(len(_header(item)) + -(-item.size // BLOCK) * BLOCK for item in items)
    return blocks + 2 * BLOCK


def tar_stream(items: Sequence[Item]) -> Iterator[bytes]:
    """The items as an archive. Raises: OSError; SpecError for a file that has changed its size."""
    for item in items:
        yield _header(item)
        left = item.size
        if left:
            with item.source.open("rb") as file:
                while left and (chunk := file.read(min(CHUNK, left))):
                    left -= len(chunk)
                    yield chunk
        if left:
            raise SpecError([Fault("DIR", str(item.source), "has changed while it was sent")])
        yield b"\0" * (-item.size % BLOCK)
    yield b"\0" * 2 * BLOCK


def parse_listing(text: str) -> dict[str, str]:
    """Path -> mark, of what `LIST` printed."""
    found = {}
    for line in text.splitlines():
        mark, _, path = line.partition("  ")
        if line.startswith("->"):
            mark, _, path = line.partition("\t")
        found[path.removeprefix("./")] = mark
    return found


def missing(items: Sequence[Item], there: Mapping[str, str]) -> list[Item]:
    """Items that are not there as they should be."""
    return [item for item in items if there.get(item.path) != item.mark]


def tops(items: Sequence[Item]) -> list[str]:
    """The names that appear at the target."""
    return list(dict.fromkeys(item.top for item in items))


# --- the pod's side: $1, $2, … are arguments, never part of the text ------------------------------

LIST = """
cd "$1" 2>/dev/null || exit 0
shift
for name; do
  [ -e "$name" ] || [ -L "$name" ] || continue
  find "./$name" -type f -exec sha256sum {} +
  find "./$name" -type l -exec sh -c '
    for link; do printf "%s\\t%s\\n" "->$(readlink "$link")" "$link"; done
  ' sh {} +
done
"""
"""FOLDER NAME…: digests of what is there below the names."""

CLEAR = 'rm -rf "$1"'

EXTRACT = """
set -e
umask 022
mkdir -p "$1"
head -c "$2" | { tar -x -f - -C "$1" || { cat > /dev/null; exit 1; }; }
"""
"""STAGE BYTES: unpack that much of stdin, and read all of it: an exec ends with its input."""

COMMIT = """
set -e
stage=$1 parent=$2
shift 2
for name; do
  if [ -e "$parent/$name" ] || [ -L "$parent/$name" ]; then mv "$parent/$name" "$stage/.old"; fi
  mv "$stage/$name" "$parent/$name"
  rm -rf "$stage/.old"
done
rm -rf "$stage"
"""
"""STAGE PARENT NAME…: each name appears whole, by a rename."""


def _header(item: Item) -> bytes:
    info = tarfile.TarInfo(item.path)
    info.mode, info.size = 0o644, item.size
    if not item.is_link:
        info.mtime = int(item.source.stat().st_mtime)
    else:
        info.type, info.linkname = tarfile.SYMTYPE, item.mark.removeprefix("->")
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

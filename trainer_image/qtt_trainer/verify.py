"""Decodes every image once, in threads, so that a broken file is known before the first step.

Second part of `prepare` (and of `evaluate`). One read serves four needs: is it an image, its size,
its content hash (duplicates, overlap of train and val) and its part of the fingerprint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qtt_trainer.data_errors import DecodeError
from qtt_trainer.decode import check
from qtt_trainer.scan import EDGE_BYTES, FoundFile, hash_edges, raise_storage

MAX_BYTES = 1 << 30
CHUNK = 64
"""Files a task: enough to hide the pool's own cost, few enough to spread over the threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """A readable image: pixels as displayed, bytes, format, hashes of content and both ends."""

    path: str
    width: int
    height: int
    size: int
    format: str
    content: bytes
    edges: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """Readable images by path, in the order given; unreadable ones with the reason."""

    images: Mapping[str, ImageFacts]
    faults: Mapping[str, str]
    edges: Mapping[str, str]
    """Edge hash of every file, for the fingerprint."""


def verify_files(root: Path, files: Sequence[FoundFile], *, threads: int | None = None) -> Verified:
    """Read and decode every file. Raises: DataUnreachableError if the volume fails."""
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    images: dict[str, ImageFacts] = {}
    faults: dict[str, str] = {}
    edges: dict[str, str] = {}
    workers = threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="verify") as pool:
        for results in pool.map(lambda chunk: [_verify(root, item) for item in chunk], chunks):
            for path, edge, outcome in results:
                edges[path] = edge
                if isinstance(outcome, ImageFacts):
                    images[path] = outcome
                else:
                    faults[path] = outcome
    return Verified(images=images, faults=faults, edges=edges)


def duplicates(images: Sequence[ImageFacts]) -> Iterator[tuple[ImageFacts, ImageFacts]]:
    """(first, again) for every image whose bytes were seen before."""
    first: dict[bytes, ImageFacts] = {}
    for image in images:
        if image.content in first:
            yield first[image.content], image
        else:
            first[image.content] = image


def _verify(root: Path, found: FoundFile) -> tuple[str, str, ImageFacts | str]:
    """(path, edge hash, facts or the reason of a fault) of one file."""
    if not found.regular:  # reading a pipe would wait for ever
        return found.path, "", "not a regular file, or a link to nothing"
    if found.size > MAX_BYTES:
        return found.path, "", f"{found.size} bytes exceed the limit of 1 GiB"
    path = root / found.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise_storage(error, path)
        return found.path, "", f"cannot be read: {error.strerror}"
    edges = hash_edges(content[:EDGE_BYTES], content[-EDGE_BYTES:])
    try:
        width, height, kind = check(content)
    except DecodeError as error:
        return found.path, edges, str(error)
    return (
        found.path,
        edges,
        ImageFacts(
            path=found.path,
            width=width,
            height=height,
            size=len(content),
            format=kind,
            content=hashlib.sha256(content).digest()[:16],
            edges=edges,
        ),
    )

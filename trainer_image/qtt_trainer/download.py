"""One file over HTTP, resumed where an earlier process broke off, and whether it is whole.

Standard library only; what a hub's answers mean beyond their status is `fetch`'s business.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

from qtt_core.results import EXIT_BAD_JOB, State
from qtt_trainer.endings import EndedError

CHUNK = 1 << 20
TIMEOUT_SECONDS = 30.0
GONE = frozenset({401, 403, 404, 410})
"""Answers that no repetition changes."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEADER_LIMIT = 100 << 20
_NO_HEADERS: Mapping[str, str] = {}


class UnreachableError(EndedError):
    """The host gave no answer at all: asking it for the next file is a waste of time."""

    def __init__(self, url: str, why: object) -> None:
        super().__init__(
            State.WEIGHTS_UNAVAILABLE,
            f"{host_of(url)} cannot be reached ({why}); open egress to it, name a mirror with"
            " --endpoint, or fetch on a machine that reaches it and copy the folder",
        )


class _AnsweredError(Exception):
    """A status that is no success."""

    def __init__(self, status: int, content_range: str) -> None:
        self.status, self.content_range = status, content_range
        super().__init__(status)


def host_of(url: str) -> str:
    """`huggingface.co:443`."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


class AbsentError(EndedError):
    """The host answered that there is no such file."""


def refused(url: str, status: int) -> EndedError:
    """What an answer of the server means: 401, 403 and 404 are final, others may pass."""
    kind = AbsentError if status in {404, 410} else EndedError
    return kind(
        State.WEIGHTS_UNAVAILABLE,
        f"{url} answered {status}",
        exit_code=EXIT_BAD_JOB if status in GONE else None,
    )


def download(url: str, part: Path, secret: str = "") -> str:
    """Append what is missing to `part`; the SHA-256 of the whole. `secret`: as Authorization.

    Raises: UnreachableError; EndedError `weights_unavailable` with what has come so far kept for
    the next try; OSError of the volume.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0
    try:
        response = _open(url, secret, {"Range": f"bytes={have}-"} if have else {})
    except _AnsweredError as error:
        if error.status != 416:
            raise refused(url, error.status) from error
        return _complete(url, part, have, error.content_range)
    with response, part.open("ab" if response.status == 206 else "wb") as file:
        expected = response.length
        received = 0
        try:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                received += len(chunk)
        except (HTTPException, TimeoutError, ConnectionError) as error:
            raise _broken(url, file.tell(), error) from error
        if expected is not None and received < expected:
            raise _broken(url, file.tell(), f"{expected - received} bytes short")
    return sha256_of(part)


def published_digest(url: str, etag: str | None, secret: str = "") -> str:
    """The SHA-256 that the server tells: its ETag, else a file `<url>.sha256`; else empty."""
    if etag and _SHA256.fullmatch(etag):
        return etag
    try:
        with _open(f"{url}.sha256", secret) as response:
            words = response.read(200).decode(errors="replace").split()
    except (UnreachableError, _AnsweredError):
        return ""
    return words[0] if words and _SHA256.fullmatch(words[0]) else ""


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wrong_safetensors(path: Path) -> str:
    """Why a file is no whole safetensors file, empty if it is one; reads its header only."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            return f"it is no safetensors file ({size} bytes)"
        try:
            header = json.loads(file.read(length))
            ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "its header is unreadable"
    whole = 8 + length + max(ends, default=0)
    return "" if size == whole else f"it has {size} bytes of {whole}"


def _open(url: str, secret: str, headers: Mapping[str, str] = _NO_HEADERS) -> HTTPResponse:
    """The secret stays with the host: a hub redirects to a store of somebody else's.

    Raises: UnreachableError; _AnsweredError for any answer but a good one.
    """
    if urlsplit(url).scheme not in {"http", "https"}:
        raise EndedError(State.INVALID_CONFIG, f"{url}: use an http or https address")
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310  # checked above
    if secret:
        request.add_unredirected_header("Authorization", secret)
    try:
        opened: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            raise _AnsweredError(error.code, error.headers.get("Content-Range", "")) from error
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise UnreachableError(url, getattr(error, "reason", error)) from error
    return opened


def _broken(url: str, have: int, why: object) -> EndedError:
    return EndedError(
        State.WEIGHTS_UNAVAILABLE, f"{url} broke off after {have} bytes ({why}); a retry resumes"
    )


def _complete(url: str, part: Path, have: int, content_range: str) -> str:
    """The server has nothing behind what we have: it is all, or too much and worth nothing."""
    if content_range.rpartition("/")[2] == str(have):
        return sha256_of(part)
    part.unlink()
    raise _broken(url, have, "it is shorter now")

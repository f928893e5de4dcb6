"""The command `weights`: fills a folder with a hub's pretrained weights, for steps to read offline.

The one command that opens a connection. The folder has huggingface_hub's cache layout, which is
where `pretrained.find_weights` and timm look; `weights.json` in it says what came from where, with
digests and licences. A second call fetches what is missing, resumes what broke off, and writes
nothing where all is there. The source is a hub, or a plain file server with a hub's paths.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtt_core.hub import ModelCard, parse_card
from qtt_core.jobs import JobDocument
from qtt_core.results import EXIT_BAD_JOB, EXIT_CODES, State, StepResult
from qtt_trainer import volume
from qtt_trainer.download import (
    AbsentError,
    UnreachableError,
    download,
    published_digest,
    refused,
    sha256_of,
    wrong_safetensors,
)
from qtt_trainer.endings import EndedError, classify
from qtt_trainer.pretrained import FILES, find_weights
from qtt_trainer.report import Report

log = logging.getLogger(__name__)

RECORD = "weights.json"
HUB = "hub"
"""`weights` of a card whose file comes from a hub; others ship with the trainer."""

REASON_NAMES = 500
"""Characters of names in a reason, which has room for 1000."""

_SHA256, _NO_NAME = re.compile(r"[0-9a-f]{64}"), re.compile(r"[^0-9A-Za-z._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where from. `endpoint` empty = $HF_ENDPOINT, else the public hub; a token lies in a file."""

    endpoint: str = ""
    token_file: str = ""

    def token(self) -> str | bool:
        """The token, False without a file. Raises: EndedError if the file cannot be read."""
        if not self.token_file:
            return False
        try:
            return Path(self.token_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise EndedError(State.INVALID_CONFIG, f"token file: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one model; `state` is present, fetched or failed."""

    card: ModelCard
    state: str
    path: Path | None = None
    error: EndedError | None = None

    def to_json(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "name": self.card.name,
            "tag": self.card.tag,
            "state": self.state,
            "bytes": self.path.stat().st_size if self.path else 0,
            "licence": self.card.licence,
            "reason": self.error.reason if self.error else "",
        }


def run(job: JobDocument) -> Report:
    """The command as a Job: cards and folder from its document, endpoint from the environment."""
    source = Source(token_file=os.environ.get("HF_TOKEN_PATH", ""))
    cards = [parse_card(card) for card in job.cards]
    result = conclude(fetch(cards, Path(job.paths.weights), source))
    message = StepResult(
        attempt=job.attempt, nonce=job.nonce, state=result.state, reason=result.reason
    )
    return Report(message=message, result={}, exit_code=result.exit_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """What all outcomes add up to; `reason` names the models without weights."""

    state: State = State.OK
    reason: str = ""
    exit_code: int = EXIT_CODES[State.OK]


def conclude(outcomes: Sequence[Outcome]) -> Conclusion:
    """A retry is worth while if it may help one of them."""
    failed = [(o.card.name, o.error) for o in outcomes if o.error is not None]
    if not failed:
        return Conclusion()
    lasting = all(error.exit_code == EXIT_BAD_JOB for _, error in failed)
    first = next(e for _, e in failed if lasting or e.exit_code != EXIT_BAD_JOB)
    names = ", ".join(name for name, _ in failed)
    if len(names) > REASON_NAMES:
        names = f"{names[:REASON_NAMES].rpartition(',')[0]}, …"
    reason = f"no weights for {names} ({len(failed)} of {len(outcomes)}): {first.reason}"
    return Conclusion(state=first.state, reason=reason, exit_code=first.exit_code)


def fetch(
    cards: Sequence[ModelCard], folder: Path, source: Source, *, verify: bool = False
) -> list[Outcome]:
    """Fetch what is not at hand, one model after the other; one that fails stops no other.

    `verify`: digest what is there, too, and fetch anew what is damaged. Cards whose weights ship
    with the trainer are left out. Raises: EndedError for an unreadable token; OSError.
    """
    wanted = [card for card in cards if card.weights == HUB]
    known = read_record(folder)
    if all(_at_hand(card, folder, known, verify=verify) for card in wanted):
        return [_present(card, folder) for card in wanted]  # not a byte is written
    token = source.token()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):  # who waited finds what the other has fetched
        known, outcomes = read_record(folder), list[Outcome]()
        unreachable: EndedError | None = None
        for number, card in enumerate(wanted, 1):
            if _at_hand(card, folder, known, verify=verify):
                outcomes.append(_present(card, folder))
                continue
            outcome = (
                Outcome(card=card, state="failed", error=unreachable)
                if unreachable
                else _fetch_one(card, folder, source, token)
            )
            if isinstance(outcome.error, UnreachableError):
                unreachable = outcome.error
            outcomes.append(outcome)
            if outcome.path is not None:
                known = {**known, card.name: _entry(card, outcome.path, source)}
                volume.replace_json(folder / RECORD, {"schema": 1, "models": known}, durable=True)
            words = outcome.error.reason if outcome.error else outcome.state
            log.info("%d of %d: %s: %s", number, len(wanted), card.name, words)
    return outcomes


def read_record(folder: Path) -> Mapping[str, Any]:
    """Model -> what `weights.json` says of it; empty where there is none."""
    try:
        raw = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    models = raw.get("models") if isinstance(raw, dict) else None
    return models if isinstance(models, dict) else {}


# --- one model ------------------------------------------------------------------------------------


def _fetch_one(card: ModelCard, folder: Path, source: Source, token: str | bool) -> Outcome:
    try:
        path = _first_file(card, folder, source, token)
    except (EndedError, OSError) as error:
        ended = error if isinstance(error, EndedError) else classify(error)
        if ended.state in {State.INTERNAL, State.DISK_FULL, State.INFRA_STORAGE}:
            raise
        return Outcome(card=card, state="failed", error=ended)
    return Outcome(card=card, state="fetched", path=path)


def _first_file(card: ModelCard, folder: Path, source: Source, token: str | bool) -> Path:
    """The first of timm's file names that the server has."""
    for file in FILES[:-1]:
        with contextlib.suppress(AbsentError):
            return _one_file(card, file, folder, source, token)
    return _one_file(card, FILES[-1], folder, source, token)


def _one_file(card: ModelCard, file: str, folder: Path, source: Source, token: str | bool) -> Path:
    """Into the cache's layout; where no hub names a commit, the digest stands in for it.

    huggingface_hub asks, `download` fetches: the library (2.4) forgets what broke off.
    """
    from huggingface_hub import constants, get_hf_file_metadata

    constants.HF_HUB_OFFLINE = False  # this command is the exception to a pod's or a shell's rule
    constants.HF_HUB_DISABLE_TELEMETRY = True  # else it also asks for a list of programs to report
    endpoint = (source.endpoint or constants.ENDPOINT).rstrip("/")
    url = f"{endpoint}/timm/{card.tag}/resolve/main/{file}"
    with _hub_errors(url):
        about = get_hf_file_metadata(url, token=token, endpoint=endpoint)
    secret = f"Bearer {token}" if token else ""
    blobs = folder / f"models--timm--{card.tag}" / "blobs"
    part = blobs / f"{_NO_NAME.sub('-', about.etag or file)[:80]}.incomplete"
    digest = download(url, part, secret)
    published = published_digest(url, about.etag, secret)
    wrong = wrong_safetensors(part) if file == FILES[0] else ""
    if published and published != digest:
        wrong = f"its SHA-256 is {digest[:12]}…, published is {published[:12]}…"
    if wrong:
        part.unlink()
        raise EndedError(State.WEIGHTS_CORRUPT, f"{url}: {wrong}; it was deleted")
    return _put(part, digest, file, about.commit_hash or digest[:40])


def _put(part: Path, digest: str, file: str, revision: str) -> Path:
    """Move a whole file to its place; the reference, by which readers find it, comes last."""
    blob, repository = part.with_name(digest), part.parent.parent
    part.replace(blob)
    path = repository / "snapshots" / revision / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(Path("../../blobs") / digest)
    except OSError:  # a volume without links
        blob.replace(path)
    (repository / "refs").mkdir(exist_ok=True)
    volume.replace_file(repository / "refs" / "main", revision.encode(), durable=True)
    return path


@contextlib.contextmanager
def _hub_errors(url: str) -> Iterator[None]:
    """Raises: EndedError for what kept huggingface_hub from an answer, or for the answer.

    Its HTTP library has changed twice; an answer's status is what all of its errors carry.
    """
    try:
        yield
    except EndedError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            raise refused(url, status) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the volume's
        if type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "requests", "httpcore"}:
            raise UnreachableError(url, error) from error
        raise


# --- what is there --------------------------------------------------------------------------------


def _at_hand(card: ModelCard, folder: Path, known: Mapping[str, Any], *, verify: bool) -> bool:
    """Whether a model's file is there, of the size and, if asked for, the digest recorded."""
    path = find_weights(card, str(folder))
    if path is None:
        return False
    about = known.get(card.name)
    if not isinstance(about, Mapping) or about.get("tag") != card.tag:
        return True  # filled by another tool
    whole = path.stat().st_size == about.get("bytes") and (
        not verify or sha256_of(path) == about.get("sha256")
    )
    if not whole:
        log.warning("%s: %s is damaged; fetching it anew", card.name, path)
        _remove(path)
    return whole


def _present(card: ModelCard, folder: Path) -> Outcome:
    return Outcome(card=card, state="present", path=find_weights(card, str(folder)))


def _entry(card: ModelCard, path: Path, source: Source) -> dict[str, Any]:
    blob = path.resolve()
    return {
        "tag": card.tag,
        "file": path.name,
        "bytes": blob.stat().st_size,
        "sha256": blob.name if _SHA256.fullmatch(blob.name) else sha256_of(path),
        "licence": card.licence,
        "revision": path.parent.name,
        "endpoint": source.endpoint,
        "fetched": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _remove(path: Path) -> None:
    """A file of the cache and what it links to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One at a time fills a folder, where its file system knows locks."""
    with (folder / ".fetching").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

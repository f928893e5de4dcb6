"""The folder of a local run, `.quicktune/<name>/`, and where claims lie on this machine.

    uid              drawn at the first start; identity of the run everywhere
    lock             held by the runner while it runs
    redis/           the embedded store (append-only file)
    runs/<uid>/      checkpoints, results and logs, laid out as on a cluster volume
    status.yaml      the shape of a TuningRun's `.status`
    run.json         what `qtt` verbs need to read the run without its manifest
    logs/            standard error of the trainer parents
    trace.jsonl      monotonic times of every job, for the overhead figure

Names and small files only: no store, no processes.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qtt_core.errors import Fault, SpecError, VolumeError

DEFAULT_STATE_DIR = ".quicktune"
PRIORS = "priors"
"""In the state folder, beside the runs: what `qtt metatrain` made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Names inside the folder of one run."""

    path: Path

    @property
    def store(self) -> Path:
        """The embedded store's folder."""
        return self.path / "redis"

    @property
    def status_file(self) -> Path:
        """Replaced atomically while the run goes on."""
        return self.path / "status.yaml"

    @property
    def facts_file(self) -> Path:
        """See `read_facts`."""
        return self.path / "run.json"

    @property
    def trace_file(self) -> Path:
        """One JSON line per job event."""
        return self.path / "trace.jsonl"

    @property
    def uid_file(self) -> Path:
        """The run's uid, one line."""
        return self.path / "uid"

    def read_uid(self) -> str | None:
        """The uid drawn at the first start; None before it."""
        try:
            return self.uid_file.read_text().strip() or None
        except FileNotFoundError:
            return None

    def draw_uid(self) -> str:
        """The run's uid, drawn and written down at the first call.

        Raises: VolumeError if the folder cannot be written.
        """
        known = self.read_uid()
        if known is None:
            known = secrets.token_hex(8)
            write_atomically(self.uid_file, known + "\n")
        return known

    def read_facts(self) -> Mapping[str, Any]:
        """name, uid, root (of checkpoints), image folders, files; `imported`: a record only."""
        try:
            raw = json.loads(self.facts_file.read_text())
        except (OSError, ValueError):
            return {}
        return raw if isinstance(raw, dict) else {}

    def set_aside(self, now: float) -> Path | None:
        """Move the folder out of the way (`--fresh`); returns where it went."""
        if not self.path.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
        target = self.path.with_name(f"{self.path.name}.{stamp}")
        number = 1
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.path.name}.{stamp}-{number}")
        self.path.rename(target)
        return target


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file; a reader sees the old or the new one, never half.

    Raises: VolumeError if the disk is full or the folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        draft.replace(path)
    except OSError as error:
        raise volume_error(path, error) from error


def volume_error(path: Path, error: OSError) -> VolumeError:
    """An operating system's error in our words, with the path."""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    what = "no space left on the disk of" if full else "cannot write"
    return VolumeError(f"{what} {path}: {error.strerror or error}; nothing recorded is lost")


def is_run(name: str, state_dir: Path) -> bool:
    """Whether `find_run` finds one."""
    return _candidate(name, state_dir) is not None


def _candidate(name: str, state_dir: Path) -> RunFolder | None:
    folders = (RunFolder(path=path) for path in (state_dir / name, Path(name)))
    return next((folder for folder in folders if folder.read_uid() is not None), None)


def find_run(name: str, state_dir: Path) -> RunFolder:
    """The folder of a started run, by its name below the state folder or by its path.

    Raises: SpecError that lists the runs there are.
    """
    folder = _candidate(name, state_dir)
    if folder is not None:
        return folder
    known = sorted(item.parent.name for item in state_dir.glob("*/uid"))
    there = f"runs here: {', '.join(known)}" if known else f"no run was started in {state_dir}"
    raise SpecError([Fault("RUN", name, f"use a run's name or its folder; {there}")])


def parse_mounts(texts: Sequence[str]) -> dict[str, Path]:
    """`--mount CLAIM=/path` options. Raises: SpecError for a malformed or a double one."""
    mounts: dict[str, Path] = {}
    faults: list[Fault] = []
    for text in texts:
        claim, found, path = text.partition("=")
        if not (claim and found and path):
            faults.append(Fault("--mount", text, "use CLAIM=/path, such as --mount datasets=/data"))
        elif claim in mounts:
            faults.append(Fault("--mount", text, f"claim {claim} is mounted twice"))
        else:
            mounts[claim] = Path(path).expanduser().absolute()
    if faults:
        raise SpecError(faults)
    return mounts


def claim_folder(
    field: str, claim: str, mounts: Mapping[str, Path], manifest_dir: Path, *, path: str = ""
) -> Path:
    """The folder a claim stands for on this machine, and `path` below it.

    Raises: SpecError that says which `--mount` to type if it is not there, or if `path` leaves it.
    """
    root = mounts.get(claim, manifest_dir / claim)
    if not root.is_dir():
        if claim in mounts:
            raise SpecError([Fault("--mount", f"{claim}={root}", "no such folder; name another")])
        remedy = f"no folder {root}; add --mount {claim}=/path/to/the/folder"
        raise SpecError([Fault(field, claim, remedy)])
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise SpecError([Fault(field, path, "use a relative path that stays inside the claim")])
    folder = root / pure
    if not folder.is_dir():
        inside = sorted(item.name for item in root.iterdir() if item.is_dir())[:10]
        raise SpecError(
            [
                Fault(
                    field, path, f"no such folder in {root}; it holds {', '.join(inside) or 'none'}"
                )
            ]
        )
    return folder.resolve()

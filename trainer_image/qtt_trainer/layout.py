"""Where a run's files lie (20-trainer 5.2): names only, nothing is read or written here.

<root>/runs/<run_uid>/dataset.json                 from `prepare`
                     /c12/f3/                      a committed step
                     /c12/f3.part/<n>/             mid-epoch states of an unfinished step
                     /c12/.f3.a1.<nonce>/          being written
                     /c12/progress.json
                     /c12/attempts/f3.a1/          log and result of every attempt
                     /attempts/prepare.a0/         likewise for the other commands
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
STATE = "state.pt"
RESULT = "result.json"
LOG = "log.txt"
CLASSES = "classes.json"

_COMMITTED = re.compile(r"f([0-9]+)")
_PART = re.compile(r"f([0-9]+)\.part")


def run_folder(root: str, run_uid: str) -> Path:
    """The run's folder; every relative path of a job starts here."""
    return Path(root) / "runs" / run_uid


def safe_name(text: str) -> str:
    """A nonce as part of a file name: anything but letters, digits, `_` and `-` becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text) or "_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFolder:
    """The folder of one configuration, and the names inside it."""

    path: Path

    def committed(self, fidelity: int) -> Path:
        """The final name of a step."""
        return self.path / f"f{fidelity}"

    def parts(self, fidelity: int) -> Path:
        """The folder of a step's mid-epoch states."""
        return self.path / f"f{fidelity}.part"

    def staging(self, fidelity: int, attempt: int, nonce: str) -> Path:
        """Where an attempt writes before it commits."""
        return self.path / f".f{fidelity}.a{attempt}.{safe_name(nonce)}"

    def quarantine(self, fidelity: int, nonce: str) -> Path:
        """Where a folder that does not verify is moved to make room."""
        return self.path / f".f{fidelity}.bad.{safe_name(nonce)}"

    def stale_staging(self, fidelity: int, attempt: int) -> Iterator[Path]:
        """What lower attempts of a step left behind while writing."""
        pattern = re.compile(rf"\.f{fidelity}\.(?:part\.)?a([0-9]+)\..*")
        for entry in self._entries():
            match = pattern.fullmatch(entry.name)
            if match and int(match[1]) < attempt:
                yield entry

    def all_committed(self) -> Iterator[tuple[int, Path]]:
        """(fidelity, folder) of every folder with a final name, verified or not."""
        for entry in self._entries():
            if match := _COMMITTED.fullmatch(entry.name):
                yield int(match[1]), entry

    def all_parts(self) -> Iterator[tuple[int, int, Path]]:
        """(fidelity of the step, number, folder) of every mid-epoch state."""
        for entry in self._entries():
            if match := _PART.fullmatch(entry.name):
                for part in entry.iterdir():
                    if part.name.isdecimal():
                        yield int(match[1]), int(part.name), part

    def _entries(self) -> Iterator[Path]:
        return iter(sorted(self.path.iterdir())) if self.path.is_dir() else iter(())


def config_folder(run: Path, config_id: int) -> ConfigFolder:
    """The folder of configuration `config_id` in a run."""
    return ConfigFolder(path=run / f"c{config_id}")


def attempt_folder(
    run: Path, command: str, *, config_id: int, fidelity_to: int, attempt: int
) -> Path:
    """Where an attempt leaves its log and its result."""
    if command == "step":
        return run / f"c{config_id}" / "attempts" / f"f{fidelity_to}.a{attempt}"
    return run / "attempts" / f"{command}.a{attempt}"

"""`qtt metatrain SOURCE…`: runs and files in, a prior that a manifest may name out.

Reads the ledgers of runs itself; everything else, torch among it, happens in a child process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtt_core.catalogue import CARD, is_name
from qtt_core.errors import Fault, SpecError
from qtt_operator.cli import Outcome
from qtt_operator.record import find_ledger
from qtt_operator.run_folder import PRIORS, write_atomically

COMMAND = (sys.executable, "-m", "qtt_core.learning")
BAR = 30
"""Characters of the progress bar."""


def metatrain_verb(arguments: argparse.Namespace) -> Outcome:
    """Learn a prior and say how good it is. Raises: SpecError; StoreError."""
    if not is_name(arguments.name):
        raise SpecError([Fault("--name", arguments.name, "use letters, digits, - _ and .")])
    folder = arguments.to or arguments.state_dir / PRIORS / arguments.name
    if (folder / CARD).exists() and not arguments.replace:
        remedy = "is there; choose another --name, or --replace it (no run that uses it goes on)"
        raise SpecError([Fault("--name", str(folder), remedy)])
    with tempfile.TemporaryDirectory(prefix="qtt-ledgers-") as scratch:
        sources = [_source(s, arguments, Path(scratch)) for s in arguments.sources]
        command = [
            *COMMAND, *map(str, sources), "--name", arguments.name, "--to", str(folder),
            "--seed", str(arguments.seed),
        ]  # fmt: skip
        report, words, code = _child(command, _bar if sys.stderr.isatty() else _line)
    if code != 0:
        raise SpecError([Fault("SOURCE", " ".join(arguments.sources), words.strip())])
    use = f"use it: spec.search.portfolio: {arguments.name}\n"
    return Outcome(text=f"{report}\n{folder}\n{use}")


def _source(text: str, arguments: argparse.Namespace, scratch: Path) -> Path:
    """A file or folder as it is, a run's ledger as a file."""
    path = Path(text)
    if path.exists() and not (path / "uid").exists():
        return path
    ledger = asyncio.run(find_ledger(text, arguments.state_dir, arguments.redis_url))
    found = scratch / f"{len(list(scratch.iterdir())):04d}.jsonl"
    write_atomically(found, "\n".join(ledger.lines()) + "\n")
    return found


def _child(command: list[str], show: Callable[[str, float], None]) -> tuple[str, str, int]:
    """(report, words on standard error, exit code)."""
    report = ""
    with tempfile.TemporaryFile("w+") as words:
        with subprocess.Popen(  # noqa: S603  # our own module, no shell
            command, stdout=subprocess.PIPE, stderr=words, text=True
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                told: dict[str, Any] = json.loads(line)
                if "report" in told:
                    report = str(told["report"])
                else:
                    show(str(told["doing"]), float(told["share"]))
        words.seek(0)
        return report, words.read(), child.returncode


def _bar(doing: str, share: float) -> None:
    done = round(BAR * share)
    end = "\n" if share >= 1 else ""
    sys.stderr.write(f"\r[{'#' * done}{'.' * (BAR - done)}] {100 * share:3.0f} % {doing:40}{end}")
    sys.stderr.flush()


def _line(doing: str, share: float) -> None:
    sys.stderr.write(f"{100 * share:3.0f} % {doing}\n")

"""`qtt weights fetch`: fills a folder with a hub's weights, by a child of the trainer package.

The child says what it does on stderr and what became of each model on stdout; this is the table
made of it, and the exit code that its answer means.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from typing import Any

from qtt_core.errors import Fault, SpecError
from qtt_core.results import EXIT_BAD_JOB, EXIT_BUG, EXIT_RETRY, State
from qtt_operator.cli import Outcome
from qtt_operator.exits import BUG, COMPLETE, DATA, INTERRUPTED, IO_ERROR, UNAVAILABLE, USAGE
from qtt_operator.output import Column, render, render_one

COMMAND = (sys.executable, "-m", "qtt_trainer", "weights")

_CODES = {
    State.WEIGHTS_UNAVAILABLE.value: UNAVAILABLE,
    State.WEIGHTS_CORRUPT.value: DATA,
    State.DISK_FULL.value: IO_ERROR,
    State.INFRA_STORAGE.value: IO_ERROR,
}
"""Why a retry may help -> what the verb ends with."""

COLUMNS = (
    Column(title="model", cell=lambda m: m["name"]),
    Column(title="", cell=lambda m: m["state"]),
    Column(title="MB", cell=lambda m: f"{m['bytes'] / 1e6:.1f}" if m["bytes"] else "", right=True),
    Column(title="licence", cell=lambda m: m["licence"]),
)


def fetch(arguments: argparse.Namespace) -> Outcome:
    """Raises: SpecError without the trainer's packages; KeyboardInterrupt."""
    if importlib.util.find_spec("huggingface_hub") is None:
        remedy = "is not installed: pip install 'quicktune-operator[trainer]'"
        raise SpecError([Fault("qtt weights fetch", "huggingface_hub", remedy)])
    child = subprocess.run([*COMMAND, *_options(arguments)], stdout=subprocess.PIPE, check=False)  # noqa: S603
    try:
        answer: dict[str, Any] = json.loads(child.stdout)
    except ValueError:  # it was ended before its answer, or broke
        return Outcome(code=INTERRUPTED if child.returncode in {EXIT_RETRY, -2, -15} else BUG)
    if answer["reason"]:
        print(f"qtt: {answer['reason']}", file=sys.stderr)  # noqa: T201  # beside the table
    return Outcome(text=_text(answer, arguments.output), code=_code(answer, child.returncode))


def _options(arguments: argparse.Namespace) -> list[str]:
    words = ["--hub", arguments.hub, "--to", str(arguments.to)]
    for model in arguments.model:
        words += ["--model", model]
    for name, value in (("--endpoint", arguments.endpoint), ("--token-file", arguments.token_file)):
        words += [name, str(value)] if value else []
    return [*words, *(["--verify"] if arguments.verify else [])]


def _text(answer: dict[str, Any], form: str) -> str:
    if form in {"json", "yaml"}:
        return render_one(answer, form)
    empty = "nothing to fetch: the weights of this hub ship with the trainer"
    if not answer["models"] and answer["reason"]:
        return ""
    return render(answer["models"], form, COLUMNS, empty=empty)


def _code(answer: dict[str, Any], code: int) -> int:
    if code in {COMPLETE, EXIT_BAD_JOB}:
        return USAGE if code else COMPLETE
    return BUG if code == EXIT_BUG else _CODES.get(answer["state"], INTERRUPTED)

"""The trainer's two pages say what the code does: exit codes, keys, hyperparameters, tests."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from qtt_core.axes import TABLES
from qtt_core.jobs import JobDocument, Limits, Paths, Task
from qtt_core.results import EXIT_CODES, MESSAGE_BYTES, State, StepResult
from qtt_core.steps import METRICS, Metric

NOT_OF_A_TRAINER = {State.WEIGHTS_UNAVAILABLE, State.WEIGHTS_CORRUPT}
"""Ours alone: another trainer's weights are its own matter."""


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "own-trainer.md").read_text()


def rows(page: str, head: str, number: int = 0) -> list[list[str]]:
    """The cells of the table that begins with this head, the first or a later one of such."""
    table = page.split(head)[1 + number].split("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


HEAD = "| Key | Meaning |"


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_state_stands_beside_its_exit_code(page: str) -> None:
    said = {
        State(state): int(code.split()[0])
        for code, states, _ in rows(page, "| Exit code | `state` | What follows |")
        for state in quoted(states)
    }

    assert said == {s: code for s, code in EXIT_CODES.items() if s not in NOT_OF_A_TRAINER}


def test_every_key_of_the_job_exists(page: str) -> None:
    known = {field.name for field in fields(JobDocument)}
    for prefix, inner in (("task", Task), ("paths", Paths), ("limits", Limits)):
        known |= {f"{prefix}.{field.name}" for field in fields(inner)}

    named = [key for first, _ in rows(page, HEAD, 0) for key in quoted(first)]

    assert set(named) <= known
    assert len(named) >= 15


def test_the_answer_of_the_page_is_read_as_it_is_meant(page: str) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)

    told = StepResult.parse(block, nonce=json.loads(block)["nonce"], attempt=0)

    assert f"{MESSAGE_BYTES:,}" in page
    told.check_epochs(metric=METRICS["top1"], fidelity_from=2, fidelity_to=4)
    told.check_epochs(metric=Metric(name="mine"), fidelity_from=2, fidelity_to=4)
    assert (told.checkpoint_bytes, bool(told.checkpoint_sha256)) == (91_000_000, True)


def test_every_key_of_the_answer_is_read(page: str) -> None:
    named = {key for first, _ in rows(page, HEAD, 1) for key in quoted(first)}
    told = {
        "v": 1, "attempt": 2, "nonce": "n", "state": "diverged", "epochs": [[1, 0.5, 2.0]],
        "ckpt": "c", "bytes": 7, "cached": True, "prepared": {"n_train": 3},
    }  # fmt: skip

    got = StepResult.parse(json.dumps(told), nonce="n", attempt=2)

    assert named == told.keys()
    read = {
        "v": 1, "attempt": got.attempt, "nonce": got.nonce, "state": got.state.value,
        "epochs": [[e.epoch, e.value, e.seconds] for e in got.epochs],
        "ckpt": got.checkpoint_sha256, "bytes": got.checkpoint_bytes,
        "cached": got.cached, "prepared": got.prepared,
    }  # fmt: skip
    assert read == told


# --- docs/trainer.md ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strategies(root: Path) -> str:
    return (root / "docs" / "trainer.md").read_text()


def test_every_test_that_the_page_names_exists(strategies: str, root: Path) -> None:
    written = "".join(path.read_text() for path in (root / "tests" / "trainer").glob("test_*.py"))

    named = set(re.findall(r"`(test_\w+)`", strategies))

    assert {name for name in named if f"def {name}(" not in written} == set()
    assert len(named) > 30


def test_every_hyperparameter_of_the_spaces_has_a_row(strategies: str) -> None:
    first = " ".join(line.split("|")[1] for line in strategies.splitlines() if "|" in line)
    named = {word for text in quoted(first) for word in re.findall(r"\w+", text)}

    searched = {name for table in TABLES.values() for name in table.names}

    assert searched - named == {"model", "lr"}, "what a model and a rate are needs no row"

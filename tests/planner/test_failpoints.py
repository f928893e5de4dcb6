"""A process that dies between any two writes of `qtt run` is followed by one that goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtt_operator.failpoints import EXIT_CODE, NAMES, VARIABLE, armed
from tests.planner.test_local_run import Runner

POINTS = (
    "noted", "opened", "created", "noted", "asked", "opened", "created", "ended",
    "committed", "forgotten", "told", "status", "committed:2", "noted",
)  # fmt: skip
"""In the order in which one run can meet them; each is a process of its own."""


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", ("", 0)), ("committed", ("committed", 1)), ("told:3", ("told", 3))],
)
def test_the_variable_names_a_place_and_a_count(value: str, expected: tuple[str, int]) -> None:
    assert armed({VARIABLE: value}) == expected


def test_a_place_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="comitted: use one of elected, asked, opened"):
        armed({VARIABLE: "comitted"})


def test_every_place_stands_in_the_code(root: Path) -> None:
    code = "\n".join(p.read_text() for p in (root / "operator" / "qtt_operator").glob("*.py"))
    places = set(re.findall(r'"(\w+)"', "\n".join(re.findall(r"reached\((.*)\)", code))))

    assert places == set(NAMES)


@pytest.fixture
def runners(tmp_path: Path) -> Iterator[tuple[Runner, Runner]]:
    """One that is left alone, one that dies."""
    made = Runner(tmp_path / "calm"), Runner(tmp_path / "dying")
    yield made
    for runner in made:
        runner.close()


@pytest.mark.slow
def test_a_run_that_dies_at_each_place_in_turn_ends_as_if_it_had_not(
    runners: tuple[Runner, Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, dying = runners
    assert calm.run()[0] == 0

    for place in POINTS:
        monkeypatch.setenv(VARIABLE, place)
        code, _, err = dying.run()
        assert code == EXIT_CODE, f"{place}: {err}"
    monkeypatch.delenv(VARIABLE)
    code, _, err = dying.run()

    assert code == 0, err
    assert dying.sequence() == calm.sequence()
    assert len(dying.trained()) == len(set(dying.trained()))

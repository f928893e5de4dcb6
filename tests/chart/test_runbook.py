"""docs/operations.md explains every reason that the code gives, and every alert."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from qtt_operator.names import COMPLETE_REASONS, FAILED_REASONS

WORD = re.compile(r"[A-Z][A-Za-z]+")


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "operations.md").read_text()


def explained(page: str) -> set[str]:
    """The reasons that have a row in the chapter on conditions."""
    chapter = page.partition("## Conditions")[2].partition("## Alerts")[0]
    return set(re.findall(r"^\| `(\w+)` \|", chapter, re.MULTILINE))


def words(node: ast.AST) -> Iterator[str]:
    """Constants that a value may be: of an expression, both arms of a choice."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if WORD.fullmatch(node.value):
            yield node.value
    elif isinstance(node, ast.IfExp):
        yield from words(node.body)
        yield from words(node.orelse)


def of_conditions(tree: ast.AST) -> Iterator[str]:
    """The ways to give a reason: `Truth(reason=…)`, `_held(key, type, …)`, `reason = …`.

    And `wanted.append((type, status, reason, message))`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "reason":
            yield from words(node.value)
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name == "Truth":
            yield from (w for k in node.keywords if k.arg == "reason" for w in words(k.value))
        elif name == "_held" and len(node.args) > 2:
            yield from words(node.args[2])
        elif name == "append" and isinstance(node.args[0], ast.Tuple):
            yield from (w for element in node.args[0].elts[2:3] for w in words(element))


def of_answers(tree: ast.AST) -> Iterator[str]:
    """`return reason, message`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            yield from words(node.value.elts[0])


def given(root: Path) -> set[str]:
    """Every reason of a condition that some code gives."""
    found = {*COMPLETE_REASONS, *FAILED_REASONS}
    for path in (root / "operator" / "qtt_operator").glob("*.py"):
        tree = ast.parse(path.read_text())
        if path.stem in {"status", "cluster_status", "status_writer", "reconcile"}:
            found |= set(of_conditions(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "waiting_reason":
                found |= set(of_answers(node))
    return found | set(of_answers(ast.parse((root / "qtt_core" / "limits.py").read_text())))


def test_every_reason_is_explained_and_no_other(root: Path, page: str) -> None:
    assert explained(page) == given(root)


def test_the_search_for_reasons_finds_the_different_ways_to_give_one(root: Path) -> None:
    """One of each place, so that a change of the code's shape is noticed."""
    assert given(root) >= {
        "Valid", "Invalid", "Unreachable", "Connected", "Draining", "Unschedulable", "ImagePull",
        "DatasetChanged", "BudgetExhausted", "WaitingForQuota", "PodRejected",
    }  # fmt: skip


def test_every_alert_has_its_chapter_and_no_chapter_is_left_over(page: str, chart: Path) -> None:
    rules = yaml.safe_load((chart / "files" / "alerts.yaml").read_text())
    names = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    chapter = page.partition("## Alerts")[2].partition("\n## ")[0]

    assert re.findall(r"^### (\w+)$", chapter, re.MULTILINE) == names

"""docs/operations.md explains every reason that the code gives, and every alert."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from qtt_operator.names import REASONS


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "operations.md").read_text()


def explained(page: str) -> set[str]:
    """The reasons that have a row in the chapter on conditions."""
    chapter = page.partition("## Conditions")[2].partition("## Alerts")[0]
    return set(re.findall(r"^\| `(\w+)` \|", chapter, re.MULTILINE))


def test_every_reason_is_explained_and_no_other(page: str) -> None:
    """`names.REASONS` is what the code may give: tests/cluster/test_conditions.py."""
    assert explained(page) == {reason for reasons in REASONS.values() for reason in reasons}


def test_every_alert_has_its_chapter_and_no_chapter_is_left_over(page: str, chart: Path) -> None:
    rules = yaml.safe_load((chart / "files" / "alerts.yaml").read_text())
    names = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    chapter = page.partition("## Alerts")[2].partition("\n## ")[0]

    assert re.findall(r"^### (\w+)$", chapter, re.MULTILINE) == names

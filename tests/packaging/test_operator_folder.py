"""`operator/` and `trainer_image/` are project folders: a package `operator` breaks Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

PROJECT_FOLDERS = ("operator", "trainer_image", "crds", "helm")
SHADOWING = "import collections, operator; assert not hasattr(operator, '__path__')"


def loose_modules(tree: Path) -> list[str]:
    """Python files that lie directly in a project folder."""
    return [
        str(path) for folder in PROJECT_FOLDERS for path in sorted((tree / folder).glob("*.py"))
    ]


def ruff_codes(tree: Path, run, tool) -> set[str]:
    """Rules that ruff finds broken in a tree."""
    command = [tool("ruff"), "check", "--no-cache", "--output-format", "json", "."]
    return {fault["code"] for fault in json.loads(run(command, tree).stdout)}


def test_no_module_lies_directly_in_a_project_folder(root):
    assert loose_modules(root) == []


def test_ruff_knows_the_operator_folder_as_clean(root, run, tool):
    assert ruff_codes(root, run, tool) & {"A005", "INP001"} == set()


def test_ruff_fires_on_a_package_called_operator(copy, run, tool):
    (copy / "operator" / "__init__.py").write_text('"""A trap."""\n')

    assert "A005" in ruff_codes(copy, run, tool)


def test_ruff_and_the_guard_fire_on_a_loose_module(copy, run, tool):
    (copy / "operator" / "loose.py").write_text('"""A trap."""\n')

    assert "INP001" in ruff_codes(copy, run, tool)
    assert loose_modules(copy) == [str(copy / "operator" / "loose.py")]


def test_the_standard_operator_wins_from_the_root(root, run):
    """`-S`: a `.pth` that imports something at start-up would hide the fault on that machine."""
    ended = run([sys.executable, "-S", "-c", SHADOWING], root)

    assert ended.returncode == 0, ended.stderr


def test_the_shadowing_guard_fires_on_a_package_called_operator(copy, run):
    (copy / "operator" / "__init__.py").write_text("")

    ended = run([sys.executable, "-S", "-c", SHADOWING], copy)

    assert ended.returncode != 0


@pytest.mark.parametrize("name", ["qtt_core", "qtt_operator", "quicktune", "qtt_trainer"])
def test_each_package_is_typed_and_documented(root, name):
    folder = next(
        p / name for p in (root, root / "operator", root / "trainer_image") if (p / name).is_dir()
    )

    assert (folder / "py.typed").is_file()
    assert (folder / "__init__.py").read_text().startswith('"""')

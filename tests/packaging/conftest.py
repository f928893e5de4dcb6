"""Copies of the tree in which a rule can be broken on purpose, to see its guard fire."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

FOLDERS = ("operator", "trainer_image")


@pytest.fixture
def copy(tmp_path: Path, root: Path) -> Path:
    """The packages and pyproject.toml, without caches: a tree that a test may spoil."""
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("qtt_core", *FOLDERS):
        shutil.copytree(root / name, tmp_path / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a folder, that folder's packages first on the path."""

    def call(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        places = [str(cwd), *(str(cwd / folder) for folder in FOLDERS)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, check=False
        )

    return call


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Path of a console script of the environment that runs the tests."""

    def find(name: str) -> str:
        path = Path(sys.executable).with_name(name)
        if not path.exists():
            pytest.fail(f"{name} is not beside {sys.executable}; run `make venv`")
        return str(path)

    return find

"""The wheel is what users get: it holds all that the checkout has, and works without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = {
    "qtt_core": "qtt_core",
    "qtt_operator": "operator/qtt_operator",
    "quicktune": "operator/quicktune",
    "qtt_trainer": "trainer_image/qtt_trainer",
}

IMPORT_ALL = """
import importlib, json, pathlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")          # those of other libraries, at import
place = {}
for name in json.loads(sys.argv[1]):
    package = importlib.import_module(name)
    place[name] = package.__file__
    for found in pkgutil.walk_packages(package.__path__, name + "."):
        if not found.name.endswith(".__main__"):
            place[found.name] = importlib.import_module(found.name).__file__
print(json.dumps(place))
"""


def files_of(root: Path) -> set[str]:
    """Every file of the four packages under its name in the wheel, as the checkout has it."""
    return {
        f"{package}/{path.relative_to(root / folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    """The distribution, built without a network by the backend that pyproject.toml names."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-P", "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel in it and nothing else."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--target", str(target), str(wheel),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return target


def in_wheel(installed: Path, elsewhere: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the wheel, from a folder that is not the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-P", *command],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_every_file_of_the_packages(root, wheel):
    """Data, scripts, weights and py.typed too; a git-ignored file would be dropped."""
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert held == files_of(root)
    kinds = {Path(name).suffix for name in held} | {Path(name).name for name in held}
    assert {".py", ".lua", ".json", ".safetensors", "py.typed"} <= kinds


def test_the_wheel_carries_licence_scripts_and_optimizers(wheel):
    archive = zipfile.ZipFile(wheel)
    info = {name.rpartition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    scripts = archive.read(info["entry_points.txt"]).decode()

    assert "LICENSE" in info
    assert re.findall(r"^(\S+) = ", scripts, re.MULTILINE) == [
        "kubectl-qtt",
        "qtt",
        "qtt-train-step",
        "optuna-gp",
        "optuna-tpe",
    ]


def test_every_module_of_the_wheel_imports_from_the_wheel(installed, tmp_path):
    """`-P` and another folder: nothing may come from the checkout."""
    ended = in_wheel(installed, tmp_path, "-c", IMPORT_ALL, json.dumps(list(PACKAGES)))

    assert ended.returncode == 0, ended.stderr
    places = json.loads(ended.stdout.splitlines()[-1])
    assert [place for place in places.values() if not place.startswith(str(installed))] == []
    assert len(places) == len({name for name in files_of_modules(installed)})


def files_of_modules(installed: Path) -> list[Path]:
    """Importable modules of the wheel, `__main__` left out."""
    folders = (installed / package for package in PACKAGES)
    return [
        path for folder in folders for path in folder.rglob("*.py") if path.name != "__main__.py"
    ]


@pytest.mark.parametrize("module", ["qtt_operator", "qtt_trainer"])
def test_the_command_lines_of_the_wheel_answer(module, installed, tmp_path):
    ended = in_wheel(installed, tmp_path, "-m", module, "--help")

    assert ended.returncode == 0, ended.stderr
    assert "usage" in ended.stdout.lower()


def test_tests_of_the_core_pass_on_the_wheel(root, installed, tmp_path):
    """`-o pythonpath=`: otherwise pytest itself would put the checkout first."""
    command = [
        "-m",
        "pytest",
        "-q",
        "-o",
        "pythonpath=",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(root),
    ]
    where = [
        str(root / "tests" / "core"),
        "-k",
        "hub or manifest or spec",
        "-c",
        str(root / "pyproject.toml"),
    ]

    ended = in_wheel(installed, tmp_path, *command, *where)

    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    assert re.search(r"[1-9][0-9]* passed", ended.stdout)

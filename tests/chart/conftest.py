"""Helm, promtool and kubeconform where the machine has them; the chart, rendered in many ways."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from value_sets import VALUES, Object

Render = Callable[..., list[Object]]

HOW = {
    "helm": "make testbed builds it, or put Helm 3 or 4 on PATH",
    "kubeconform": "make testbed builds it, or put it on PATH",
    "promtool": "make check-chart fetches it from Debian, or put it on PATH",
    "prometheus": "make check-chart fetches it from Debian, or put it on PATH",
}


def tool(name: str) -> str:
    """A program of PATH or of the test cluster's folder; the test is skipped without one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "testbed"
    kept = sorted(cache.glob(f"*/bin/{name}"), key=lambda path: path.stat().st_mtime)
    found = shutil.which(name) or (str(kept[-1]) if kept else None)
    if found is None:
        pytest.skip(f"no {name} on this machine: {HOW[name]}")
    return found


@pytest.fixture(scope="session")
def chart(root: Path) -> Path:
    return root / "helm" / "quicktune-operator"


@pytest.fixture(scope="session")
def helm() -> str:
    return tool("helm")


@pytest.fixture(scope="session")
def kubeconform() -> str:
    return tool("kubeconform")


@pytest.fixture(scope="session")
def promtool() -> str:
    return tool("promtool")


@pytest.fixture(scope="session")
def helm_template(helm: str, chart: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`helm_template(values)`: what the program answered, whether it rendered or refused."""

    def call(values: Object, *words: str) -> subprocess.CompletedProcess[str]:
        command = [helm, "template", "quicktune-operator", str(chart), "--kube-version", "1.29.0"]
        return subprocess.run(
            [*command, "--namespace", "quicktune-system", *words, "--values", "-"],
            input=yaml.safe_dump(values), capture_output=True, text=True, check=False,
        )  # fmt: skip

    return call


@pytest.fixture(scope="session")
def render(helm_template: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    """`render(values)`: the objects, each name of a value set rendered once a session."""
    known: dict[str, list[Object]] = {}

    def call(values: Object | str) -> list[Object]:
        if isinstance(values, str) and values in known:
            return known[values]
        given = VALUES[values] if isinstance(values, str) else values
        done = helm_template(given, "--api-versions", "monitoring.coreos.com/v1")
        assert done.returncode == 0, done.stderr
        found = [item for item in yaml.safe_load_all(done.stdout) if item]
        if isinstance(values, str):
            known[values] = found
        return found

    return call


@pytest.fixture(scope="session")
def prometheus() -> str:
    return tool("prometheus")

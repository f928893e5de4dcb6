"""A namespace for each test on a real cluster, the images, the digits, the operator.

`make testbed` runs these tests inside a cluster that it boots; `make cluster` gives a shell in
one, where `pytest tests/e2e -m testbed -k NAME` runs a part of them again and again.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from manifests import claim, data_claim, namespace
from real_cluster import Kube, RefusedError, Testbed, command, connect
from tuning_runs import Run, simulated

MakeNamespace = Callable[..., Kube]
Simulate = Callable[..., Run]
SYSTEM = "quicktune-system"


@pytest.fixture(scope="session")
def testbed() -> Testbed:
    """The cluster this process runs in."""
    if "TESTBED_DIR" not in os.environ:
        pytest.fail("these tests run inside the test cluster: make testbed", pytrace=False)
    return connect()


@pytest.fixture(scope="session")
def _numbers() -> Iterator[int]:
    return count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the namespaces of a failed test look like to its report."""
    report = yield
    if report.when == "call" and report.failed:
        for kube in item.stash.get(NAMESPACES, []):
            report.sections.append((f"namespace {kube.namespace}", picture(kube)))
    return report


NAMESPACES: pytest.StashKey[list[Kube]] = pytest.StashKey()


def picture(kube: Kube) -> str:
    """What a person would look at first: objects, events, the last lines of each container."""
    words = ["get", "tuningruns,jobs,pods,pvc", "-o", "wide", "--ignore-not-found"]
    parts = []
    for asked in (
        words,
        ["events", "--types=Warning"],
        ["logs", "--all-containers", "--tail=15"],
    ):
        try:
            if asked[0] == "logs":
                pods = [pod["metadata"]["name"] for pod in kube.items("pod")]
                parts += [f"--- {pod}\n{kube.kubectl(*asked, pod)}" for pod in pods[:10]]
            else:
                parts.append(kube.kubectl(*asked))
        except (RefusedError, OSError) as error:
            parts.append(str(error))
    return "\n".join(parts)


@contextmanager
def one_at_a_time(testbed: Testbed) -> Iterator[None]:
    """Tests run side by side; what they share is made by one of them."""
    with (testbed.folder / "shared.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def make_namespace(
    request: pytest.FixtureRequest, testbed: Testbed, _numbers: Iterator[int]
) -> Iterator[MakeNamespace]:
    """`make_namespace(enforce="restricted")` -> Kube; deleted after the test, not waited for."""
    stem = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:40]
    made: list[Kube] = []

    def make(*, enforce: str = "privileged") -> Kube:
        kube = Kube(namespace=f"{stem.strip('-')}-{os.getpid()}-{next(_numbers)}", api=testbed.api)
        Kube(namespace="default", api=testbed.api).create(namespace(kube.namespace, enforce))
        made.append(kube)
        request.node.stash.setdefault(NAMESPACES, []).append(kube)
        return kube

    yield make
    for kube in made:
        kube.kubectl("delete", "namespace", kube.namespace, "--wait=false")


@pytest.fixture
def kube(make_namespace: MakeNamespace) -> Kube:
    """A namespace of the test's own that allows every pod."""
    return make_namespace()


@pytest.fixture
def restricted(make_namespace: MakeNamespace) -> Kube:
    """A namespace of the test's own under the `restricted` Pod Security Standard."""
    return make_namespace(enforce="restricted")


@pytest.fixture
def operator(testbed: Testbed, root: Path, request: pytest.FixtureRequest) -> Kube:
    """The namespace of the installed operator, whose pod and Redis are ready; shared by all tests.

    Its log is part of the report of a test that fails.
    """
    system = Kube(namespace=SYSTEM, api=testbed.api)
    with one_at_a_time(testbed):
        install = ("apply", "--server-side", "--force-conflicts", "-f", "-")
        system.kubectl(*install, stdin=command(str(root / "tests/testbed/operator.sh")))
    for workload in ("statefulset/redis", "deployment/quicktune-operator"):
        system.kubectl("rollout", "status", workload, "--timeout=120s")
    request.node.stash.setdefault(NAMESPACES, []).append(system)
    return system


@pytest.fixture
def simulate(operator: Kube) -> Simulate:
    """`simulate(kube, seconds=3, parallelism=2)` starts a run whose steps sleep so long.

    `modes`: of its claim of data, which else keeps all pods on one node.
    """

    def start(
        kube: Kube,
        name: str = "sim",
        *,
        system: Kube = operator,
        modes: Sequence[str] = ("ReadWriteOnce",),
        **fields: Any,
    ) -> Run:
        kube.create(claim("data", "1Gi", modes=modes), simulated(name, **fields))
        return Run(kube=kube, system=system, name=name)

    return start


@pytest.fixture(scope="session")
def digits_folder(testbed: Testbed, root: Path) -> Path:
    """The digits as `examples/digits/prepare.py` writes them, on the node's disk."""
    folder = testbed.folder / "data" / "digits"
    with one_at_a_time(testbed):
        if not folder.exists():
            script = root / "examples" / "digits" / "prepare.py"
            words = [sys.executable, script, "--to", folder]
            subprocess.run(words, check=True, capture_output=True)
    return folder


@pytest.fixture
def digits(digits_folder: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[Kube], str]]:
    """`digits(kube)` makes the claim `digits`, already bound and filled, and returns its name."""
    made: list[tuple[Kube, str]] = []

    def claim(kube: Kube) -> str:
        volume, request_for = data_claim("digits", kube.namespace, digits_folder)
        kube.create(volume, request_for)
        made.append((kube, volume["metadata"]["name"]))
        return "digits"

    yield claim
    for kube, volume in made:
        kube.kubectl("delete", "persistentvolume", volume, "--wait=false")

"""The suites of core and trainer pass in the images, on the torch that the images have."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from manifests import OPERATOR, TRAINER, TRAINER_USER, UNPRIVILEGED, data_claim, mounted, pod
from real_cluster import Kube, Testbed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "testbed"))

from images import tools_folder

pytestmark = [pytest.mark.testbed, pytest.mark.alone]

SUITES = {"operator": (OPERATOR, "tests/core"), "trainer": (TRAINER, "tests/trainer")}
SHOWN = (
    "crds", "docs", "examples", "tests", "benchmarks/make_tiny_hub.py", "pyproject.toml",
    "README.md",
)  # fmt: skip
COMMAND = (
    "python", "-P", "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal",
    "-p", "no:cacheprovider", "-o", "pythonpath=",
)  # fmt: skip
TORCH = "import torch; print('torch', torch.__version__)"


@pytest.fixture
def suite(kube: Kube, testbed: Testbed, root: Path) -> Iterator[list[str]]:
    """Two claims: what of the checkout tests read, and pytest for the images' Python."""
    shown = testbed.folder / "data" / kube.namespace
    for name in SHOWN:
        source, place = root / name, shown / name
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)
    folders = {"checkout": shown, "tools": tools_folder()}
    volumes = []
    for name, folder in folders.items():
        volume, claim = data_claim(name, kube.namespace, folder)
        kube.create(volume, claim)
        volumes.append(volume["metadata"]["name"])
    yield list(folders)
    for volume in volumes:
        kube.kubectl("delete", "persistentvolume", volume, "--wait=false")
    shutil.rmtree(shown)


@pytest.mark.parametrize("part", SUITES)
def test_its_suite_passes_in_its_image(kube: Kube, suite: list[str], part: str) -> None:
    image, tests = SUITES[part]
    claims = {name: {"claimName": name, "readOnly": True} for name in suite}
    mounts = [mounted(n, f"/{n}", persistentVolumeClaim=c) for n, c in claims.items()]
    mounts += [mounted("tmp", "/tmp", emptyDir={}), mounted("shm", "/dev/shm", emptyDir={})]
    environment = {"PYTHONPATH": "/tools", "OMP_NUM_THREADS": "1", "HOME": "/tmp", "CI": "1"}
    # the shell stays process 1: it reaps the orphans that some tests make
    script = f'python -c "{TORCH}" && {" ".join(COMMAND)} {tests}; exit $?'
    container = {
        "image": image, "command": ["sh", "-c", script], "workingDir": "/checkout",
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "securityContext": UNPRIVILEGED, "volumeMounts": [mount for _, mount in mounts],
    }  # fmt: skip
    volumes = [volume for volume, _ in mounts]

    kube.create(pod(part, "", container=container, securityContext=TRAINER_USER, volumes=volumes))

    ended = kube.ended_pod(part, seconds=1200)
    log = kube.logs(part)
    assert ended["exitCode"] == 0, log[-8000:]
    assert log.startswith("torch 2.6.")
    assert " passed" in log

"""A cluster's runs teach its next one: two ledgers, one prior on the claim, a run that uses it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNamespace
from ledger_reader import of_kind
from manifests import BUSYBOX, claim
from operator_process import PASSWORD
from own_operator import own_operator
from real_cluster import Kube, until
from tuning_runs import Run, simulated

from qtt_core.catalogue import card_sha

# The operator for the whole cluster is taken away meanwhile: only an install of its own may mount
# a claim of priors without a change to what every other test runs on.
pytestmark = [pytest.mark.testbed, pytest.mark.chaos]

STEPS = 12  # six configurations, each trained to its last epoch by one Job
FIELDS: dict[str, Any] = {
    "fidelity": {"max": 2, "step": 1, "stepsPerJob": 2},
    "budget": {"maxSteps": STEPS},
    "parallelism": 3,
}


@pytest.fixture
def installed(
    operator: Kube, make_namespace: MakeNamespace, root: Path
) -> Iterator[tuple[Kube, Kube]]:
    """(a namespace for runs, the namespace of its operator, which mounts the claim `priors`)."""
    system, kube = make_namespace(enforce="restricted"), make_namespace(enforce="restricted")
    anywhere = ("ReadWriteMany",)
    kube.create(claim("data", "1Gi", modes=anywhere))
    system.create(claim("priors", "1Gi", modes=anywhere))
    with own_operator(operator, system, kube, root, "--set", "optimizer.priorsClaim=priors"):
        yield kube, system


def qtt(*words: object) -> str:
    """What the command line says; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "qtt_operator", *map(str, words)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(kube: Kube, system: Kube, name: str, data: str, **fields: Any) -> Run:
    """A run whose trainer says that it found the images `data`."""
    env = [{"name": "QTT_SLEEP", "value": "0"}, {"name": "QTT_DATA", "value": data}]
    kube.create(simulated(name, container={"env": env}, **{**FIELDS, **fields}))
    return Run(kube=kube, system=system, name=name)


def chosen(run: Run) -> list[str]:
    """The messages of its Events of the kind `PriorChosen`."""
    return [
        event["message"]
        for event in run.kube.items("event")
        if event["reason"] == "PriorChosen" and event["involvedObject"]["name"] == run.name
    ]


def test_a_run_begins_with_what_two_earlier_runs_of_the_cluster_taught(
    installed: tuple[Kube, Kube], tmp_path: Path
) -> None:
    kube, system = installed
    cold = {"space": "native", "hub": "tiny", "portfolio": "None"}
    earlier = [start(kube, system, name, name, search=cold) for name in ("roses", "tulips")]
    for run in earlier:
        run.complete()
    address = system.get("pod", "redis-0")["status"]["podIP"]
    url = f"redis://:{PASSWORD}@{address}:6379/0"

    for run in earlier:
        file = tmp_path / f"{run.name}.jsonl"
        qtt("ledger", "export", f"{kube.namespace}/{run.name}", file, "--redis-url", url,
            "--state-dir", tmp_path)  # fmt: skip
    prior = tmp_path / "prior"
    report = qtt("metatrain", tmp_path, "--name", "flowers", "--to", prior)
    qtt("data", "push", prior, "priors:flowers", "-n", system.namespace, "--image", BUSYBOX)
    third = start(
        kube, system, "lilies", "lilies", search={**cold, "portfolio": "flowers"},
        optimizer={"algorithm": "QuickTune", "seed": 0},
    )  # fmt: skip
    status = third.complete()

    assert "12 runs of 2 data sets" in report  # six configurations each
    assert status["prior"] == "own/flowers"
    (begun,) = of_kind(third.events(), "run")
    assert begun["prior"] == f"own/flowers@{card_sha(prior)}"
    (message,) = until("an Event says so", lambda: chosen(third))
    assert message == "prior flowers, of the folder of priors"
    assert third.faults(STEPS) == []
    assert [chosen(run) for run in earlier] == [[], []]

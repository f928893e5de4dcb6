"""Two nodes, one lost: its step is repeated on the other one and not held against it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Simulate
from ledger_reader import of_kind
from manifests import claim
from operator_process import Operators, operators
from real_cluster import Kube, Testbed, until
from tuning_runs import Run

pytestmark = pytest.mark.chaos

SPARE = "node-2"
SHARED = ["ReadWriteMany"]  # else the run would stay on the node of its volume
GONE = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
PREFERS_SPARE: dict[str, Any] = {
    "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{
        "weight": 100, "preference": {"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": [SPARE]}]}}]}},
    "tolerations": [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 2}
        for key in GONE
    ],
}  # fmt: skip


@pytest.fixture
def spare(testbed: Testbed) -> Iterator[None]:
    """The second node, which takes no pods of other tests."""
    nodes = Kube(namespace="default", api=testbed.api)
    if not any(node["metadata"]["name"] == SPARE for node in nodes.items("node")):
        pytest.fail("this cluster has one node: cluster.py --nodes 2", pytrace=False)
    nodes.kubectl("uncordon", SPARE)
    yield
    until(f"{SPARE} is back", lambda: nodes.condition("node", SPARE, "Ready"))
    nodes.kubectl("cordon", SPARE)


@pytest.fixture
def beside(operator: Kube, tmp_path: Path) -> Iterator[Operators]:
    """An operator that gives a node up after three seconds, not five minutes."""
    with operators(operator, tmp_path) as made:
        made.start()
        yield made


def started(restricted: Kube, simulate: Simulate) -> Run:
    """A run whose second step works on the spare node; no failure of it would be forgiven."""
    run = simulate(
        restricted, seconds=8, modes=SHARED, budget={"maxSteps": 3}, pod=PREFERS_SPARE,
        failurePolicy={"maxInfraRetriesPerStep": 0, "maxAppFailuresPerConfig": 0},
        checkpoint={"volumeClaimTemplate": claim("unused", "1Gi", modes=SHARED)["spec"]},
    )  # fmt: skip
    run.until_told(1)
    (pod,) = run.until_working(1)
    assert pod["spec"]["nodeName"] == SPARE
    return run


def retried_elsewhere(run: Run) -> None:
    """The lost attempt was charged and never told; the next one ended as if nothing had been."""
    status = run.complete()
    events = run.events()
    assert run.faults(3) == []
    assert [(e["reason"], e["a"]) for e in of_kind(events, "retry")] == [("NodeLost", "1")]
    assert of_kind(events, "fail", "cancel") == []
    assert [e["a"] for e in of_kind(events, "done")] == ["0", "1", "0"]
    assert status["configs"].get("failed", 0) == 0
    assert float(of_kind(events, "retry")[0]["dev"]) > 0
    (repeated,) = (job for job in run.jobs() if job["metadata"]["name"].endswith("-a1"))
    assert run.kube.pod_of(repeated["metadata"]["name"])["spec"]["nodeName"] != SPARE


def test_a_step_whose_node_falls_silent_is_repeated_on_another(
    restricted: Kube, simulate: Simulate, testbed: Testbed, beside: Operators, spare: None
) -> None:
    """The kubelet is dead and its container trains on: what that one writes comes too late."""
    run = started(restricted, simulate)

    with testbed.away(f"kubelet-{SPARE}"):
        retried_elsewhere(run)

    until("the silent node's pod is gone", lambda: not run.working(), seconds=90)
    assert run.faults(3) == []


@pytest.mark.slow
def test_a_step_whose_node_is_deleted_is_repeated_on_another(
    restricted: Kube, simulate: Simulate, testbed: Testbed, beside: Operators, spare: None
) -> None:
    """As an autoscaler does it: Kubernetes drops the pods of a node that is no more after 40 s.

    That is a disruption, which the Job's own policy does not count: it makes the pod anew, and
    nobody has to retry anything.
    """
    run = started(restricted, simulate)
    (lost,) = run.working()

    with testbed.away(f"kubelet-{SPARE}"):
        restricted.kubectl("delete", "node", SPARE)
        status = run.complete()

    events = run.events()
    assert run.faults(3) == []
    assert of_kind(events, "retry", "fail", "cancel") == []
    assert [e["a"] for e in of_kind(events, "done")] == ["0", "0", "0"]
    assert status["configs"].get("failed", 0) == 0
    job = lost["metadata"]["labels"]["batch.kubernetes.io/job-name"]
    repeated = run.kube.pod_of(job)
    assert repeated["metadata"]["name"] != lost["metadata"]["name"]
    assert repeated["spec"]["nodeName"] != SPARE

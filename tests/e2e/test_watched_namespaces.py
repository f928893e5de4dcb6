"""An operator for some namespaces: Roles there and nothing cluster-wide, deaf to all others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import SYSTEM, MakeNamespace, Simulate
from manifests import Object
from real_cluster import Kube, Testbed, command, until

pytestmark = pytest.mark.chaos  # the operator for the whole cluster is taken away meanwhile

ACCOUNT = "system:serviceaccount:{}:quicktune-operator"
DECISION = "authorization.k8s.io/decision"


def narrowed(script: Path, system: str, watched: str) -> list[Object]:
    """What is installed elsewhere, for one namespace."""
    words = ("--set", f"watchNamespaces={{{watched}}}", "--set", "crds.install=false")
    text = command(str(script), *words).replace(SYSTEM, system)
    return [item for item in yaml.safe_load_all(text) if item and item["kind"] != "Namespace"]


@pytest.fixture
def watched(
    operator: Kube, make_namespace: MakeNamespace, root: Path
) -> Iterator[tuple[Kube, Kube]]:
    """(a namespace that an operator of its own watches, that operator's namespace)."""
    system, kube = make_namespace(enforce="restricted"), make_namespace(enforce="restricted")
    operator.kubectl("scale", "deployment/quicktune-operator", "--replicas=0")
    operator.kubectl(
        "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/name=quicktune-operator"
    )
    script = root / "tests" / "testbed" / "operator.sh"
    for item in narrowed(script, system.namespace, kube.namespace):
        (kube if item["metadata"]["namespace"] == kube.namespace else system).create(item)
    for workload in ("statefulset/redis", "deployment/quicktune-operator"):
        system.kubectl("rollout", "status", workload, "--timeout=120s")
    yield kube, system
    operator.kubectl("scale", "deployment/quicktune-operator", "--replicas=1")


def test_rights_in_one_namespace_are_enough_for_its_runs_and_others_are_left_alone(
    watched: tuple[Kube, Kube], simulate: Simulate, restricted: Kube, testbed: Testbed
) -> None:
    kube, system = watched
    account = ACCOUNT.format(system.namespace)

    foreign = simulate(restricted, system=system, budget={"maxSteps": 1})
    run = simulate(kube, system=system, budget={"maxSteps": 2})

    run.complete()
    assert run.faults(2) == []
    assert foreign.status() == {}
    requests = [e for e in testbed.audit() if e["user"]["username"] == account]
    asked = {e["objectRef"].get("namespace", "") for e in requests if "objectRef" in e}
    assert asked <= {kube.namespace, system.namespace}
    refused = [e["requestURI"] for e in requests if e["annotations"][DECISION] != "allow"]
    assert refused == []
    until("no Job of it", lambda: not restricted.items("job"), seconds=1)

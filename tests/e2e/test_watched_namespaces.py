"""An operator for some namespaces: Roles there and nothing cluster-wide, deaf to all others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeNamespace, Simulate
from own_operator import own_operator
from real_cluster import Kube, Testbed, until

pytestmark = pytest.mark.chaos  # the operator for the whole cluster is taken away meanwhile

ACCOUNT = "system:serviceaccount:{}:quicktune-operator"
DECISION = "authorization.k8s.io/decision"


@pytest.fixture
def watched(
    operator: Kube, make_namespace: MakeNamespace, root: Path
) -> Iterator[tuple[Kube, Kube]]:
    """(a namespace that an operator of its own watches, that operator's namespace)."""
    system, kube = make_namespace(enforce="restricted"), make_namespace(enforce="restricted")
    with own_operator(operator, system, kube, root):
        yield kube, system


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

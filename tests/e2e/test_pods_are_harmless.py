"""What a trainer's pod can do to anybody: nothing. No right, token, password or privilege."""

from __future__ import annotations

import json

import pytest
from conftest import Simulate
from manifests import Object, job, pod_spec
from real_cluster import Kube, RefusedError, Testbed, until

pytestmark = pytest.mark.testbed

VIOLATIONS = "pod-security.kubernetes.io/audit-violations"
PASSWORD = "testbed-only"


@pytest.fixture
def audited(restricted: Kube) -> Kube:
    """A restricted namespace whose violations are in the audit log too, those of Jobs included."""
    labels = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("audit", "warn")]
    restricted.kubectl("label", "namespace", restricted.namespace, *labels)
    return restricted


def violations(testbed: Testbed, kube: Kube) -> dict[str, str]:
    """What the pod security standard has against Jobs and pods, by name; dry runs included."""
    requests = testbed.requests(kube.namespace, "jobs") + testbed.requests(kube.namespace, "pods")
    return {
        str(e["objectRef"].get("name")): e["annotations"][VIOLATIONS]
        for e in requests
        if VIOLATIONS in e.get("annotations", {})
    }


def test_a_whole_run_meets_the_restricted_standard_without_a_warning(
    audited: Kube, simulate: Simulate, testbed: Testbed
) -> None:
    audited.create(job("careless", pod_spec("true"), suspend=True))
    until("a careless Job is in the log", lambda: "careless" in violations(testbed, audited))

    run = simulate(audited, parallelism=2, budget={"maxSteps": 2})

    run.complete()
    assert set(violations(testbed, audited)) == {"careless"}
    created = [e for e in testbed.requests(audited.namespace, "jobs") if e["verb"] == "create"]
    assert len(created) >= 5  # ours: dry run, prepare, two steps


def test_a_trainer_has_no_token_no_password_and_no_word_of_services(
    restricted: Kube, simulate: Simulate, testbed: Testbed
) -> None:
    port: Object = {"ports": [{"port": 6379}], "selector": {"app": "redis"}}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "redis"}, "spec": port}
    restricted.create(service)
    run = simulate(restricted, seconds=20)
    (pod,) = run.until_working(1)
    name = pod["metadata"]["name"]

    environment = restricted.execute(name, "cat", "/proc/1/environ")
    mounts = restricted.execute(name, "cat", "/proc/mounts")

    assert "QTT_STEP=" in environment
    assert PASSWORD not in environment
    assert "REDIS" not in environment
    assert "serviceaccount" not in mounts
    assert PASSWORD not in json.dumps(pod)
    assert not any("projected" in volume for volume in pod["spec"]["volumes"])
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert restricted.execute(name, "id", "-u") == "10001\n"
    with pytest.raises(RefusedError, match="Read-only file system"):
        restricted.execute(name, "touch", "/opt/here")
    run.patch(stop=True)


def test_the_operators_own_account_may_do_no_more_than_it_says(operator: Kube) -> None:
    account = f"--as=system:serviceaccount:{operator.namespace}:quicktune-operator"

    def may(verb: str, what: str, *words: str) -> bool:
        resource, _, sub = what.partition("/")
        words += (f"--subresource={sub}",)
        try:
            return operator.kubectl("auth", "can-i", verb, resource, account, *words) == "yes\n"
        except RefusedError:  # `no` is exit 1
            return False

    everywhere = "--all-namespaces"
    assert may("create", "jobs", everywhere)
    for verb, what in (
        ("get", "secrets"), ("create", "pods/exec"), ("delete", "pods"), ("update", "tuningruns"),
        ("list", "nodes"), ("get", "customresourcedefinitions"), ("create", "clusterroles"),
        ("delete", "configmaps"),
    ):  # fmt: skip
        assert not may(verb, what, everywhere), f"{verb} {what}"
    assert not may("get", "leases", "--namespace=default")

"""`helm install`, a run, an upgrade and a rollback in its middle, `helm uninstall`, and again.

The operator of the other tests makes room: two that watch the whole cluster would share its runs.
"""

from __future__ import annotations

import contextlib
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ledger_reader import epochs_of, events_of, faults, of_kind
from manifests import namespace
from real_cluster import Kube, Object, RefusedError, Testbed, command, until
from rights import Right, granted_by, right

pytestmark = [pytest.mark.testbed, pytest.mark.chaos]

Claim = Callable[[Kube], str]

RELEASE, HOME = "quicktune-operator", "chart-system"
ACCOUNT = f"system:serviceaccount:{HOME}:{RELEASE}"
REDIS_POD = f"{RELEASE}-redis-0"
CLIENT = "REDISCLI_AUTH=$(cat /etc/quicktune/redis/password) redis-cli --user quicktune"
COUNTED = r"quicktune_steps_total\{.*outcome=\"ok\".*\} [1-9]"
RUN_SECONDS = 1200.0
CHANCE = 0.1  # ten digits
VIOLATIONS = "pod-security.kubernetes.io/audit-violations"
STANDARD = tuple(f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("warn", "audit"))

VALUES: Object = {
    "image": {"repository": "testbed.local/operator", "tag": "1", "pullPolicy": "Never"},
    "trainer": {
        "image": {"repository": "testbed.local/trainer", "tag": "1"},
        "checkpointDefaults": {"size": "2Gi"},
    },
    "redis": {
        "bundled": {
            "image": {"repository": "testbed.local/redis", "tag": "1"},
            "maxMemory": "200mb",
        }
    },
    "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
}


def merged(base: Object, over: Object) -> Object:
    """Values over values, as Helm merges them."""
    both = {
        key: merged(base[key], value) if isinstance(value, dict) and key in base else value
        for key, value in over.items()
    }
    return {**base, **both}


class Release:
    """The chart as this test installs it."""

    def __init__(self, kube: Kube, chart: Path) -> None:
        self.kube, self._chart = kube, chart
        self.said = ""

    def helm(self, verb: str, *words: str, **values: Any) -> str:
        """A helm command for the release; install and upgrade take values."""
        given = [RELEASE]
        stdin = None
        if verb in {"install", "upgrade"}:
            given += [str(self._chart), "--values", "-"]
            stdin = yaml.safe_dump(merged(VALUES, values))
        said = command("helm", verb, *given, "--namespace", HOME, *words, stdin=stdin)
        self.said += said
        return said

    def wait(self) -> None:
        """Until Redis and every replica are ready."""
        for workload in (f"statefulset/{RELEASE}-redis", f"deployment/{RELEASE}"):
            self.kube.kubectl("rollout", "status", workload, "--timeout=180s")

    def operators(self) -> list[Object]:
        """The operator's pods that are not on their way out."""
        pods = self.kube.items("pod", f"app.kubernetes.io/name={RELEASE}")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def events(self, uid: str) -> list[dict[str, str]]:
        return events_of(self.kube, uid, pod=REDIS_POD, client=CLIENT)

    def told(self, uid: str) -> int:
        """Steps whose result is in the ledger."""
        return sum(map(len, epochs_of(self.events(uid)).values()))


@pytest.fixture
def release(testbed: Testbed, root: Path) -> Iterator[Release]:
    """A namespace under the `restricted` standard, and nothing of an operator in the cluster."""
    default = Kube(namespace="default", api=testbed.api)
    other = command(str(root / "tests/testbed/operator.sh"))
    crd = ("delete", "crd", "tuningruns.quicktune.dev", "--ignore-not-found", "--timeout=120s")
    command("kubectl", "delete", "-f", "-", "--ignore-not-found", "--timeout=120s", stdin=other)
    default.kubectl(*crd)
    default.create(namespace(HOME, "restricted"))
    default.kubectl("label", "namespace", HOME, *STANDARD)
    kube = Kube(namespace=HOME, api=testbed.api)
    made = Release(kube, root / "helm" / RELEASE)
    yield made
    with contextlib.suppress(RefusedError):  # the test did it, or never came so far
        made.helm("uninstall")
    default.kubectl(*crd)
    default.kubectl("delete", "namespace", HOME, "--timeout=120s")


@pytest.fixture
def digits_run(restricted: Kube, digits: Claim, root: Path) -> Callable[[], Object]:
    """Applies the digits example, shortened, and returns the TuningRun."""
    restricted.kubectl("label", "namespace", restricted.namespace, *STANDARD)
    digits(restricted)
    manifest = yaml.safe_load((root / "examples/digits/tuningrun-cluster.yaml").read_text())
    manifest["spec"]["search"]["models"] = ["mini_resnet"]
    manifest["spec"]["search"]["overrides"]["data_augmentation"] = "none"
    manifest["spec"]["fidelity"]["stepsPerJob"] = 1
    manifest["spec"]["budget"] = {"maxSteps": 4}

    def apply() -> Object:
        restricted.apply(text=yaml.safe_dump(manifest))
        return restricted.get("tuningrun", "digits")

    return apply


def metrics(pod: Object) -> str:
    """What an operator's pod shows."""
    address = f"http://{pod['status']['podIP']}:8080/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def ports(kube: Kube, pod: str, state: str) -> set[tuple[int, int]]:
    """(own port, other side's port) of a pod's TCP sockets; state 0A listens, 01 is connected."""
    text = kube.execute(pod, "sh", "-c", "cat /proc/net/tcp /proc/net/tcp6")
    rows = (line.split() for line in text.splitlines() if ":" in line.split()[0])
    return {
        (int(row[1].rpartition(":")[2], 16), int(row[2].rpartition(":")[2], 16))
        for row in rows
        if row[3] == state
    }


def check_policies(release: Release) -> None:
    """The policies choose the real pods and allow the sockets that these have."""
    policies = release.kube.api.get(
        f"/apis/networking.k8s.io/v1/namespaces/{HOME}/networkpolicies"
    )["items"]
    allowed = {p["metadata"]["name"]: p["spec"] for p in policies}
    (operator,) = release.operators()
    name = operator["metadata"]["name"]
    for about, pod in ((RELEASE, name), (f"{RELEASE}-redis", REDIS_POD)):
        labels = release.kube.get("pod", pod)["metadata"]["labels"]
        assert allowed[about]["podSelector"]["matchLabels"].items() <= labels.items()
        opened = {p["port"] for rule in allowed[about]["ingress"] for p in rule["ports"]}
        assert {own for own, _ in ports(release.kube, pod, "0A")} == opened
    (only,) = allowed[f"{RELEASE}-redis"]["ingress"][0]["from"]
    assert only["podSelector"]["matchLabels"].items() <= operator["metadata"]["labels"].items()
    outward = {p["port"] for rule in allowed[RELEASE]["egress"] for p in rule["ports"]}
    reached = {other for own, other in ports(release.kube, name, "01") if own != 8080}
    assert reached <= outward
    assert {6379, 443} <= reached


def verbs_seen(testbed: Testbed, since: int) -> set[Right]:
    """What the chart's account was allowed; a refusal fails the test."""
    log = testbed.audit()[since:]
    mine = [e for e in log if e["user"]["username"] == ACCOUNT and "objectRef" in e]
    assert [e for e in mine if e.get("responseStatus", {}).get("code") == 403] == []
    return {right(event) for event in mine}


def granted(kube: Kube) -> set[Right]:
    """What the chart's roles allow."""
    root = "/apis/rbac.authorization.k8s.io/v1"
    roles = (
        kube.api.get(f"{root}/clusterroles/{RELEASE}"),
        kube.api.get(f"{root}/namespaces/{HOME}/roles/{RELEASE}-lease"),
    )
    return granted_by(roles)


def violations(testbed: Testbed, *namespaces: str) -> set[str]:
    """What the standard `restricted` has against anything made in these namespaces."""
    return {
        e["annotations"][VIOLATIONS]
        for e in testbed.audit()
        if VIOLATIONS in e.get("annotations", {})
        and e.get("objectRef", {}).get("namespace") in namespaces
    }


def test_a_run_survives_upgrade_and_rollback_and_outlives_the_release(
    release: Release, digits_run: Callable[[], Object], restricted: Kube, testbed: Testbed
) -> None:
    since = len(testbed.audit())
    release.helm("install")
    release.wait()
    release.helm("test")
    uid = digits_run()["metadata"]["uid"]
    until("two steps are told", lambda: release.told(uid) >= 2, seconds=RUN_SECONDS, every=1.0)
    check_policies(release)
    (operator,) = release.operators()
    until("it counts steps", lambda: re.search(COUNTED, metrics(operator)))

    assert finished(restricted) is None
    release.helm("upgrade", replicas=2, statusSeconds=4)
    release.wait()
    until("one of two leads", lambda: leaders(release) == [0, 1])
    complete_with(release, restricted, uid, 4)

    raise_budget(restricted, 6)
    until("a step is told", lambda: release.told(uid) >= 5, seconds=RUN_SECONDS, every=1.0)
    assert finished(restricted) is None
    release.helm("rollback", "1")
    release.wait()
    complete_with(release, restricted, uid, 6)
    assert held_out_score(restricted) > 2 * CHANCE

    assert verbs_seen(testbed, since) <= granted(release.kube)
    assert "would violate" not in release.said
    assert violations(testbed, HOME, restricted.namespace) == set()
    policies = restricted.kubectl("get", "networkpolicies", "-o", "name").split()
    made = {name.partition("/")[2] for name in policies}
    assert made == {"quicktune-steps", "quicktune-weights"}

    before, best = release.events(uid), restricted.get("tuningrun", "digits")["status"]["best"]
    release.helm("uninstall")
    assert restricted.get("tuningrun", "digits")["status"]["best"] == best
    release.helm("install")
    release.wait()
    raise_budget(restricted, 7)
    complete_with(release, restricted, uid, 7)  # the same Redis, the same password
    after = release.events(uid)
    assert after[: len(before)] == before
    assert faults(after, 7) == []
    assert len({e["ep"] for e in after}) >= 3  # each operator wrote with an epoch of its own


def raise_budget(kube: Kube, steps: int) -> None:
    patch = f'{{"spec": {{"budget": {{"maxSteps": {steps}}}}}}}'
    kube.kubectl("patch", "tnr", "digits", "--type=merge", "-p", patch)
    until("it goes on", lambda: finished(kube) is None)


def complete_with(release: Release, kube: Kube, uid: str, steps: int) -> None:
    """Until the run is Complete, with so many steps."""
    until("it is complete", lambda: finished(kube), seconds=RUN_SECONDS, every=1.0)
    assert release.told(uid) == steps
    assert of_kind(release.events(uid), "close")[-1]["reason"] == "BudgetExhausted"


def held_out_score(kube: Kube) -> float:
    """What the best checkpoint scores on images that the search never saw, by a Job of its own."""
    kube.kubectl("annotate", "tnr", "digits", "quicktune.dev/evaluate=once")

    def score() -> str:
        return str(kube.get("tuningrun", "digits")["status"]["best"].get("testScore", ""))

    return float(until("the best is scored", score, seconds=RUN_SECONDS, every=1.0))


def leaders(release: Release) -> list[int]:
    """Who leads, of the replicas, sorted."""
    return sorted(int("quicktune_leader 1.0" in metrics(pod)) for pod in release.operators())


def finished(kube: Kube) -> Object | None:
    failed = kube.condition("tuningrun", "digits", "Failed")
    assert failed is None, failed
    return kube.condition("tuningrun", "digits", "Complete")

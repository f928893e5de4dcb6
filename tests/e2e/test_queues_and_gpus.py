"""Who gets a node, and when: GPUs that are counted, pods no node takes, Jobs a queue holds back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from conftest import Simulate
from ledger_reader import of_kind
from manifests import Object
from real_cluster import Kube, until
from tuning_runs import Run

pytestmark = pytest.mark.testbed

GPU, NO_SUCH_GPU = "nvidia.com/gpu", "amd.com/gpu"


def limited(**limits: object) -> dict[str, Any]:
    """A trainer container with these limits."""
    requests = {"cpu": "10m", "memory": "64Mi"}
    return {"resources": {"requests": requests, "limits": {"memory": "256Mi", **limits}}}


# --- GPUs -----------------------------------------------------------------------------------------


@pytest.mark.chaos  # alone: it needs all four GPUs of the node
def test_as_many_steps_run_as_there_are_gpus(restricted: Kube, simulate: Simulate) -> None:
    gpu = limited(**{GPU: 1})

    run = simulate(restricted, seconds=3, parallelism=8, container=gpu, budget={"maxSteps": 12})

    at_once: list[int] = []

    def ended() -> bool:
        at_once.append(len(run.working()))
        return run.condition("Complete")[0] == "True"

    until("it is Complete", ended, seconds=180)
    assert max(at_once) == 4
    assert run.faults(12) == []
    assert {event["a"] for event in of_kind(run.events(), "done")} == {"0"}


def test_more_than_one_gpu_a_step_is_refused_by_condition(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, container=limited(**{GPU: 2}), trainer={"custom": False})

    accepted = run.until_condition("Accepted", "False", "Invalid")

    assert "resources: '2 devices'" in accepted["message"]
    assert restricted.items("job") == []


# --- no node --------------------------------------------------------------------------------------


def test_steps_no_node_takes_are_given_up_in_time_and_a_retry_goes_on(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(
        restricted, container=limited(**{NO_SUCH_GPU: 1}), budget={"maxSteps": 2},
        failurePolicy={"pendingTimeout": "6s"},
    )  # fmt: skip

    waiting = run.until_condition("Progressing", "False", "Unschedulable")
    assert f"Insufficient {NO_SUCH_GPU}" in waiting["message"]
    run.until_condition("Progressing", "False", "InfraRetriesExhausted", seconds=120)

    cancelled = of_kind(run.events(), "cancel")
    assert len(cancelled) == 3
    assert {float(event.get("dev", "0")) for event in cancelled} == {0}  # what never ran is free
    until("their Jobs are gone", lambda: not run.live())
    template: Object = run.get()["spec"]["template"]
    del template["spec"]["containers"][0]["resources"]["limits"][NO_SUCH_GPU]
    run.patch(template=template)
    restricted.kubectl("annotate", "tnr", "sim", "quicktune.dev/retry=1")
    run.complete()
    assert run.faults(2) == []


# --- a queue --------------------------------------------------------------------------------------


@pytest.fixture
def queue(restricted: Kube) -> Iterator[None]:
    """The server suspends each new Job that has a queue's label, as Kueue's webhook does."""
    name = f"queue-{restricted.namespace}"
    rule = {
        "apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"],
        "resources": ["jobs"],
    }  # fmt: skip
    mine = {"matchLabels": {"kubernetes.io/metadata.name": restricted.namespace}}
    labels = "object.metadata.?labels"
    kinds: Object = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": name}}
    policy = {
        **kinds, "kind": "MutatingAdmissionPolicy",
        "spec": {
            "matchConstraints": {"resourceRules": [rule], "namespaceSelector": mine},
            "matchConditions": [
                {
                    "name": "queued",
                    "expression": f"{labels}[?'kueue.x-k8s.io/queue-name'].hasValue()",
                }
            ],
            "failurePolicy": "Fail", "reinvocationPolicy": "Never",
            "mutations": [
                {
                    "patchType": "ApplyConfiguration",
                    "applyConfiguration": {
                        "expression": "Object{spec: Object.spec{suspend: true}}"
                    },
                }
            ],
        },
    }  # fmt: skip
    binding = {**kinds, "kind": "MutatingAdmissionPolicyBinding", "spec": {"policyName": name}}
    restricted.create(policy, binding)
    until("the policy works", lambda: _is_suspended_at_birth(restricted))
    yield
    for kind in ("mutatingadmissionpolicybinding", "mutatingadmissionpolicy"):
        restricted.kubectl("delete", kind, name)


def _is_suspended_at_birth(kube: Kube) -> bool:
    labels = {"kueue.x-k8s.io/queue-name": "team"}
    trial = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "trial", "labels": labels},
        "spec": {"template": {"spec": {
            "restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}],
        }}},
    }  # fmt: skip
    words = ["create", "--dry-run=server", "-o", "json", "-f", "-"]
    found: Object = json.loads(kube.kubectl(*words, stdin=json.dumps(trial)))
    return bool(found["spec"].get("suspend"))


def admit(run: Run, component: str = "step") -> None:
    """Let every queued Job go, on a node that the queue chose."""
    chosen = {"spec": {"nodeSelector": {"kubernetes.io/os": "linux"}}}
    for job in run.jobs(component):
        if job["spec"]["suspend"]:
            body = json.dumps({"spec": {"suspend": False, "template": chosen}})
            run.kube.kubectl("patch", "job", job["metadata"]["name"], "-p", body)


def since(moment: str) -> float:
    """Seconds since a time of the server."""
    return time.time() - datetime.fromisoformat(moment).timestamp()


def evict(run: Run) -> None:
    """Take the quota away in the middle of all steps."""
    for name in run.live():
        run.kube.kubectl("patch", "job", name, "-p", '{"spec": {"suspend": true}}')


def test_jobs_of_a_queue_are_held_evicted_and_admitted_again_without_an_attempt(
    restricted: Kube, simulate: Simulate, queue: None
) -> None:
    steps = 5  # many: a Job that mistakes eviction for failure does so one time in three
    run = simulate(
        restricted, seconds=20, parallelism=steps, budget={"maxSteps": steps}, queueName="team",
        failurePolicy={"pendingTimeout": "20s"},
    )  # fmt: skip
    run.until_condition("Progressing", "False", "WaitingForQuota")
    admit(run, "prepare")
    until("all steps are queued", lambda: len(run.live()) == steps, seconds=60)
    assert all(job["spec"]["suspend"] for job in run.jobs())
    run.until_condition("Progressing", "False", "WaitingForQuota")

    def queued_long() -> bool:
        return since(run.jobs()[-1]["metadata"]["creationTimestamp"]) > 25

    until("they queued for longer than a pod may be pending", queued_long)
    born = {job["metadata"]["uid"] for job in run.jobs()}

    admit(run)
    run.until_working(steps)
    evict(run)
    until("every pod is gone", lambda: not run.pods())
    run.until_condition("Progressing", "False", "WaitingForQuota")
    queued = until("no Job failed of it", lambda: run.live(), seconds=5)
    assert len(queued) == steps
    admit(run)

    run.complete()
    assert {job["metadata"]["uid"] for job in run.jobs()} == born
    assert of_kind(run.events(), "retry", "cancel") == []
    assert all(job["spec"]["template"]["spec"]["nodeSelector"] for job in run.jobs())
    longest = max(since(job["metadata"]["creationTimestamp"]) for job in run.jobs())
    for done in of_kind(run.events(), "done"):
        assert 20 <= float(done["dev"]) < longest - 25  # both pods of it are charged
        assert float(done["q"]) >= 25  # the time without a pod is not
    assert run.faults(steps) == []

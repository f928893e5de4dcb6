"""What Jobs and Pods mean, as a table: recorded shapes of real objects, one fact changed each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qtt_core.plan import JobPhase
from qtt_operator.job_ends import Sight, needs_deletion, observed_job, vanished, waiting_reason

NOW = 1_800_000_100.0
SIGHT = Sight(now=NOW, pending_since=NOW - 50)
LABELS = {
    "app.kubernetes.io/component": "step", "quicktune.dev/config": "12",
    "quicktune.dev/fidelity": "3", "quicktune.dev/attempt": "1",
}  # fmt: skip
DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
FAILED = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}


def at(second: int) -> str:
    """A timestamp within the two minutes these objects live in."""
    return f"2027-01-15T08:{second // 60:02d}:{second % 60:02d}Z"


def job(*conditions: dict[str, Any], suspend: bool = False) -> dict[str, Any]:
    return {
        "metadata": {"name": "birds-c12-f3-a1", "labels": LABELS, "creationTimestamp": at(0)},
        "spec": {"suspend": suspend},
        "status": {"conditions": list(conditions)},
    }


def pod(state: dict[str, Any] | None = None, *, born: int = 1, **more: Any) -> dict[str, Any]:
    status = {"containerStatuses": [{"name": "proxy", "state": {}}], **more.pop("status", {})}
    if state is not None:
        status["containerStatuses"].append({"name": "trainer", "state": state})
    return {
        "metadata": {"name": f"p{born}", "creationTimestamp": at(born), **more},
        "spec": {"nodeName": "n1"},
        "status": status,
    }


def ended(code: int, **facts: Any) -> dict[str, Any]:
    return {
        "terminated": {
            "exitCode": code, "message": "m", "startedAt": at(10), "finishedAt": at(40), **facts,
        }
    }  # fmt: skip


RUNNING = {"running": {"startedAt": at(10)}}


@pytest.mark.parametrize(
    ("found", "pods", "phase"),
    [
        pytest.param(job(), [], JobPhase.PENDING, id="no pod yet"),
        pytest.param(job(suspend=True), [], JobPhase.QUEUED, id="held by a queue"),
        pytest.param(job(), [pod()], JobPhase.PENDING, id="pod without a started trainer"),
        pytest.param(job(), [pod(RUNNING)], JobPhase.RUNNING, id="trainer runs"),
        pytest.param(job(), [pod(ended(0))], JobPhase.ENDED, id="ended before the Job says so"),
        pytest.param(job(), [pod(ended(75))], JobPhase.ENDED, id="failed before the Job says so"),
        pytest.param(
            job(), [pod(ended(75), deletionTimestamp=at(30))], JobPhase.PENDING,
            id="deleted: eviction by a queue or failure, the Job will tell",
        ),
        pytest.param(
            job(suspend=True), [pod(ended(75), deletionTimestamp=at(30))], JobPhase.QUEUED,
            id="suspended while it ran",
        ),
        pytest.param(
            job(FAILED), [pod(ended(75), deletionTimestamp=at(30))], JobPhase.ENDED,
            id="deleted by hand, the Job has failed",
        ),
        pytest.param(
            job(), [pod(ended(143), status={"conditions": [DISRUPTED]})], JobPhase.PENDING,
            id="first disruption: Kubernetes replaces it",
        ),
        pytest.param(
            job(), [pod(ended(0), status={"conditions": [DISRUPTED]})], JobPhase.ENDED,
            id="disrupted after it had committed",
        ),
        pytest.param(job(FAILED), [], JobPhase.PENDING, id="finished, its pod not seen yet"),
    ],
)  # fmt: skip
def test_the_phase_of_a_job(
    found: dict[str, Any], pods: list[dict[str, Any]], phase: JobPhase
) -> None:
    seen = observed_job(found, pods, SIGHT)

    assert seen is not None
    assert seen.phase is phase
    assert (seen.pending_since is not None) is (phase is JobPhase.PENDING)
    assert (seen.c, seen.to, seen.attempt) == ("12", 3, 1)


@pytest.mark.parametrize(
    ("found", "pods", "sight", "reason"),
    [
        pytest.param(job(), [pod(ended(137, reason="OOMKilled"))], SIGHT, "OOMKilled", id="oom"),
        pytest.param(job(), [pod(ended(137))], SIGHT, "", id="killed by something else"),
        pytest.param(
            job(), [pod(ended(75), status={"reason": "DeadlineExceeded"})], SIGHT,
            "DeadlineExceeded", id="the pod's deadline",
        ),
        pytest.param(
            job(),
            [pod(ended(143), status={"conditions": [DISRUPTED]}),
             pod(ended(143), born=5, status={"conditions": [DISRUPTED]})],
            SIGHT, "Evicted", id="second disruption",
        ),
        pytest.param(
            job(), [pod(RUNNING, deletionTimestamp="2027-01-15T07:00:00Z")], SIGHT, "NodeLost",
            id="terminating for ever",
        ),
        pytest.param(
            job(FAILED), [], replace(SIGHT, finished_since=NOW - 11), "Vanished", id="pod gone"
        ),
    ],
)  # fmt: skip
def test_the_reason_of_an_end(
    found: dict[str, Any], pods: list[dict[str, Any]], sight: Sight, reason: str
) -> None:
    seen = observed_job(found, pods, sight)

    assert seen is not None
    assert seen.end is not None
    assert seen.end.reason == reason


def test_device_time_is_that_of_the_trainer_over_all_pods_and_the_rest_was_waiting() -> None:
    first = pod(ended(143), status={"conditions": [DISRUPTED]})
    second = pod(ended(0, startedAt=at(60), finishedAt=at(80)), born=50)

    seen = observed_job(job(), [second, first], replace(SIGHT, past_seconds=5.0))

    assert seen is not None
    assert seen.end is not None
    assert seen.end.device_seconds == 30 + 20 + 5
    assert seen.end.queue_seconds == 80 - 55


def test_a_deleted_job_keeps_what_its_trainer_said() -> None:
    end = vanished(job(), [pod(ended(0))], SIGHT)

    assert (end.exit_code, end.message, end.reason) == (0, "m", "Vanished")


def test_a_job_we_delete_ends_with_our_reason() -> None:
    end = vanished(job(), [], replace(SIGHT, killed="DeadlineExceeded"))

    assert (end.exit_code, end.reason) == (None, "DeadlineExceeded")


@pytest.mark.parametrize(
    ("found", "pods", "wanted"),
    [
        (job(), [pod(ended(0))], False),
        (job(), [pod(RUNNING)], True),
        (job(), [pod(ended(143), status={"conditions": [DISRUPTED]})], True),
        (job(FAILED), [pod(ended(143), status={"conditions": [DISRUPTED]})], False),
    ],
    ids=["ends by itself", "still runs", "would be replaced", "finished"],
)
def test_a_recorded_job_that_would_go_on_is_deleted(
    found: dict[str, Any], pods: list[dict[str, Any]], wanted: bool
) -> None:
    assert needs_deletion(found, pods) is wanted


def test_other_peoples_jobs_are_not_ours() -> None:
    stranger = {**job(), "metadata": {"name": "x", "labels": {}}}

    assert observed_job(stranger, [], SIGHT) is None


@pytest.mark.parametrize(
    ("waiting", "reason"),
    [
        ("ImagePullBackOff", "ImagePull"),
        ("ContainerCreating", ""),
        ("CreateContainerError", "Unschedulable"),
    ],
)
def test_why_a_pod_waits(waiting: str, reason: str) -> None:
    assert waiting_reason(pod({"waiting": {"reason": waiting}}))[0] == reason


@pytest.mark.parametrize(
    ("seconds", "sandbox", "reason"),
    [(70, "False", "VolumeAttach"), (50, "False", ""), (70, "True", ""), (70, "", "")],
    ids=["long", "not yet long", "mounted", "an old server"],
)
def test_a_pod_that_has_a_node_and_not_its_volumes_is_told(
    seconds: int, sandbox: str, reason: str
) -> None:
    conditions = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": at(100)}]
    if sandbox:
        conditions.append({"type": "PodReadyToStartContainers", "status": sandbox})
    waiting = {"state": {"waiting": {"reason": "ContainerCreating"}}, "name": "trainer"}
    found = pod(status={"conditions": conditions, "containerStatuses": [waiting]})

    assert waiting_reason(found, NOW + seconds)[0] == reason


def test_a_pod_without_a_node_tells_the_schedulers_words() -> None:
    unplaced = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient gpu"}

    assert waiting_reason(pod(status={"conditions": [unplaced]})) == (
        "Unschedulable", "0/3 nodes: Insufficient gpu",
    )  # fmt: skip

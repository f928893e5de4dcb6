"""A run outlives what it stands on: nothing is told or charged twice, nothing lost, it ends."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Simulate
from ledger_reader import of_kind
from manifests import Object, claim, mounted, pod
from real_cluster import Kube, Testbed, until
from tuning_runs import Run

pytestmark = pytest.mark.chaos

STEPS = 6
ETCD = "http://127.0.0.1:2379"
AOF = "appendonlydir/appendonly.aof.1.incr.aof"


def leader(operator: Kube) -> Object:
    """The operator's one pod."""
    (found,) = operator.items("pod", "app.kubernetes.io/name=quicktune-operator")
    return found


def settled(run: Run, steps: int = STEPS) -> list[dict[str, str]]:
    """The ledger of a run that has completed; what must hold of every one holds of it."""
    status = run.complete()
    events = run.events()
    assert run.faults(steps) == []
    assert run.told() == steps == status["consumed"]["steps"]
    assert [e["reason"] for e in of_kind(events, "close")] == ["BudgetExhausted"]
    charged = sum(float(e.get("dev", 0)) for e in events)
    counted = status["consumed"]["gpuSeconds"]
    assert abs(charged - counted) < 1.5, (charged, counted)
    until("no Job is left that works", lambda: not run.live(), seconds=30)
    return events


# --- programs -------------------------------------------------------------------------------------


def redis_dies(_: Run, operator: Kube, testbed: Testbed) -> None:
    testbed.signal_container(operator.get("pod", "redis-0"))


def operator_dies(_: Run, operator: Kube, testbed: Testbed) -> None:
    testbed.signal_container(leader(operator))


def api_server_dies(_: Run, __: Kube, testbed: Testbed) -> None:
    testbed.restart("kube-apiserver", after=5)


def etcd_dies(_: Run, __: Kube, testbed: Testbed) -> None:
    testbed.restart("etcd", after=5)


def kubelet_dies(_: Run, __: Kube, testbed: Testbed) -> None:
    testbed.restart("kubelet-node-1", after=5)


def containers_lose_their_daemon(_: Run, __: Kube, testbed: Testbed) -> None:
    testbed.restart("containerd-node-1", after=2)


def controllers_die(_: Run, __: Kube, testbed: Testbed) -> None:
    testbed.restart("kube-controller-manager", after=3)
    testbed.restart("kube-scheduler")


def everything_dies_at_once(run: Run, operator: Kube, testbed: Testbed) -> None:
    operator_dies(run, operator, testbed)
    redis_dies(run, operator, testbed)
    testbed.kill("kube-apiserver")
    testbed.restart("etcd", after=2)
    testbed.restart("kube-apiserver")


@pytest.mark.parametrize(
    "fault",
    [
        redis_dies, operator_dies, api_server_dies, etcd_dies, kubelet_dies,
        containers_lose_their_daemon, controllers_die, everything_dies_at_once,
    ],
    ids=lambda fault: fault.__name__,
)  # fmt: skip
def test_a_run_outlives(
    restricted: Kube,
    operator: Kube,
    simulate: Simulate,
    testbed: Testbed,
    fault: Callable[[Run, Kube, Testbed], None],
) -> None:
    run = simulate(restricted, seconds=2, parallelism=2, budget={"maxSteps": STEPS})
    run.until_told(1)
    run.until_working(2)

    fault(run, operator, testbed)

    events = settled(run)
    assert {e["reason"] for e in of_kind(events, "retry")} <= {"Killed", "Vanished", "preempted"}
    assert of_kind(events, "fail", "cancel") == []


# --- objects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace", [[], ["--grace-period=0", "--force"]], ids=["asked", "forced"])
def test_a_pod_deleted_by_hand_is_tried_again(
    restricted: Kube, simulate: Simulate, grace: list[str]
) -> None:
    run = simulate(restricted, seconds=6, budget={"maxSteps": 2})
    (found,) = run.until_working(1)

    restricted.delete("pod", found["metadata"]["name"], "--wait=false", *grace)

    events = settled(run, 2)
    assert len(of_kind(events, "retry")) == 1
    assert of_kind(events, "retry")[0]["reason"] in {"preempted", "Vanished", "Killed"}


def test_a_job_deleted_by_hand_is_tried_again_and_its_late_pod_is_not_believed(
    restricted: Kube, simulate: Simulate
) -> None:
    """`--cascade=orphan` leaves the pod: its result comes when the next attempt is under way."""
    run = simulate(restricted, seconds=8, budget={"maxSteps": 2})
    (found,) = run.until_working(1)
    job = found["metadata"]["labels"]["job-name"]

    restricted.delete("job", job, "--cascade=orphan", "--wait=false")

    events = settled(run, 2)
    assert [e["reason"] for e in of_kind(events, "retry")] == ["Vanished"]
    assert sorted(e["a"] for e in of_kind(events, "done")) == ["0", "1"]


def test_an_end_that_is_seen_again_is_neither_told_nor_charged_again(
    restricted: Kube, simulate: Simulate
) -> None:
    """A Job without its time to live looks like one whose end was never recorded."""
    run = simulate(restricted, seconds=2, budget={"maxSteps": 4})
    run.until_told(2)
    (first, *_) = run.jobs()

    field = [{"op": "remove", "path": "/spec/ttlSecondsAfterFinished"}]
    restricted.kubectl(
        "patch", "job", first["metadata"]["name"], "--type=json", "-p", json.dumps(field)
    )

    settled(run, 4)
    name = first["metadata"]["name"]
    until(
        "it got its time to live again",
        lambda: restricted.get("job", name)["spec"].get("ttlSecondsAfterFinished"),
    )


# --- volumes --------------------------------------------------------------------------------------


def test_a_full_volume_holds_a_run_until_there_is_room(
    restricted: Kube, simulate: Simulate
) -> None:
    template = claim("unused", "16Mi", storageClassName="small")["spec"]
    run = simulate(
        restricted, seconds=1, budget={"maxSteps": 12},
        checkpoint={"volumeClaimTemplate": template},
    )  # fmt: skip
    run.until_told(1)
    volume, mount = mounted("ck", "/ck", persistentVolumeClaim={"claimName": "sim-checkpoints"})
    secure = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    script = (  # a write of a page fails while single blocks are left: small files take those
        "cat /dev/zero > /ck/filler; n=0; while echo x > /ck/filler-$n; do n=$((n + 1)); done;"
        " touch /tmp/full; trap 'exit 0' TERM; while :; do sleep 1; done"
    )
    filler = pod(
        "filler", script, container={"volumeMounts": [mount], "securityContext": secure},
        volumes=[volume],
        securityContext={
            "runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    )  # fmt: skip
    restricted.create(filler)
    run.until_condition("Progressing", "False", "DiskFull", seconds=120)
    told = run.told()

    restricted.execute("filler", "sh", "-c", "rm /ck/filler*")

    events = settled(run, 12)
    assert told < 12
    assert {e["reason"] for e in of_kind(events, "retry")} == {"disk_full"}


# --- the store forgets, the watch is cut ----------------------------------------------------------


def test_results_that_redis_lost_come_back_from_their_jobs(
    restricted: Kube, operator: Kube, simulate: Simulate, testbed: Testbed
) -> None:
    """The newest events are cut off its disk, results among them; Jobs are the second witness."""
    run = simulate(restricted, seconds=1, parallelism=2, budget={"maxSteps": STEPS})
    folder = volume_of(operator, "data-redis-0", testbed)
    run.until_told(1)
    kept, before = (folder / AOF).stat().st_size, len(run.events())
    run.until_told(3)
    redis = operator.get("pod", "redis-0")

    testbed.signal_container(redis, "STOP")
    with (folder / AOF).open("r+b") as file:
        file.truncate(kept)
    testbed.signal_container(redis, "KILL")

    events = settled(run)
    assert len(events) > before
    assert len({e["h"] for e in of_kind(events, "open")}) == len(of_kind(events, "open"))


def volume_of(kube: Kube, name: str, testbed: Testbed) -> Path:
    """Where a claim's volume lies on the node."""
    volume: str = kube.get("persistentvolumeclaim", name)["spec"]["volumeName"]
    return testbed.folder / "volumes" / volume


def etcd(path: str, **body: Any) -> dict[str, Any]:
    """A call of etcd's JSON gateway."""
    request = urllib.request.Request(f"{ETCD}/v3/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_a_watch_that_was_cut_past_a_compaction_lists_anew(
    restricted: Kube, operator: Kube, simulate: Simulate, testbed: Testbed
) -> None:
    """The server answers 410 to a watch that wants to go on from a version it no longer has."""
    run = simulate(restricted, seconds=1, parallelism=2, budget={"maxSteps": STEPS})
    run.until_told(1)
    before = lists(testbed)

    testbed.kill("kube-apiserver")
    # a version that nobody has seen, for the watches may have been as new as the newest object
    revision = int(etcd("kv/put", key="AA==", value="AA==")["header"]["revision"])
    etcd("kv/compaction", revision=revision, physical=True)
    testbed.restart("kube-apiserver")

    settled(run)
    until("it listed Jobs and pods anew", lambda: lists(testbed) >= before + 2)


def lists(testbed: Testbed) -> int:
    """How often our informers listed Jobs or pods: at their start, and after a 410."""
    return sum(
        entry["verb"] == "list" and entry["objectRef"]["resource"] in {"jobs", "pods"}
        and entry["user"]["username"].endswith(":quicktune-operator")
        for entry in testbed.audit()
    )  # fmt: skip

"""What every other end-to-end test relies on: that the cluster under it is a real one."""

from __future__ import annotations

import json
import time

import pytest
from manifests import REDIS, UNPRIVILEGED, claim, job, mounted, pod, pod_spec
from real_cluster import Kube, RefusedError, Testbed, until

pytestmark = pytest.mark.testbed


def config_map(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}


# --- jobs and pods ---------------------------------------------------------------------------


def test_a_gpu_job_writes_its_volume_and_its_message(kube: Kube) -> None:
    volume, mount = mounted("data", "/data", persistentVolumeClaim={"claimName": "data"})
    script = "echo kept > /data/file && printf '{\"score\": 0.5}' > /dev/termination-log"
    user = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 2000}
    limits = {"nvidia.com/gpu": "1", "memory": "64Mi"}
    container = {"resources": {"limits": limits}, "volumeMounts": [mount]}
    spec = pod_spec(script, container=container, securityContext=user, volumes=[volume])

    kube.create(claim("data", "1Gi"), job("train", spec))

    assert kube.ended_job("train")["type"] == "Complete"
    ended = kube.pod_of("train")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert json.loads(ended["message"]) == {"score": 0.5}
    kube.create(
        pod("reader", "cat /data/file", volumes=[volume], container={"volumeMounts": [mount]})
    )
    kube.ended_pod("reader")
    assert kube.logs("reader") == "kept\n"


def test_more_gpus_than_the_node_has_are_not_scheduled(kube: Kube) -> None:
    kube.create(
        pod("greedy", "true", container={"resources": {"limits": {"nvidia.com/gpu": "99"}}})
    )

    until(
        "the scheduler says why",
        lambda: "Insufficient nvidia.com/gpu" in json.dumps(kube.get("pod", "greedy")["status"]),
    )


def test_an_exit_code_of_the_failure_policy_fails_the_job_at_once(kube: Kube) -> None:
    rule = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [64]}}

    kube.create(job("bad", pod_spec("exit 64"), backoffLimit=3, podFailurePolicy={"rules": [rule]}))

    assert kube.ended_job("bad")["reason"] == "PodFailurePolicy"


def test_a_memory_limit_kills(kube: Kube) -> None:
    limited = {"resources": {"limits": {"memory": "32Mi"}}}

    kube.create(pod("hungry", "head -c 200m /dev/zero | tail", container=limited))

    ended = kube.ended_pod("hungry")
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)


def test_sigterm_reaches_a_deleted_pod_and_its_last_words_are_seen(kube: Kube) -> None:
    trap = "trap 'echo saved > /dev/termination-log; exit 75' TERM"
    stopped = pod("stop", f"{trap}; echo up; while :; do sleep 0.1; done")
    stopped["spec"]["terminationGracePeriodSeconds"] = 20  # a busy machine is slow to trap
    stopped["metadata"]["finalizers"] = ["quicktune.dev/seen"]  # else it is gone when it has ended
    kube.create(stopped)
    until("it runs", lambda: kube.logs("stop") == "up\n")

    kube.delete("pod", "stop", "--wait=false")

    ended = kube.ended_pod("stop")
    kube.kubectl("patch", "pod", "stop", "-p", '{"metadata": {"finalizers": null}}')
    assert (ended["exitCode"], ended["message"]) == (75, "saved\n")


def test_a_restricted_namespace_refuses_a_pod_of_root(restricted: Kube) -> None:
    assert "violates PodSecurity" in restricted.refusal(pod("unsafe", "true"))


# --- network ---------------------------------------------------------------------------------


def test_a_service_is_reached_by_its_name(kube: Kube) -> None:
    labels = {"app": "web"}
    serve = pod_spec("while :; do echo served | nc -l -p 8080; done", restartPolicy="Always")
    template = {"metadata": {"labels": labels}, "spec": serve}
    spec = {"selector": {"matchLabels": labels}, "template": template}
    ports = [{"port": 80, "targetPort": 8080}]
    kube.create(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec},
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"selector": labels, "ports": ports},
        },
    )  # fmt: skip
    kube.kubectl("rollout", "status", "deployment/web", "--timeout=40s")

    tries = (
        "for i in 1 2 3 4 5 6 7 8; do nc -w 1 web 80 </dev/null && exit; sleep 0.5; done; exit 1"
    )
    kube.create(pod("client", tries))

    assert kube.ended_pod("client")["exitCode"] == 0
    assert "served" in kube.logs("client")


# --- volumes, audit --------------------------------------------------------------------------


def test_a_small_volume_fills_up(kube: Kube) -> None:
    volume, mount = mounted("data", "/data", persistentVolumeClaim={"claimName": "tight"})
    write = "dd if=/dev/zero of=/data/{} bs=1M count=12"
    filler = pod(
        "filler", f"{write.format('a')} && {write.format('b')}", volumes=[volume],
        container={"volumeMounts": [mount]},
        securityContext={"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 2000},
    )  # fmt: skip

    kube.create(claim("tight", "16Mi", storageClassName="small"), filler)

    assert kube.ended_pod("filler")["exitCode"] == 1
    assert "No space left on device" in kube.logs("filler")


def test_the_audit_log_names_users_and_verbs(kube: Kube, testbed: Testbed) -> None:
    kube.create(config_map("seen"))

    def logged() -> list[tuple[str, int]]:
        mine = testbed.requests(kube.namespace, "configmaps")
        created = [e for e in mine if (e["verb"], e["objectRef"].get("name")) == ("create", "seen")]
        return [(e["user"]["username"], e["responseStatus"]["code"]) for e in created]

    assert until("the request is logged", logged) == [("admin", 201)]


# --- images ----------------------------------------------------------------------------------


def test_redis_of_a_debian_package_keeps_what_it_acknowledged(kube: Kube) -> None:
    volume, mount = mounted("data", "/data", emptyDir={})
    redis = {
        "image": REDIS, "command": [], "securityContext": UNPRIVILEGED, "volumeMounts": [mount],
        "args": ["--dir", "/data", "--appendonly", "yes", "--appendfsync", "always"],
    }  # fmt: skip
    user = {"runAsNonRoot": True, "runAsUser": 999, "fsGroup": 999}
    fields = {"restartPolicy": "Always", "securityContext": user, "volumes": [volume]}
    kube.create(pod("redis", "", container=redis, **fields))
    until("it answers", lambda: "PONG" in kube.execute("redis", "redis-cli", "ping"))
    kube.execute("redis", "redis-cli", "set", "key", "kept")

    kube.execute("redis", "sh", "-c", "kill 1")

    until("it was restarted", lambda: kube.container("redis")["restartCount"] == 1)
    until("it kept", lambda: "kept" in kube.execute("redis", "redis-cli", "get", "key"))


# --- faults ----------------------------------------------------------------------------------


@pytest.mark.chaos
def test_pods_outlive_a_restart_of_their_nodes_programs(kube: Kube, testbed: Testbed) -> None:
    kube.create(pod("steady", "sleep 600"))
    kube.wait_running("steady")
    before = kube.container("steady")

    testbed.restart("containerd-node-1")
    testbed.restart("kubelet-node-1")

    kube.create(pod("later", "true"))
    assert kube.ended_pod("later")["exitCode"] == 0
    assert kube.container("steady") == before
    assert kube.execute("steady", "echo", "there") == "there\n"


@pytest.mark.chaos
def test_a_killed_control_plane_comes_back_with_its_objects(kube: Kube, testbed: Testbed) -> None:
    kube.create(config_map("kept"))

    with testbed.away("kube-apiserver"), pytest.raises(RefusedError, match="refused"):
        kube.create(config_map("lost"))
    testbed.restart("etcd", after=1)
    for program in ("kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns"):
        testbed.restart(program)

    assert kube.get("configmap", "kept")
    kube.create(job("after", pod_spec("nslookup kubernetes.default.svc.cluster.local")))
    assert kube.ended_job("after")["type"] == "Complete"


@pytest.mark.chaos
def test_a_frozen_scheduler_schedules_once_it_is_thawed(kube: Kube, testbed: Testbed) -> None:
    with testbed.frozen("kube-scheduler"):
        kube.create(pod("waits", "true"))
        time.sleep(2)  # an absence cannot be waited for
        assert "nodeName" not in kube.get("pod", "waits")["spec"]

    assert kube.ended_pod("waits")["exitCode"] == 0

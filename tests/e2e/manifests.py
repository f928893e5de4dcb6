"""Objects that tests create. Pure: a call says only what the test is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Object = dict[str, Any]

BUSYBOX, REDIS = "testbed.local/busybox:1", "testbed.local/redis:1"
OPERATOR, TRAINER = "testbed.local/operator:1", "testbed.local/trainer:1"

UNPRIVILEGED: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
TRAINER_USER: Object = {
    "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001,
    "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip


def namespace(name: str, enforce: str) -> Object:
    """A namespace under a Pod Security Standard; what it has against Jobs is in the audit log."""
    labels = {f"pod-security.kubernetes.io/{mode}": enforce for mode in ("enforce", "audit")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod_spec(script: str, *, container: Mapping[str, Any] | None = None, **fields: Any) -> Object:
    """A pod of one container that runs a shell script; `container` and `fields` overwrite."""
    main = {
        "name": "main", "image": BUSYBOX, "imagePullPolicy": "Never",
        "command": ["sh", "-c", script], **(container or {}),
    }  # fmt: skip
    return {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 2,
        "containers": [main], **fields,
    }  # fmt: skip


def pod(name: str, script: str, **fields: Any) -> Object:
    """`pod_spec` as a Pod."""
    metadata = {"name": name}
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_spec(script, **fields)
    }  # fmt: skip


def job(name: str, spec: Object, **fields: Any) -> Object:
    """A Job of one pod and one attempt; `fields` overwrite its spec."""
    template = {"metadata": {"labels": {"job": name}}, "spec": spec}
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": template, **fields},
    }  # fmt: skip


def claim(
    name: str, size: str, *, modes: Sequence[str] = ("ReadWriteOnce",), **spec: Any
) -> Object:
    """A claim; without `storageClassName`, of the default class `local`."""
    return {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {"accessModes": list(modes), "resources": {"requests": {"storage": size}}, **spec},
    }  # fmt: skip


def data_claim(name: str, namespace: str, folder: Path) -> tuple[Object, Object]:
    """A volume that is a folder of the node, and the claim bound to it before any pod asks."""
    volume_name = f"{namespace}-{name}"
    place: Object = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    linux = {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}
    volume = {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume_name},
        "spec": {
            **place, "capacity": {"storage": "1Gi"}, "local": {"path": str(folder)},
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": namespace, "name": name},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [linux]}]}},
        },
    }  # fmt: skip
    bound = claim(name, "1Gi", modes=("ReadOnlyMany",), storageClassName="", volumeName=volume_name)
    return volume, bound


def mounted(name: str, path: str, **volume: Any) -> tuple[Object, Object]:
    """A volume and its mount: `mounted("data", "/data", persistentVolumeClaim={...})`."""
    return {"name": name, **volume}, {"name": name, "mountPath": path}


def trainer_spec(run_uid: str, command: str, document: str, checkpoints: str) -> Object:
    """A step's pod as the operator is to make it: no right, no token, nothing but its mounts."""
    claim_source = {"claimName": checkpoints}
    mount = {
        "name": "checkpoints", "mountPath": f"/checkpoints/runs/{run_uid}",
        "subPath": f"runs/{run_uid}",
    }  # fmt: skip
    data, data_mount = mounted("dataset", "/data", persistentVolumeClaim={"claimName": "digits"})
    data["persistentVolumeClaim"]["readOnly"] = data_mount["readOnly"] = True
    scratch = [
        mounted(name, path, emptyDir={})
        for name, path in (("scratch", "/scratch"), ("tmp", "/tmp"))
    ]
    shm, shm_mount = mounted("shm", "/dev/shm", emptyDir={"medium": "Memory", "sizeLimit": "1Gi"})
    container = {
        "name": "trainer", "image": TRAINER, "imagePullPolicy": "Never", "args": [command],
        "env": [
            {"name": "QTT_STEP", "value": document}, {"name": "HOME", "value": "/scratch/home"},
            {"name": "HF_HUB_OFFLINE", "value": "1"}, {"name": "OMP_NUM_THREADS", "value": "1"},
        ],
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
        "securityContext": UNPRIVILEGED, "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [mount, data_mount, shm_mount, *(m for _, m in scratch)],
    }  # fmt: skip
    return {
        "restartPolicy": "Never", "automountServiceAccountToken": False,
        "enableServiceLinks": False, "securityContext": TRAINER_USER, "containers": [container],
        "terminationGracePeriodSeconds": 30,
        "volumes": [
            {"name": "checkpoints", "persistentVolumeClaim": claim_source},
            data, shm, *(v for v, _ in scratch),
        ],
    }  # fmt: skip

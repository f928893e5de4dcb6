"""Renders Jobs and claims: from a job document and a manifest to Kubernetes objects. Pure.

Strategic merge, later wins: built-in pod < the install's `pod_defaults` < `spec.template` < what is
the operator's own (the container `trainer`, its document, mounts, labels, policies). Nothing here
talks to a cluster; the server's dry run of Job and Pod has the last word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtt_core.errors import Fault
from qtt_core.jobs import JobDocument
from qtt_core.ledger.events import Open, to_fields
from qtt_core.plan import CreateJob
from qtt_core.spec import TuningRun
from qtt_core.spec_rules import is_device
from qtt_operator.names import (
    ATTEMPT_LABEL,
    COMPONENT_LABEL,
    CONFIG_LABEL,
    DECISION_ANNOTATION,
    EPOCH_ANNOTATION,
    FIDELITY_LABEL,
    GROUP,
    OPEN_ANNOTATION,
    RUN_LABEL,
    RUN_UID_LABEL,
    SEQUENCE_ANNOTATION,
    TRAINER,
    checkpoint_claim,
)
from qtt_operator.settings import ClaimDefaults, OperatorSettings

Object = dict[str, Any]

DATA, WEIGHTS, CHECKPOINTS, SCRATCH = "/data", "/weights", "/checkpoints", "/scratch"
GRACE_SECONDS = 120
"""From SIGTERM to SIGKILL: the largest checkpoint must be written in between."""

USER = 10001
FINAL_CODES = (64, 65, 70)
"""Codes of the trainer that fail the Job with the code in its condition.

Not 75, which a trainer answers to SIGTERM: a Job that a queue suspends would fail instead of wait
whenever the Job controller looks between the pod's end and its removal (measured: 11 of 30). No
code starts another pod: `backoffLimit` is 0, attempts are ours.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunObject:
    """The TuningRun as Jobs need it: parsed, and its identity on the server."""

    run: TuningRun
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """One Job: the planner's order, the trainer's document and the decision behind both."""

    job: CreateJob
    name: str
    document: JobDocument
    opened: Open | None
    epoch: int


def build_job(owner: RunObject, request: JobRequest, settings: OperatorSettings) -> Object:
    """The Job of an attempt: fixed name, one pod, no retries of its own (30-kubernetes 5.2).

    It has no time to live: that comes after its result is durably recorded.
    """
    spec, labels = owner.run.spec, _labels(owner, request)
    queue = {
        f"kueue.x-k8s.io/{label}": value
        for label, value in (
            ("queue-name", spec.queue_name),
            ("priority-class", spec.workload_priority_class),
        )
        if value
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": request.name,
            "namespace": owner.run.namespace,
            "labels": labels | queue,
            "annotations": _annotations(request),
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "Ignore",  # the cluster took the pod away: one replacement
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": TRAINER,
                            "operator": "In",
                            "values": list(FINAL_CODES),
                        },
                    },
                ]
            },
            "template": {
                "metadata": _pod_metadata(owner, labels),
                "spec": build_pod_spec(owner, request, settings),
            },
        },
    }


def build_pod(job: Object) -> Object:
    """The Pod that a Job would start, for the server's dry run."""
    template = job["spec"]["template"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **template["metadata"],
            "name": f"{job['metadata']['name']}-check",
            "namespace": job["metadata"]["namespace"],
        },
        "spec": template["spec"],
    }


def owner_reference(owner: RunObject) -> Object:
    """Jobs go with their TuningRun; blocking its deletion would need rights on finalizers."""
    return {
        "apiVersion": f"{GROUP}/v1alpha1", "kind": "TuningRun", "name": owner.run.name,
        "uid": owner.uid, "controller": True, "blockOwnerDeletion": False,
    }  # fmt: skip


def build_checkpoint_claim(owner: RunObject, defaults: ClaimDefaults) -> Object | None:
    """The run's claim for checkpoints, None where the manifest names one that exists.

    Owned by the TuningRun, and so deleted with it, only under `deletionPolicy: Delete`.
    """
    checkpoint = owner.run.spec.checkpoint
    if checkpoint is not None and checkpoint.claim_name:
        return None
    template = checkpoint.volume_claim_template if checkpoint is not None else None
    metadata: Object = {
        "name": checkpoint_claim(owner.run.name),
        "namespace": owner.run.namespace,
        "labels": {RUN_LABEL: owner.run.name, RUN_UID_LABEL: owner.uid, **_MANAGED},
    }
    if owner.run.spec.deletion_policy == "Delete":
        metadata["ownerReferences"] = [owner_reference(owner)]
    spec = dict(template) if template else _claim_spec(defaults)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": spec,
    }


def _claim_spec(defaults: ClaimDefaults) -> Object:
    spec: Object = {
        "accessModes": list(defaults.accessModes),
        "resources": {"requests": {"storage": defaults.size}},
    }
    if defaults.storageClassName is not None:
        spec["storageClassName"] = defaults.storageClassName
    return spec


# --- the pod --------------------------------------------------------------------------------------


def build_pod_spec(owner: RunObject, request: JobRequest, settings: OperatorSettings) -> Object:
    """The pod of a Job, merged from all four sources."""
    template = owner.run.spec.template.get("spec") or {}
    pod = merge(merge(_built_in_pod(settings), settings.pod_defaults), template)
    if request.job.kind != "step":
        _without_devices(pod)
    pod = merge(pod, _owned_pod(owner, request, settings))
    trainer = _container(pod, TRAINER)
    if not owner.run.spec.trainer.custom:
        trainer.pop("command", None)
    return pod


def _built_in_pod(settings: OperatorSettings) -> Object:
    return {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "enableServiceLinks": False,  # a Service called redis would inject REDIS_PORT=tcp://…
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": TRAINER,
                "image": settings.trainer_image,
                "env": [
                    {"name": "HOME", "value": f"{SCRATCH}/home"},
                    {"name": "HF_HUB_OFFLINE", "value": "1"},
                ],
                "securityContext": {
                    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "volumes": [
            {"name": "scratch", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }  # fmt: skip


def _owned_pod(owner: RunObject, request: JobRequest, settings: OperatorSettings) -> Object:
    """What no template may change."""
    document = json.dumps(request.document.to_json(), separators=(",", ":"))
    pod: Object = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "containers": [
            {
                "name": TRAINER,
                "args": [request.job.kind],
                "env": [{"name": "QTT_STEP", "value": document}],
                "terminationMessagePath": "/dev/termination-log",
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": _mounts(owner),
            }
        ],
        "volumes": _volumes(owner),
    }
    if request.document.limits.wall_s is not None:
        pod["activeDeadlineSeconds"] = math.ceil(request.document.limits.wall_s) + 2 * GRACE_SECONDS
    if _shares_one_node(owner, settings):
        pod["affinity"] = _same_node(owner.uid)
    return pod


def _mounts(owner: RunObject) -> list[Object]:
    spec = owner.run.spec
    data: Object = {"name": "dataset", "mountPath": DATA, "readOnly": True}
    if spec.dataset.path:
        data["subPath"] = spec.dataset.path
    below = f"{spec.checkpoint.sub_path}/" if spec.checkpoint and spec.checkpoint.sub_path else ""
    folder = f"runs/{owner.uid}"
    mounts = [
        data,
        {
            "name": "checkpoints",
            "mountPath": f"{CHECKPOINTS}/{folder}",
            "subPath": f"{below}{folder}",
        },
        {"name": "scratch", "mountPath": SCRATCH},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  # inside the pod: an emptyDir
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    if spec.weights.claim_name:
        mounts.append({"name": "weights", "mountPath": WEIGHTS, "readOnly": True})
    return mounts


def _volumes(owner: RunObject) -> list[Object]:
    spec = owner.run.spec
    own = spec.checkpoint.claim_name if spec.checkpoint else None
    claims = [
        ("dataset", spec.dataset.claim_name, True),
        ("checkpoints", own or checkpoint_claim(owner.run.name), False),
        *([("weights", spec.weights.claim_name, True)] if spec.weights.claim_name else []),
    ]
    return [
        {
            "name": name,
            "persistentVolumeClaim": {"claimName": claim, **({"readOnly": True} if fixed else {})},
        }
        for name, claim, fixed in claims
    ]


def _shares_one_node(owner: RunObject, settings: OperatorSettings) -> bool:
    """Whether all pods of the run mount one claim that only one node can have."""
    checkpoint = owner.run.spec.checkpoint
    if checkpoint is not None and checkpoint.claim_name:
        return False  # whose claim it is knows what it can do; the template may say more
    template = checkpoint.volume_claim_template if checkpoint is not None else None
    modes = template["accessModes"] if template else settings.checkpoint_defaults.accessModes
    return "ReadWriteMany" not in modes


def _same_node(uid: str) -> Object:
    """The first pod is admitted by matching itself; the scheduler does the rest."""
    term = {
        "labelSelector": {"matchLabels": {RUN_UID_LABEL: uid}},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _without_devices(pod: Object) -> None:
    """Reading a data set or scoring needs no accelerator."""
    resources = _container(pod, TRAINER).get("resources") or {}
    for kind in ("limits", "requests"):
        if kind in resources:
            kept = {name: q for name, q in resources[kind].items() if not is_device(name)}
            resources[kind] = kept


def _container(pod: Object, name: str) -> Object:
    found: Object = next(c for c in pod["containers"] if c["name"] == name)
    return found


# --- labels and annotations -----------------------------------------------------------------------

_MANAGED = {
    "app.kubernetes.io/name": "quicktune-step",
    "app.kubernetes.io/managed-by": "quicktune-operator",
}


def _labels(owner: RunObject, request: JobRequest) -> dict[str, str]:
    return {
        **_MANAGED,
        COMPONENT_LABEL: request.job.kind,
        RUN_LABEL: owner.run.name,
        RUN_UID_LABEL: owner.uid,
        CONFIG_LABEL: request.job.c,
        FIDELITY_LABEL: str(request.job.to),
        ATTEMPT_LABEL: str(request.job.attempt),
    }


def _annotations(request: JobRequest) -> dict[str, str]:
    """The whole decision: a store that lost its tail is told again from here."""
    annotations = {EPOCH_ANNOTATION: str(request.epoch)}
    if request.opened is not None:
        annotations |= {
            DECISION_ANNOTATION: request.opened.h,
            OPEN_ANNOTATION: json.dumps(to_fields(request.opened), sort_keys=True),
            SEQUENCE_ANNOTATION: request.opened.id,
        }
    return annotations


def _pod_metadata(owner: RunObject, labels: Mapping[str, str]) -> Object:
    given = owner.run.spec.template.get("metadata") or {}
    return {
        "labels": {**(given.get("labels") or {}), **labels},
        "annotations": {
            "sidecar.istio.io/inject": "false",  # a proxy outlives the trainer and the Job hangs
            **(given.get("annotations") or {}),
        },
    }


# --- merging --------------------------------------------------------------------------------------

_KEYED = {
    "containers": "name", "initContainers": "name", "env": "name", "volumes": "name",
    "imagePullSecrets": "name", "volumeMounts": "mountPath",
}  # fmt: skip
_DEEP = frozenset({"containers", "initContainers"})
"""Lists whose members are merged; an environment variable, a volume or a mount has one source."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Object:
    """A strategic merge of pod specs: maps deeply, lists of named things by name, null removes.

    Tolerations are appended; every other list is replaced.
    """
    merged: Object = {key: _copy(value) for key, value in base.items()}
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        elif key in _KEYED and isinstance(merged.get(key), list):
            merged[key] = _merge_named(merged[key], value, _KEYED[key], deep=key in _DEEP)
        elif key == "tolerations" and isinstance(merged.get(key), list):
            merged[key] += [_copy(item) for item in value if item not in merged[key]]
        else:
            merged[key] = _copy(value)
    return merged


def _merge_named(
    base: Sequence[Object], over: Sequence[Object], key: str, *, deep: bool
) -> list[Object]:
    merged = {item.get(key): item for item in base}
    for item in over:
        known = merged.get(item.get(key), {}) if deep else {}
        merged[item.get(key)] = merge(known, item)
    return list(merged.values())


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


# --- what a template may not ask for --------------------------------------------------------------


def refused(run: TuningRun, settings: OperatorSettings) -> list[Fault]:
    """What the pod of this run asks for and the install does not allow."""
    pod = run.spec.template.get("spec") or {}
    return list(_refused(pod, settings))


def _refused(pod: Mapping[str, Any], settings: OperatorSettings) -> Iterator[Fault]:
    root = "spec.template.spec"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield Fault(f"{root}.{name}", pod[name], "is not allowed")
    account = pod.get("serviceAccountName") or pod.get("serviceAccount")
    if account and account not in settings.allowed_service_accounts:
        yield Fault(f"{root}.serviceAccountName", account, "is not allowed by this install")
    for volume in pod.get("volumes") or ():
        if "hostPath" in volume and not settings.allow_host_path:
            yield Fault(f"{root}.volumes[{volume.get('name')}]", "hostPath", "is not allowed")
        if any(
            "serviceAccountToken" in s for s in (volume.get("projected") or {}).get("sources", ())
        ):
            yield Fault(f"{root}.volumes[{volume.get('name')}]", "a token", "is not allowed")
    for container in [*(pod.get("containers") or ()), *(pod.get("initContainers") or ())]:
        if (container.get("securityContext") or {}).get("privileged"):
            yield Fault(
                f"{root}.containers[{container.get('name')}]", "privileged", "is not allowed"
            )
    extra = [c.get("name") for c in pod.get("containers") or () if c.get("name") != TRAINER]
    if extra:
        remedy = "a second container keeps the pod alive; use initContainers, restartPolicy Always"
        yield Fault(f"{root}.containers", extra, remedy)

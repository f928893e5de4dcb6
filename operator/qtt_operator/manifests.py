"""Renders Jobs: from a job document and a manifest to a Kubernetes object. Pure.

The pod inside is `pods`' work, claims are `claims`'. Nothing here talks to a cluster; the server's
dry run of Job and Pod has the last word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from qtt_core.ledger.events import to_fields
from qtt_operator.names import (
    ATTEMPT_LABEL,
    CHORES,
    COMPONENT_LABEL,
    CONFIG_LABEL,
    DECISION_ANNOTATION,
    EPOCH_ANNOTATION,
    FETCHES,
    FIDELITY_LABEL,
    OPEN_ANNOTATION,
    SEQUENCE_ANNOTATION,
    TRAINER,
)
from qtt_operator.owner import Object, RunObject, owner_labels, owner_reference
from qtt_operator.pods import JobRequest, build_pod_spec
from qtt_operator.settings import OperatorSettings

FINAL_CODES = (64, 65, 70)
"""Codes of the trainer that fail the Job with the code in its condition.

Not 75, which a trainer answers to SIGTERM: a Job that a queue suspends would fail instead of wait
whenever the Job controller looks between the pod's end and its removal (measured: 11 of 30). No
code starts another pod: `backoffLimit` is 0, attempts are ours.
"""


def build_job(owner: RunObject, request: JobRequest, settings: OperatorSettings) -> Object:
    """The Job of an attempt: fixed name, one pod, no retries of its own (30-kubernetes 5.2).

    It has no time to live: that comes after its result is durably recorded.
    """
    labels = _labels(owner, request)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": request.name,
            "namespace": owner.run.namespace,
            "labels": labels | _queue(owner, request),
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


def _labels(owner: RunObject, request: JobRequest) -> dict[str, str]:
    """Chores belong to no decision: without its three labels the planner does not see them."""
    labels = {**owner_labels(owner), COMPONENT_LABEL: request.job.kind}
    if request.job.kind in CHORES:
        return labels
    return {
        **labels,
        CONFIG_LABEL: request.job.c,
        FIDELITY_LABEL: str(request.job.to),
        ATTEMPT_LABEL: str(request.job.attempt),
    }


def _queue(owner: RunObject, request: JobRequest) -> dict[str, str]:
    """Kueue's labels, for the Job only. Who takes no device for sure waits in no queue."""
    spec = owner.run.spec
    labels = (("queue-name", spec.queue_name), ("priority-class", spec.workload_priority_class))
    if request.job.kind in {*CHORES, FETCHES}:
        return {}
    return {f"kueue.x-k8s.io/{label}": value for label, value in labels if value}


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

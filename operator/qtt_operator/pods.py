"""Renders the pod of a Job: what runs, what it mounts, where it may be. Pure.

Strategic merge, later wins: built-in pod < the install's `pod_defaults` < `spec.template` < what is
the operator's own (the container `trainer`, its document, its mounts).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qtt_core.jobs import JobDocument
from qtt_core.ledger.events import Open
from qtt_core.plan import CreateJob
from qtt_core.spec_rules import is_device
from qtt_operator.claims import claim_name, is_on_one_node, is_per_config
from qtt_operator.lessons import avoid, enlarge
from qtt_operator.merging import merge
from qtt_operator.names import CHORES, FETCHES, RUN_UID_LABEL, TRAINER
from qtt_operator.owner import Object, RunObject
from qtt_operator.settings import OperatorSettings
from qtt_operator.supplies import ties_to_one_node

DATA, WEIGHTS, CHECKPOINTS, SCRATCH = "/data", "/weights", "/checkpoints", "/scratch"
GRACE_SECONDS = 120
"""From SIGTERM to SIGKILL: the largest checkpoint must be written in between."""

USER = 10001
CHORE_RESOURCES = {
    "requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "512Mi"},
}  # fmt: skip
RESOURCES = dict.fromkeys((*CHORES, FETCHES), CHORE_RESOURCES)
"""Of a Job that fetches, reads or deletes files: it must find room beside any step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """One Job: the planner's order, the trainer's document and the decision behind both."""

    job: CreateJob
    name: str
    document: JobDocument
    opened: Open | None
    epoch: int
    weights: str = ""
    """The claim of pretrained weights, where the manifest names none."""
    volumes: tuple[str, ...] = ()
    """Scope Config: configurations whose claims a chore mounts; the others follow from the job."""


def build_pod_spec(owner: RunObject, request: JobRequest, settings: OperatorSettings) -> Object:
    """The pod of a Job, merged from all four sources."""
    template = owner.run.spec.template.get("spec") or {}
    pod = merge(merge(_built_in_pod(settings), settings.pod_defaults), template)
    if request.job.kind not in {"step", "evaluate"}:
        _without_devices(pod)
    pod = merge(pod, _owned_pod(owner, request, settings))
    trainer = _container(pod, TRAINER)
    if request.job.memory_factor > 1:
        enlarge(trainer, request.job.memory_factor)
    avoid(pod, request.job.avoid_nodes, must=not _is_tied(owner, request, settings))
    if request.job.kind in RESOURCES:
        trainer["resources"] = RESOURCES[request.job.kind]
        if owner.run.spec.trainer.custom:
            trainer["image"] = settings.trainer_image  # whose trainer knows no such command
    elif owner.run.spec.trainer.custom:
        return pod
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
    places = list(_places(owner, request))
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
                "volumeMounts": [*(place.mount() for place in places), *_SCRATCH_MOUNTS],
            }
        ],
        "volumes": list({place.name: place.volume() for place in places}.values()),
    }
    if request.document.limits.wall_s is not None:
        pod["activeDeadlineSeconds"] = math.ceil(request.document.limits.wall_s) + 2 * GRACE_SECONDS
    if request.job.kind == FETCHES:
        pod["containers"][0]["env"] += _way_out(settings)
    if _is_tied(owner, request, settings):
        pod["affinity"] = _same_node(owner.uid)
    return pod


def _is_tied(owner: RunObject, request: JobRequest, settings: OperatorSettings) -> bool:
    """Whether all pods of the run must be on one node, for a volume that no other node has."""
    return is_on_one_node(owner.run.spec, settings.checkpoint_defaults) or ties_to_one_node(
        owner.run, request.weights, settings
    )


def _way_out(settings: OperatorSettings) -> list[Object]:
    endpoint = settings.weights_endpoint
    return [
        {"name": "HF_HUB_OFFLINE", "value": "0"},
        *([{"name": "HF_ENDPOINT", "value": endpoint}] if endpoint else []),
    ]


# --- what is mounted ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A claim at a path; an empty claim is an emptyDir. `fixed`: the whole volume is read-only."""

    name: str
    claim: str
    path: str
    sub: str = ""
    read_only: bool = False
    fixed: bool = False

    def mount(self) -> Object:
        mount: Object = {"name": self.name, "mountPath": self.path}
        if self.sub:
            mount["subPath"] = self.sub
        return {**mount, "readOnly": True} if self.read_only else mount

    def volume(self) -> Object:
        if not self.claim:
            return {"name": self.name, "emptyDir": {}}
        source = {"claimName": self.claim, **({"readOnly": True} if self.fixed else {})}
        return {"name": self.name, "persistentVolumeClaim": source}


_SCRATCH_MOUNTS = (
    {"name": "scratch", "mountPath": SCRATCH},
    {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  # inside the pod: an emptyDir
    {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
)


def _places(owner: RunObject, request: JobRequest) -> Iterator[_Place]:
    """Data and weights for whoever reads images; checkpoints for all but who fetches weights."""
    spec, kind = owner.run.spec, request.job.kind
    weights = spec.weights.claim_name or request.weights
    if kind == FETCHES:
        yield _Place(name="weights", claim=weights, path=WEIGHTS)
        return
    if kind not in CHORES:
        claim, path = spec.dataset.claim_name, spec.dataset.path
        other = request.job.evaluation
        if other is not None and other.claim:
            claim, path = other.claim, other.path
        yield _Place(name="dataset", claim=claim, path=DATA, sub=path, read_only=True, fixed=True)
    yield from _checkpoints(owner, request)
    if kind not in CHORES and weights:
        yield _Place(name="weights", claim=weights, path=WEIGHTS, read_only=True, fixed=True)


def _checkpoints(owner: RunObject, request: JobRequest) -> Iterator[_Place]:
    """The run's folder, and no other run's: `runs/<uid>` of its claim.

    Scope Config: a step and `garbage` have one configuration's claim; what reads many finds each
    below a folder of its own; `prepare` answers by its message and keeps nothing.
    """
    spec, kind = owner.run.spec, request.job.kind
    below = f"{spec.checkpoint.sub_path}/" if spec.checkpoint and spec.checkpoint.sub_path else ""
    folder, read_only = f"runs/{owner.uid}", kind in {"evaluate", "recovery"}
    path = f"{CHECKPOINTS}/{folder}"
    if request.document.gc == (".",):  # the whole run: its folder goes too, not its contents only
        path, folder = f"{CHECKPOINTS}/runs", "runs"
    if not is_per_config(spec):
        yield _Place(
            name="checkpoints", claim=claim_name(owner), path=path, sub=f"{below}{folder}",
            read_only=read_only,
        )  # fmt: skip
        return
    volumes = _volumes(request)
    if len(volumes) == 1 and not read_only:
        claim = claim_name(owner, volumes[0])
        yield _Place(name="checkpoints", claim=claim, path=path, sub=folder)
        return
    yield _Place(name="checkpoints", claim="", path=path)
    for c in volumes:
        yield _Place(
            name=f"c{c}", claim=claim_name(owner, c), path=f"{path}/c{c}", sub=f"{folder}/c{c}",
            read_only=True,
        )  # fmt: skip
    if volumes and kind == "evaluate":
        yield _Place(
            name=f"c{volumes[0]}", claim=claim_name(owner, volumes[0]),
            path=f"{path}/dataset.json", sub=f"{folder}/dataset.json", read_only=True,
        )  # fmt: skip


def _volumes(request: JobRequest) -> tuple[str, ...]:
    """Scope Config: the configurations whose claims a Job mounts."""
    if request.job.evaluation is not None:
        folders = (path.split("/", 1)[0] for path in request.job.evaluation.checkpoints)
        return tuple(dict.fromkeys(folder.removeprefix("c") for folder in folders))
    return (request.job.c,) if request.job.kind == "step" else request.volumes


def _same_node(uid: str) -> Object:
    """The first pod is admitted by matching itself; the scheduler does the rest."""
    term = {
        "labelSelector": {"matchLabels": {RUN_UID_LABEL: uid}},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


# --- parts ----------------------------------------------------------------------------------------


def _without_devices(pod: Object) -> None:
    """Reading or deleting files needs no accelerator."""
    resources = _container(pod, TRAINER).get("resources") or {}
    for kind in ("limits", "requests"):
        if kind in resources:
            kept = {name: q for name, q in resources[kind].items() if not is_device(name)}
            resources[kind] = kept


def _container(pod: Mapping[str, Any], name: str) -> Object:
    found: Object = next(c for c in pod["containers"] if c["name"] == name)
    return found

"""From a Job and its Pods to what the planner sees: queued, pending, running, or an end. Pure.

The end of a step is the `trainer` container's terminated state, not the Job's condition (a second
later) nor the pod's phase (sidecars). Kubernetes replaces a disrupted pod by itself, once; a Job
that was suspended by anybody waits, and its deleted pod is no end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from qtt_core.plan import JobEnd, JobPhase, ObservedJob
from qtt_operator.names import (
    ATTEMPT_LABEL,
    COMPONENT_LABEL,
    CONFIG_LABEL,
    FIDELITY_LABEL,
    HELD_ANNOTATION,
    SUSPENDED_ANNOTATION,
    TRAINER,
)

Object = Mapping[str, Any]

MAX_DISRUPTIONS = 2
"""Replacements back off and double; from the second disruption a new attempt is quicker."""

ATTACH_SECONDS = 60.0
"""A volume that takes longer than this to be attached is worth a word."""

UNREAD_SECONDS = 10.0
"""A finished Job whose pod we have not seen end: the two watches are not in step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What this process knows of a Job beyond the two objects; times by our clock, seconds.

    `pending_since`, `running_since`: when we first saw it wait for a node or an image, and run.
    `finished_since`: when we first saw the Job finished without a pod that ended. `killed`: why we
    are ending it, empty if we are not. `past_seconds`: device time of pods that are gone.
    """

    now: float
    pending_since: float | None = None
    running_since: float | None = None
    finished_since: float | None = None
    killed: str = ""
    past_seconds: float = 0.0
    node_lost_grace: float = 300.0


def observed_job(job: Object, pods: Sequence[Object], sight: Sight) -> ObservedJob | None:
    """The planner's view of a Job; None for one that carries no decision."""
    labels = job["metadata"].get("labels") or {}
    c, to, attempt = (labels.get(name) for name in (CONFIG_LABEL, FIDELITY_LABEL, ATTEMPT_LABEL))
    if c is None or to is None or attempt is None:
        return None
    end = job_end(job, pods, sight)
    running = any(started_at(pod) is not None and terminated(pod) is None for pod in pods)
    phase = JobPhase.ENDED if end is not None else _phase(job, running=running)
    return ObservedJob(
        name=job["metadata"]["name"],
        kind=str(labels.get(COMPONENT_LABEL, "step")),
        c=c, to=int(to), attempt=int(attempt),
        phase=phase,
        created_at=seconds(job["metadata"].get("creationTimestamp")) or 0.0,
        started_at=sight.running_since if running else None,
        pending_since=sight.pending_since if phase is JobPhase.PENDING else None,
        put_aside=phase is JobPhase.QUEUED and is_ours_to_resume(job),
        end=end,
    )  # fmt: skip


def _phase(job: Object, *, running: bool) -> JobPhase:
    if is_suspended(job):
        return JobPhase.QUEUED
    return JobPhase.RUNNING if running else JobPhase.PENDING


def job_end(job: Object, pods: Sequence[Object], sight: Sight) -> JobEnd | None:
    """How the attempt ended, None while it has not. First match wins."""
    pods = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
    last = pods[-1] if pods else None
    if last is not None and (state := terminated(last)) is not None:
        # a pod that somebody is deleting ends the attempt only if the Job takes it as its failure
        final = state.get("exitCode") == 0 or finished(job) or not is_deleting(last)
        if final and not (is_disrupted(last) and state.get("exitCode") != 0):
            return _container_end(job, pods, last, state, sight)
    if last is not None and is_lost(last, sight):
        return _other_end(job, pods, "NodeLost", "its node has gone away", sight)
    # a server too old for pod failure policies fails the Job of a disrupted pod at once
    final = sum(map(is_disrupted, pods)) >= MAX_DISRUPTIONS or finished(job)
    if last is not None and is_disrupted(last) and final:
        return _other_end(job, pods, "Evicted", _disruption(last), sight)
    if finished(job) and _waited(sight):
        return _other_end(job, pods, *_why_finished(job, last), sight)
    return None


def vanished(job: Object, pods: Sequence[Object], sight: Sight) -> JobEnd:
    """The end of a Job that was deleted, by us (`killed` says why) or by somebody else.

    What its trainer managed to say still counts.
    """
    pods = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
    state = terminated(pods[-1]) if pods else None
    reason = sight.killed or "Vanished"
    if state is None:
        return _other_end(job, pods, reason, "the Job was deleted", sight)
    end = _container_end(job, pods, pods[-1], state, sight)
    return replace(end, reason=reason)


def needs_deletion(job: Object, pods: Sequence[Object]) -> bool:
    """Whether a Job whose end is recorded would otherwise live on and start another pod."""
    last = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")), default=None)
    return not finished(job) and (last is None or terminated(last) is None or is_disrupted(last))


# --- facts of one object --------------------------------------------------------------------------


def finished(job: Object) -> bool:
    """Whether Kubernetes will start no further pod for this Job."""
    kinds = {"Complete", "Failed", "FailureTarget", "SuccessCriteriaMet"}
    return any(c["type"] in kinds and c["status"] == "True" for c in _conditions(job))


def has_condition(found: Object, kind: str) -> bool:
    """Whether a condition is there and True."""
    return any(c["type"] == kind and c["status"] == "True" for c in _conditions(found))


def is_ours_to_resume(job: Object) -> bool:
    """Whether it was we who suspended the Job."""
    return is_suspended(job) and SUSPENDED_ANNOTATION in (job["metadata"].get("annotations") or {})


def past_seconds(job: Object) -> float:
    """Device time of pods that are gone, as the Job remembers it."""
    notes = job["metadata"].get("annotations") or {}
    try:
        return float(notes.get(HELD_ANNOTATION, 0.0))
    except ValueError:
        return 0.0


def is_suspended(job: Object) -> bool:
    """Whether a queue, or anybody, holds the Job back."""
    return bool((job.get("spec") or {}).get("suspend"))


def is_deleting(found: Object) -> bool:
    """Whether the object is on its way out."""
    return "deletionTimestamp" in found["metadata"]


def is_disrupted(pod: Object) -> bool:
    """Whether the cluster took the pod away: eviction, preemption, drain, taint."""
    return any(c["type"] == "DisruptionTarget" and c["status"] == "True" for c in _conditions(pod))


def is_lost(pod: Object, sight: Sight) -> bool:
    """Whether a pod should have ended long ago and nobody can tell that it did."""
    due = seconds(pod["metadata"].get("deletionTimestamp"))
    return due is not None and sight.now - due > sight.node_lost_grace and terminated(pod) is None


def trainer_state(pod: Object) -> Mapping[str, Any]:
    """The trainer container's state, {} before the kubelet knows it."""
    for status in (pod.get("status") or {}).get("containerStatuses") or ():
        if status["name"] == TRAINER:
            state: Mapping[str, Any] = status.get("state") or {}
            return state
    return {}


def terminated(pod: Object) -> Mapping[str, Any] | None:
    """How the trainer container ended, None while it has not."""
    return trainer_state(pod).get("terminated")


def started_at(pod: Object) -> float | None:
    """When the trainer container started, by its node's clock."""
    state = trainer_state(pod)
    return seconds((state.get("running") or state.get("terminated") or {}).get("startedAt"))


def held_seconds(pod: Object, now: float) -> float:
    """Device time of one pod: from its trainer's start to its end, or to now."""
    start = started_at(pod)
    if start is None:
        return 0.0
    end = seconds((terminated(pod) or {}).get("finishedAt"))
    return max(0.0, (now if end is None else end) - start)


def waiting_reason(pod: Object, now: float = 0.0) -> tuple[str, str]:
    """Why a pod does not run yet: (reason of the condition Progressing, message) or ("", "").

    `now`: seconds since 1970. A node mounts the volumes before it makes the pod's sandbox; one that
    has none a minute after the pod was given to it waits for a volume.
    """
    for condition in _conditions(pod):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return "Unschedulable", str(condition.get("message", ""))
    waiting = trainer_state(pod).get("waiting") or {}
    reason, message = str(waiting.get("reason", "")), str(waiting.get("message", ""))
    if reason in {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}:
        return "ImagePull", f"{reason}: {message}"
    if reason and reason not in {"ContainerCreating", "PodInitializing"}:
        return "Unschedulable", f"{reason}: {message}"
    given = _given_at(pod)
    if given is not None and now - given > ATTACH_SECONDS and _has_no_sandbox(pod):
        words = f"pod {pod['metadata']['name']}: its volumes are not attached to node {_node(pod)}"
        return "VolumeAttach", f"{words}; another node may hold one of them (kubectl describe pod)"
    return "", ""


def waits_since(pod: Object) -> float | None:
    """Since when a pod that has not started was there; None for one that has."""
    if started_at(pod) is not None:
        return None
    return seconds(pod["metadata"].get("creationTimestamp"))


def _given_at(pod: Object) -> float | None:
    """When the scheduler gave a pod to its node."""
    for condition in _conditions(pod):
        if condition["type"] == "PodScheduled" and condition["status"] == "True":
            return seconds(condition.get("lastTransitionTime"))
    return None


def _has_no_sandbox(pod: Object) -> bool:
    """Whether the kubelet says so; a server that does not know the condition says nothing."""
    return any(
        c["type"] == "PodReadyToStartContainers" and c["status"] == "False"
        for c in _conditions(pod)
    )


def seconds(text: object) -> float | None:
    """A timestamp of the API as seconds since 1970."""
    if not isinstance(text, str) or not text:
        return None
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


# --- how an end is told ---------------------------------------------------------------------------


def _container_end(
    job: Object, pods: Sequence[Object], pod: Object, state: Mapping[str, Any], sight: Sight
) -> JobEnd:
    held, queued = _times(job, pods, sight)
    return JobEnd(
        exit_code=state.get("exitCode"),
        signal=state.get("signal"),
        message=str(state.get("message") or ""),
        reason=sight.killed or _reason(pod, state),
        node=_node(pod),
        device_seconds=held,
        queue_seconds=queued,
        waits=waits(job, pod),
        ended_at=seconds(state.get("finishedAt")),
    )


def waits(job: Object, pod: Object) -> dict[str, float]:
    """What an attempt waited for -> seconds, each from the API server's and the node's own times.

    Queue: until its last pod was made; schedule: until that had a node; pull: until its trainer
    started, images and volumes included.
    """
    marks = {
        "": seconds(job["metadata"].get("creationTimestamp")),
        "queue": seconds(pod["metadata"].get("creationTimestamp")),
        "schedule": _since(pod, "PodScheduled"),
        "pull": started_at(pod),
    }
    found, last = {}, marks.pop("")
    for name, mark in marks.items():
        if last is not None and mark is not None:
            found[name] = max(0.0, mark - last)
        last = last if mark is None else mark
    return found


def _since(found: Object, kind: str) -> float | None:
    for condition in _conditions(found):
        if condition["type"] == kind and condition["status"] == "True":
            return seconds(condition.get("lastTransitionTime"))
    return None


def _reason(pod: Object, state: Mapping[str, Any]) -> str:
    """Our word for what the kubelet saw, empty where the exit code says it all."""
    status = pod.get("status") or {}
    if state.get("reason") == "OOMKilled":
        return "OOMKilled"
    if status.get("reason") in {"Evicted", "NodeLost", "DeadlineExceeded"}:
        return str(status["reason"])
    return "Evicted" if is_disrupted(pod) else ""


def _other_end(
    job: Object, pods: Sequence[Object], reason: str, message: str, sight: Sight
) -> JobEnd:
    node = _node(pods[-1]) if pods else ""
    held, queued = _times(job, pods, sight)
    return JobEnd(
        exit_code=None, reason=reason, message=message, node=node,
        device_seconds=held, queue_seconds=queued,
    )  # fmt: skip


def _times(job: Object, pods: Sequence[Object], sight: Sight) -> tuple[float, float]:
    """Device time of all pods, and the rest of the Job's life as time in the queue."""
    held = sight.past_seconds + sum(held_seconds(pod, sight.now) for pod in pods)
    created = seconds(job["metadata"].get("creationTimestamp")) or sight.now
    ends = [seconds((terminated(pod) or {}).get("finishedAt")) for pod in pods]
    last = max([end for end in ends if end is not None], default=sight.now)
    return held, max(0.0, last - created - held)


def _why_finished(job: Object, last: Object | None) -> tuple[str, str]:
    """Reason and words for a finished Job whose trainer nobody saw end."""
    status = (last or {}).get("status") or {}
    if status.get("reason"):
        return "Vanished", f"{status['reason']}: {status.get('message', '')}"
    failed = [c for c in _conditions(job) if c["type"] == "Failed" and c["status"] == "True"]
    words = failed[0] if failed else {}
    return "Vanished", f"its pod is gone: {words.get('reason', '')} {words.get('message', '')}"


def _disruption(pod: Object) -> str:
    for condition in _conditions(pod):
        if condition["type"] == "DisruptionTarget":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return ""


def _waited(sight: Sight) -> bool:
    return sight.finished_since is not None and sight.now - sight.finished_since >= UNREAD_SECONDS


def _node(pod: Object) -> str:
    return str((pod.get("spec") or {}).get("nodeName") or "")


def _conditions(found: Object) -> Sequence[Mapping[str, Any]]:
    return (found.get("status") or {}).get("conditions") or ()

"""An API server, Job controller and kubelet in memory, stepped by hand: `cluster.Cluster`'s calls.

Objects have resource versions, watches replay from a version and can be compacted (410), a dry run
stores nothing, deletions take pods with them. `step` lets the controllers do one thing to each Job.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

from qtt_core.errors import ClusterError, ClusterUnavailableError
from qtt_core.jobs import JobDocument, parse_job
from qtt_core.results import EXIT_CODES, State, StepResult
from qtt_core.testing.trainer import Volume, result_of
from qtt_operator.cluster import PODS, RUNS, Object, Resource
from qtt_operator.cluster_backend import JOB_OF_POD

Key = tuple[str, str, str]


def document_of(found: Object) -> tuple[str, JobDocument]:
    """Command and job document of a Job or a Pod."""
    spec = found["spec"].get("template", found)["spec"]
    trainer = next(c for c in spec["containers"] if c["name"] == "trainer")
    raw = next(e["value"] for e in trainer["env"] if e["name"] == "QTT_STEP")
    command = trainer["args"][0]
    return command, parse_job(json.loads(raw), command=command)


class FakeCluster:
    """`answer(pod)` is (exit code, message) of a pod's trainer, None while it runs on."""

    def __init__(self) -> None:
        self.objects: dict[Key, Object] = {
            ("persistentvolumeclaims", "default", "data"): {
                "metadata": {"name": "data", "namespace": "default", "uid": "claim"}
            }
        }
        self.version = 100
        self.log: list[tuple[int, str, str, Object]] = []
        self.compacted = 0
        self.watchers: list[tuple[Resource, asyncio.Queue[Object | None]]] = []
        self.faults: list[tuple[str, str, int]] = []
        """(verb, plural, HTTP status) of calls to refuse, each once; status 0: unreachable."""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.volume = Volume()
        self.answer: Callable[[Object], tuple[int, str] | None] = self.succeed
        self.rejects_pods = ""
        self.now = lambda: datetime.now(UTC)

    # --- the calls ---------------------------------------------------------------------------

    async def get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        self._refuse("GET", resource)
        found = self.objects.get((resource.plural, namespace, name))
        return copy.deepcopy(found)

    async def page(
        self, resource: Resource, namespace: str, *, selector: str, limit: int, token: str = ""
    ) -> Object:
        self._refuse("LIST", resource)
        items = [
            found
            for (plural, where, _), found in sorted(self.objects.items())
            if plural == resource.plural and namespace in {"", where} and _has(found, selector)
        ]
        start = int(token or 0)
        rest = len(items) - start - limit
        meta = {"resourceVersion": str(self.version)}
        if rest > 0:
            meta["continue"] = str(start + limit)
        return {"metadata": meta, "items": copy.deepcopy(items[start : start + limit])}

    async def create(
        self, resource: Resource, namespace: str, body: Object, *, dry_run: bool = False
    ) -> Object:
        self._refuse("DRYRUN" if dry_run else "POST", resource)
        key = (resource.plural, namespace, body["metadata"]["name"])
        if resource == PODS and self.rejects_pods:
            raise ClusterError(self.rejects_pods, status=403)
        if key in self.objects:
            raise ClusterError(f"{key} exists", status=409, reason="AlreadyExists")
        found = copy.deepcopy(body)
        found["metadata"] |= {"uid": uuid.uuid4().hex, "creationTimestamp": self._time()}
        found["metadata"].setdefault("generation", 1)
        return found if dry_run else copy.deepcopy(self._put("ADDED", resource.plural, found))

    async def replace(self, resource: Resource, namespace: str, body: Object) -> Object:
        self._refuse("PUT", resource)
        known = self.objects.get((resource.plural, namespace, body["metadata"]["name"]))
        stale = known is None or (
            known["metadata"]["resourceVersion"] != body["metadata"].get("resourceVersion")
        )
        if stale:
            raise ClusterError("the object has been modified", status=409, reason="Conflict")
        return copy.deepcopy(self._put("MODIFIED", resource.plural, copy.deepcopy(body)))

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Object, *, sub: str = ""
    ) -> Object | None:
        self._refuse("PATCH", resource)
        known = self.objects.get((resource.plural, namespace, name))
        if known is None:
            return None
        given = body.get("metadata", {}).get("resourceVersion")
        if given is not None and given != known["metadata"]["resourceVersion"]:
            raise ClusterError("the object has been modified", status=409, reason="Conflict")
        found = _merge(known, body)
        if not sub and "spec" in body:
            found["metadata"]["generation"] = known["metadata"].get("generation", 1) + 1
        stored = copy.deepcopy(self._put("MODIFIED", resource.plural, found))
        leaving = "deletionTimestamp" in found["metadata"] and resource == RUNS
        if leaving and not found["metadata"].get("finalizers"):
            self.remove(found, resource.plural)
        return stored

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, foreground: bool
    ) -> None:
        self._refuse("DELETE", resource)
        known = self.objects.get((resource.plural, namespace, name))
        if known is not None and known["metadata"]["uid"] == uid:
            self.remove(known, resource.plural)

    @contextlib.asynccontextmanager
    async def watch(
        self, resource: Resource, namespace: str, *, selector: str, version: str, seconds: int
    ) -> AsyncIterator[AsyncIterator[Object]]:
        self._refuse("WATCH", resource)
        if int(version) < self.compacted:
            raise ClusterError("too old resource version", status=410, reason="Expired")
        queue: asyncio.Queue[Object | None] = asyncio.Queue()
        for at, kind, plural, found in self.log:
            if plural == resource.plural and at > int(version) and _has(found, selector):
                queue.put_nowait({"type": kind, "object": copy.deepcopy(found)})
        self.watchers.append((resource, queue))

        async def events() -> AsyncIterator[Object]:
            while (event := await queue.get()) is not None:
                yield event

        try:
            yield events()
        finally:
            self.watchers.remove((resource, queue))

    # --- what tests do to it ------------------------------------------------------------------

    def jobs(self) -> list[Object]:
        """Every Job, by name."""
        return [o for (plural, *_), o in sorted(self.objects.items()) if plural == "jobs"]

    def pods(self) -> list[Object]:
        """Every pod, by name."""
        return [o for (plural, *_), o in sorted(self.objects.items()) if plural == "pods"]

    def change(self, found: Object, plural: str) -> None:
        """Store a changed object, as another client would."""
        self._put("MODIFIED", plural, copy.deepcopy(found))

    def delete_gracefully(self, found: Object, plural: str) -> None:
        """Delete an object as a person does: its finalizers come first."""
        if not found["metadata"].get("finalizers"):
            self.remove(found, plural)
            return
        found = copy.deepcopy(found)
        found["metadata"]["deletionTimestamp"] = self._time()
        self._put("MODIFIED", plural, found)

    def remove(self, found: Object, plural: str) -> None:
        """Delete an object, a Job with its pods."""
        self.objects.pop(_key(plural, found), None)
        self.version += 1
        found = copy.deepcopy(found)
        found["metadata"]["resourceVersion"] = str(self.version)
        self._tell("DELETED", plural, found)
        for pod in self.pods() if plural == "jobs" else ():
            if _labels(pod).get(JOB_OF_POD) == found["metadata"]["name"]:
                self.remove(pod, "pods")

    def cut_watches(self, *, compact: bool) -> None:
        """End every watch; with `compact`, none can go on from where it was."""
        if compact:
            self.version += 1
            self.compacted = self.version
            self.log.clear()
        for _, queue in self.watchers:
            queue.put_nowait(None)

    def succeed(self, pod: Object) -> tuple[int, str]:
        """What the simulated trainer answers."""
        command, document = document_of(pod)
        return self._coded(result_of(command, document, self.volume))

    def step(self) -> None:
        """One stage of every Job: pod made, started, ended, Job finished."""
        for job in self.jobs():
            if job["spec"].get("suspend"):
                self._suspend(job)
            elif not _finished(job):
                self._advance(job)

    # --- the controllers ----------------------------------------------------------------------

    def _advance(self, job: Object) -> None:
        name = job["metadata"]["name"]
        pods = [p for p in self.pods() if p["metadata"]["name"].startswith(f"{name}-")]
        pod = pods[-1] if pods else None
        if pod is None:
            template = job["spec"]["template"]
            self._put("ADDED", "pods", {
                "metadata": {
                    **copy.deepcopy(template["metadata"]),
                    "name": f"{name}-{uuid.uuid4().hex[:5]}",
                    "namespace": job["metadata"]["namespace"],
                    "uid": uuid.uuid4().hex, "creationTimestamp": self._time(),
                    "labels": {**template["metadata"]["labels"], JOB_OF_POD: name},
                },
                "spec": {**copy.deepcopy(template["spec"]), "nodeName": "node-1"},
                "status": {"phase": "Pending", "conditions": [self._scheduled()]},
            })  # fmt: skip
        elif pod["status"]["phase"] == "Pending":
            state = {"running": {"startedAt": self._time()}}
            self._pod_state(pod, "Running", state)
        elif pod["status"]["phase"] == "Running":
            ended = self.answer(pod)
            if ended is not None:
                self.end_pod(pod, *ended)
        else:
            done = pod["status"]["phase"] == "Succeeded"
            kind = {"type": "Complete" if done else "Failed", "status": "True"}
            self._put("MODIFIED", "jobs", _merge(job, {"status": {"conditions": [kind]}}))

    def _suspend(self, job: Object) -> None:
        """First SIGTERM to its pods, which answers as a preempted trainer; then they are gone."""
        for pod in self.pods():
            if pod["metadata"]["labels"][JOB_OF_POD] != job["metadata"]["name"]:
                continue
            if "deletionTimestamp" in pod["metadata"]:
                self.remove(pod, "pods")
                continue
            pod = copy.deepcopy(pod)
            pod["metadata"]["deletionTimestamp"] = self._time()
            self._put("MODIFIED", "pods", pod)
            if pod["status"]["phase"] == "Running":
                _, document = document_of(pod)
                said = StepResult(
                    attempt=document.attempt, nonce=document.nonce, state=State.PREEMPTED
                )
                self.end_pod(pod, *self._coded(said))

    def end_pod(self, pod: Object, code: int, message: str, **facts: str) -> None:
        """Let a pod's trainer end."""
        running = pod["status"].get("containerStatuses") or [{"state": {}}]
        started = running[0]["state"].get("running", {}).get("startedAt", self._time())
        terminated = {
            "exitCode": code, "message": message, "startedAt": started,
            "finishedAt": self._time(), **facts,
        }  # fmt: skip
        self._pod_state(pod, "Failed" if code else "Succeeded", {"terminated": terminated})

    def _pod_state(self, pod: Object, phase: str, state: Object) -> None:
        status = {
            "phase": phase, "containerStatuses": [{"name": "trainer", "state": state}],
            "conditions": _conditions(pod),
        }  # fmt: skip
        self._put("MODIFIED", "pods", {**copy.deepcopy(pod), "status": copy.deepcopy(status)})

    def _scheduled(self) -> Object:
        return {"type": "PodScheduled", "status": "True", "lastTransitionTime": self._time()}

    def _coded(self, result: StepResult) -> tuple[int, str]:
        return EXIT_CODES[result.state], result.encode()

    def _put(self, kind: str, plural: str, found: Object) -> Object:
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        self.objects[_key(plural, found)] = found
        self._tell(kind, plural, found)
        return found

    def _tell(self, kind: str, plural: str, found: Object) -> None:
        self.log.append((self.version, kind, plural, copy.deepcopy(found)))
        for resource, queue in self.watchers:
            if resource.plural == plural:
                queue.put_nowait({"type": kind, "object": copy.deepcopy(found)})

    def _refuse(self, verb: str, resource: Resource) -> None:
        self.calls[(verb, resource.plural)] += 1
        for fault in self.faults:
            if fault[:2] == (verb, resource.plural):
                self.faults.remove(fault)
                if fault[2] in {0, 500, 503, 429}:
                    raise ClusterUnavailableError("injected", status=fault[2])
                raise ClusterError("injected", status=fault[2])

    def _time(self) -> str:
        return self.now().strftime("%Y-%m-%dT%H:%M:%SZ")


def _finished(job: Object) -> bool:
    return any(c["type"] in {"Complete", "Failed"} for c in _conditions(job))


def _conditions(found: Object) -> list[Object]:
    return (found.get("status") or {}).get("conditions") or []


def _labels(found: Object) -> dict[str, str]:
    return found["metadata"].get("labels") or {}


def _has(found: Object, selector: str) -> bool:
    """Whether an object has a label, of a value where the selector says one."""
    name, given, value = selector.partition("=")
    return not selector or (name in _labels(found) and (not given or _labels(found)[name] == value))


def _key(plural: str, found: Object) -> Key:
    return plural, found["metadata"]["namespace"], found["metadata"]["name"]


def _merge(known: Object, patch: Object) -> Object:
    merged = copy.deepcopy(known)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merge(merged[name], value)
        else:
            merged[name] = copy.deepcopy(value)
    return merged

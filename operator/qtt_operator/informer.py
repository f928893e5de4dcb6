"""A live copy of our Jobs or Pods: listed page by page, then watched; every gap ends in a new list.

Selected on the server by one label, so that a cluster full of other people's Jobs costs nothing. A
deletion that no watch has shown is found by comparing lists. Readers see plain dictionaries that
nobody changes; `on_change` and `on_delete` are told of every difference.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from qtt_core.errors import ClusterError, ClusterUnavailableError
from qtt_operator.cluster import Cluster, Object, Resource
from qtt_operator.names import RUN_UID_LABEL

log = logging.getLogger(__name__)

PAGE = 500
WATCH_SECONDS = 240
GONE = 410
JOB_OF_POD = "batch.kubernetes.io/job-name"
Name = tuple[str, str]
"""Namespace and name."""


class Informer:
    """The copy of one resource in one namespace ("" = all)."""

    def __init__(
        self,
        cluster: Cluster,
        resource: Resource,
        namespace: str = "",
        *,
        on_change: Callable[[Object], None],
        on_delete: Callable[[Object], None],
        trim: Callable[[Object], Object] = lambda found: found,
        watch_seconds: int = WATCH_SECONDS,
    ) -> None:
        self._cluster, self._resource, self._namespace = cluster, resource, namespace
        self._on_change, self._on_delete, self._trim = on_change, on_delete, trim
        self._watch_seconds = watch_seconds
        self._objects: dict[Name, Object] = {}
        self._by_run: dict[str, dict[Name, Object]] = defaultdict(dict)
        self._by_job: dict[str, dict[Name, Object]] = defaultdict(dict)
        self._version = ""
        self.synced = asyncio.Event()
        self.heard_at = time.monotonic()
        """When the server last said anything (monotonic)."""
        self.relists = 0

    # --- reading -----------------------------------------------------------------------------

    def of_run(self, uid: str) -> list[Object]:
        """Objects that carry a run's label."""
        return list(self._by_run.get(uid, {}).values())

    def of_job(self, job: str) -> list[Object]:
        """Pods that the Job controller made for Jobs of this name, in all namespaces."""
        return list(self._by_job.get(job, {}).values())

    def runs(self) -> list[str]:
        """Uids of runs that have objects."""
        return [uid for uid, names in self._by_run.items() if names]

    def get(self, namespace: str, name: str) -> Object | None:
        """One object as last seen."""
        return self._objects.get((namespace, name))

    def put(self, found: Object) -> None:
        """An object as a write of ours returned it, unless the watch has shown a newer one."""
        known = self._objects.get(_name(found))
        if known is None or _version(found) > _version(known):
            self._store(self._trim(found))

    # --- following ---------------------------------------------------------------------------

    async def run(self) -> None:
        """List and watch until cancelled."""
        failures = 0
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                failures = 0
            except ClusterUnavailableError as error:
                failures += 1
                log.warning("%s informer: %s", self._resource.plural, error)
                await asyncio.sleep(min(30.0, 0.5 * 2 ** min(failures, 6)) * random.uniform(0.7, 1))  # noqa: S311
            except ClusterError as error:
                self._version = ""  # 410: compacted; anything else: start from a list, later
                if error.status != GONE:
                    failures += 1
                    log.error("%s informer: %s", self._resource.plural, error)
                    await asyncio.sleep(min(30.0, 0.5 * 2 ** min(failures, 6)))

    async def _list(self) -> None:
        """Fetch all, then tell of what changed meanwhile, deletions included."""
        found: dict[Name, Object] = {}
        token = ""
        while True:
            page = await self._cluster.page(
                self._resource, self._namespace, selector=RUN_UID_LABEL, limit=PAGE, token=token
            )
            for item in page.get("items") or ():
                found[_name(item)] = self._trim(item)
            token = page["metadata"].get("continue") or ""
            if not token:
                break
        for name in self._objects.keys() - found.keys():
            self._drop(self._objects[name])
        for name, item in found.items():
            if _version(item) != _version(self._objects.get(name)):
                self._store(item)
        self._version = page["metadata"]["resourceVersion"]
        self.relists += 1
        self.heard_at = time.monotonic()
        self.synced.set()

    async def _watch(self) -> None:
        """Follow until the server ends the stream; the next call goes on from there."""
        async with self._cluster.watch(
            self._resource, self._namespace,
            selector=RUN_UID_LABEL, version=self._version, seconds=self._watch_seconds,
        ) as events:  # fmt: skip
            async for event in events:
                self.heard_at = time.monotonic()
                self._take(event["type"], event["object"])

    def _take(self, kind: str, found: Object) -> None:
        if kind == "ERROR":
            raise ClusterError(
                f"watch of {self._resource.plural}: {found.get('message')}",
                status=int(found.get("code") or 500), reason=str(found.get("reason") or ""),
            )  # fmt: skip
        self._version = found["metadata"]["resourceVersion"]
        if kind == "DELETED":
            self._drop(self._trim(found))
        elif kind in {"ADDED", "MODIFIED"}:
            known = self._objects.get(_name(found))
            if known is None or _version(found) >= _version(known):
                self._store(self._trim(found))

    def _store(self, found: Object) -> None:
        name = _name(found)
        self._objects[name] = found
        self._by_run[run_uid(found)][name] = found
        if job_of(found):
            self._by_job[job_of(found)][name] = found
        self._on_change(found)

    def _drop(self, found: Object) -> None:
        name = _name(found)
        if self._objects.pop(name, None) is not None:
            for index, label in ((self._by_run, run_uid(found)), (self._by_job, job_of(found))):
                index[label].pop(name, None)
                if not index[label]:
                    del index[label]
            self._on_delete(found)


class Informers:
    """One resource in several namespaces, read like one; a namespace each, or "" alone for all."""

    def __init__(self, parts: Mapping[str, Informer]) -> None:
        self._parts = dict(parts)

    @property
    def is_synced(self) -> bool:
        """Whether every part was listed once."""
        return all(part.synced.is_set() for part in self._parts.values())

    @property
    def silent_seconds(self) -> float:
        """How long the quietest part has heard nothing; bookmarks come about once a minute."""
        return time.monotonic() - min(part.heard_at for part in self._parts.values())

    @property
    def relists(self) -> int:
        """Full lists so far."""
        return sum(part.relists for part in self._parts.values())

    def of_run(self, uid: str) -> list[Object]:
        """Objects that carry a run's label."""
        return [found for part in self._parts.values() for found in part.of_run(uid)]

    def of_job(self, job: str) -> list[Object]:
        """Pods that the Job controller made for Jobs of this name."""
        return [found for part in self._parts.values() for found in part.of_job(job)]

    def runs(self) -> set[str]:
        """Uids of runs that have objects."""
        return {uid for part in self._parts.values() for uid in part.runs()}

    def get(self, namespace: str, name: str) -> Object | None:
        """One object as last seen."""
        part = self._part(namespace)
        return part.get(namespace, name) if part is not None else None

    def put(self, found: Object) -> None:
        """An object as a write of ours returned it."""
        part = self._part(found["metadata"].get("namespace", ""))
        if part is not None:
            part.put(found)

    async def run(self) -> None:
        """Follow all of them until cancelled."""
        async with asyncio.TaskGroup() as group:
            for part in self._parts.values():
                group.create_task(part.run())

    async def synced(self) -> None:
        """Wait until every part was listed once."""
        for part in self._parts.values():
            await part.synced.wait()

    def _part(self, namespace: str) -> Informer | None:
        return self._parts.get(namespace) or self._parts.get("")


def run_uid(found: Object) -> str:
    """The run an object belongs to."""
    return str((found["metadata"].get("labels") or {}).get(RUN_UID_LABEL, ""))


def job_of(found: Object) -> str:
    """The Job a pod was made for, empty where there is none."""
    return str((found["metadata"].get("labels") or {}).get(JOB_OF_POD, ""))


def without(found: Object, paths: Iterable[tuple[str, ...]]) -> Object:
    """A copy that shares all but the fields at these paths, to keep a large copy small."""
    copy = dict(found)
    for path in paths:
        target = copy
        for part in path[:-1]:
            if not isinstance(target.get(part), dict):
                break
            target[part] = dict(target[part])
            target = target[part]
        else:
            target.pop(path[-1], None)
    return copy


def _name(found: Object) -> Name:
    return found["metadata"].get("namespace", ""), found["metadata"]["name"]


def _version(found: Object | None) -> int:
    """Resource versions of one resource grow; the API promises comparison since 1.35."""
    return int(found["metadata"]["resourceVersion"]) if found is not None else -1

"""Jobs of one run on a cluster: `turn.Backend` over the informers' copies and a few writes.

Decides nothing. A Job's end is read from its pod; a Job that was deleted is remembered as ended
until the ledger has recorded it. What this process knows beyond the API (why it deletes a Job, what
pods that are gone have used) is a cache: after a restart the Jobs themselves tell.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace

from qtt_core.errors import ClusterError
from qtt_core.jobs import JobDocument
from qtt_core.ledger.events import Open
from qtt_core.plan import CreateJob, JobEnd, JobPhase, Observed, ObservedJob, OpenStep
from qtt_operator import job_ends
from qtt_operator.cluster import JOBS, PODS, Cluster, Object
from qtt_operator.informer import JOB_OF_POD as JOB_OF_POD
from qtt_operator.informer import Informers, job_of, run_uid, without
from qtt_operator.isolation import isolate
from qtt_operator.manifests import build_job, build_pod
from qtt_operator.names import DECISION_ANNOTATION, FETCHES, HELD_ANNOTATION, SUSPENDED_ANNOTATION
from qtt_operator.owner import RunObject
from qtt_operator.pods import JobRequest
from qtt_operator.settings import OperatorSettings
from qtt_operator.volumes import Volumes
from qtt_operator.witness import decision_of, opening_of

log = logging.getLogger(__name__)

CONFLICT = 409
SOON_SECONDS = 1.0


def trim_job(job: Object) -> Object:
    """A Job without its pod template: what is observed does not need it."""
    return without(job, [("metadata", "managedFields"), ("spec", "template")])


def trim_pod(pod: Object) -> Object:
    """A pod with its node, its times and its ends."""
    node = (pod.get("spec") or {}).get("nodeName")
    slim = without(pod, [("metadata", "managedFields"), ("metadata", "annotations")])
    return {**slim, "spec": {"nodeName": node}}


@dataclass(slots=True)
class _Memory:
    """What this process knows of one Job."""

    pending_since: float | None = None
    running_since: float | None = None
    finished_since: float | None = None
    killed: str = ""
    past_seconds: float = 0.0
    opening: OpenStep | None = None


@dataclass(slots=True, kw_only=True)
class Copies:
    """The informers of Jobs and Pods, and the memory of deleted ones, shared by all runs."""

    jobs: Informers
    pods: Informers


@dataclass(slots=True, kw_only=True)
class ClusterBackend:
    """Jobs of one TuningRun. `opened` finds the `open` event of a configuration's entry."""

    cluster: Cluster
    copies: Copies
    owner: RunObject
    settings: OperatorSettings
    epoch: int
    clock: Callable[[], float]
    weights: str = ""
    """The claim of pretrained weights that Jobs mount, empty for none."""
    opened: Callable[[str], Open | None] = lambda _c: None
    attempt_of: Callable[[str, int], int | None] = lambda _c, _to: None
    """The attempt of (configuration, target) whose end the ledger waits for, if for any."""
    knows: Callable[[str], bool] = lambda _decision: True
    """Whether the ledger holds the decision of this hash."""
    wake_after: Callable[[float], None] = lambda _seconds: None
    room: Callable[[int], int] = lambda wanted: wanted
    """Jobs that the run may have open, of those that it wants: the install's limit."""
    degraded: bool = False
    """Whether the server has dropped the pod failure policy of a Job."""
    commit_delay_seconds: float = 0.0
    """Wait between a commit and its Job's time to live, where Redis syncs once a second."""
    _memory: dict[str, _Memory] = field(default_factory=dict)
    _gone: dict[str, ObservedJob] = field(default_factory=dict)
    _forgotten: set[str] = field(default_factory=set)
    _past: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Uid of a recorded Job -> its step: a cache, its labels and annotations say it too."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    volumes: Volumes = field(init=False)
    _isolated: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """Claims follow the same TuningRun and clock."""
        self.volumes = Volumes(
            cluster=self.cluster, run=lambda: self.owner, settings=self.settings, clock=self.clock
        )

    # --- turn.Backend ------------------------------------------------------------------------

    async def observe(self) -> Observed:
        """Every Job of the run whose end the ledger may still wait for."""
        copies = [job for job in self.copies.jobs.of_run(self.owner.uid) if not self._is_past(job)]
        for job in copies:
            await self._read_decision(job)
        seen = [job for job in map(self._observe, copies) if job is not None]
        names = {job.name for job in seen}
        seen += [job for job in self._gone.values() if job.name not in names]
        synced = self.copies.jobs.is_synced and self.copies.pods.is_synced
        room = self.room(self.owner.run.spec.parallelism)
        await self.volumes.refresh()
        waits = map(job_ends.waits_since, self.copies.pods.of_run(self.owner.uid))
        await self.volumes.look(min((at for at in waits if at is not None), default=None))
        return Observed(
            jobs=tuple(seen), synced_at=self.clock() if synced else 0.0, devices=room,
            volumes=frozenset(self.volumes.known) if self.volumes.per_config else None,
        )  # fmt: skip

    async def create(self, job: CreateJob, name: str, document: JobDocument) -> None:
        """Create the Job; one of this name and decision is adopted, one of another run replaced."""
        opened = self.opened(job.c)
        request = JobRequest(
            job=job, name=name, document=document, opened=opened, epoch=self.epoch,
            weights=self.weights,
        )  # fmt: skip
        if self.settings.isolate_steps and not self._isolated:
            await isolate(self.cluster, self.namespace, self.settings.weights_endpoint)
            self._isolated = True
        if not await self._has_claim(job):
            self.wake_after(SOON_SECONDS)  # an old claim of this name is on its way out
            return
        body = build_job(self.owner, request, self.settings)
        try:
            made = await self.cluster.create(JOBS, self.namespace, body)
            self.degraded = "podFailurePolicy" not in made["spec"]
            self.copies.jobs.put(made)
        except ClusterError as error:
            if error.status != CONFLICT:
                raise
            await self._adopt(name, opened)

    async def kill(self, job: str, reason: str) -> None:
        """Delete the Job; it is observed as ended when its pods are gone too."""
        found = self.copies.jobs.get(self.namespace, job)
        if found is None:
            return
        memory = self._remember(found)
        if not memory.killed:
            log.info("%s: deleting it, %s", job, reason)
        memory.killed = memory.killed or reason
        if not job_ends.is_deleting(found):
            await self._delete(found, foreground=True)

    async def suspend(self, job: str) -> None:
        """Let the Job controller end its pods; the mark says that we may undo it."""
        await self._suspend(job, suspend=True, mark="true")

    async def resume(self, job: str) -> None:
        """Undo our own suspension, nobody else's."""
        await self._suspend(job, suspend=False, mark=None)

    async def forget(self, job: str) -> None:
        """The end is recorded: the Job may be collected, and must not start another pod."""
        if self._gone.pop(job, None) is not None:
            return
        found = self.copies.jobs.get(self.namespace, job)
        if found is None:
            return
        if job_ends.needs_deletion(found, self.pods_of(found)):
            await self._delete(found, foreground=False)
            self._forgotten.add(_uid(found))
        elif is_recorded(found):  # of a decision that the store lost, and that nobody misses
            self._past[_uid(found)] = _step_of(found)
        elif self.commit_delay_seconds:
            self._forgotten.add(_uid(found))
            self._later(self._expire_later(found))
        else:
            await self._expire(found)

    # --- told by the informers ----------------------------------------------------------------

    def job_deleted(self, job: Object) -> None:
        """A Job is gone: if the ledger may wait for it, remember how it ended."""
        uid = _uid(job)
        end = job_ends.vanished(job, self.pods_of(job), self._sight(job))
        seen = self._observe(job, end=end)
        if seen is not None:
            self._gone[seen.name] = seen
        self._forgotten.discard(uid)
        self._past.pop(uid, None)
        self._memory.pop(uid, None)

    def pod_deleted(self, pod: Object) -> None:
        """A pod is gone: its device time still counts."""
        for job in self.copies.jobs.of_run(self.owner.uid):
            if job["metadata"]["name"] == job_of(pod):
                memory = self._remember(job)
                memory.past_seconds += job_ends.held_seconds(pod, self.clock())
                over = job_ends.finished(job) or job_ends.is_deleting(job)
                if memory.past_seconds and not over:
                    self._later(self._keep_held(job, memory.past_seconds))

    def live(self) -> list[Object]:
        """Jobs that have not ended, for the limit over all runs."""
        return [
            job
            for job in self.copies.jobs.of_run(self.owner.uid)
            if not job_ends.finished(job) and not is_recorded(job)
        ]

    # --- checks before the first step ----------------------------------------------------------

    async def preflight(self, job: CreateJob, document: JobDocument) -> str:
        """Ask the server whether it would take this Job and its Pod; "" or its words.

        A restricted namespace accepts a bad Job with a warning and refuses its Pod for ever.
        """
        request = JobRequest(
            job=job, name=f"{self.owner.run.name}-check",
            document=document, opened=None, epoch=self.epoch, weights=self.weights,
        )  # fmt: skip
        body = build_job(self.owner, request, self.settings)
        try:
            await self.cluster.create(JOBS, self.namespace, body, dry_run=True)
            await self.cluster.create(PODS, self.namespace, build_pod(body), dry_run=True)
        except ClusterError as error:
            if error.status in {400, 403, 404, 409, 422}:
                return str(error)
            raise
        return ""

    # --- parts -------------------------------------------------------------------------------

    @property
    def namespace(self) -> str:
        """The run's namespace."""
        return self.owner.run.namespace

    def waiting(self) -> tuple[str, str]:
        """Why a pending pod does not run: (reason, message), or ("", "")."""
        if self.volumes.trouble:
            return "ReadWriteManyUnavailable", self.volumes.trouble
        for pod in self.copies.pods.of_run(self.owner.uid):
            if job_ends.started_at(pod) is None:
                why = job_ends.waiting_reason(pod, self.clock())
                if why[0]:
                    return why
        return "", ""

    def _observe(self, job: Object, end: JobEnd | None = None) -> ObservedJob | None:
        """The planner's view; None for a Job whose end is recorded, unless the record was lost."""
        recorded = _uid(job) in self._forgotten or is_recorded(job)
        seen = job_ends.observed_job(job, self.pods_of(job), self._sight(job))
        opening = self._memory[_uid(job)].opening
        if seen is None or (
            recorded and opening is None and self.attempt_of(seen.c, seen.to) != seen.attempt
        ):
            return None
        seen = replace(seen, opening=opening)
        if end is None:
            return seen
        return ObservedJob(
            name=seen.name, kind=seen.kind, c=seen.c, to=seen.to, attempt=seen.attempt,
            phase=JobPhase.ENDED, created_at=seen.created_at, end=end,
        )  # fmt: skip

    def _sight(self, job: Object) -> job_ends.Sight:
        """Update what is known of a Job, and say it."""
        now, pods = self.clock(), self.pods_of(job)
        memory = self._remember(job)
        running = any(job_ends.started_at(p) is not None for p in pods)
        memory.running_since = (memory.running_since or now) if running else None
        pending = not running and not job_ends.is_suspended(job)
        memory.pending_since = (memory.pending_since or now) if pending else None
        unread = job_ends.finished(job) and not any(map(job_ends.terminated, pods))
        if unread:  # asked for in every turn: an earlier wake takes the place of a later one
            memory.finished_since = memory.finished_since or now
            left = memory.finished_since + job_ends.UNREAD_SECONDS - now
            if left > 0:
                self.wake_after(left + SOON_SECONDS)
        for pod in pods:
            if job_ends.is_deleting(pod) and job_ends.terminated(pod) is None:
                self.wake_after(self.settings.node_lost_grace_seconds + SOON_SECONDS)
        return job_ends.Sight(
            now=now, pending_since=memory.pending_since,
            running_since=memory.running_since, finished_since=memory.finished_since,
            killed=memory.killed, past_seconds=memory.past_seconds,
            node_lost_grace=self.settings.node_lost_grace_seconds,
        )  # fmt: skip

    def _is_past(self, job: Object) -> bool:
        """Whether a Job waits for its time to live: its end is recorded, and the ledger says so.

        A store that lost its tail may have to come to the attempt of this Job again.
        """
        uid = _uid(job)
        if not is_recorded(job):
            self._past.pop(uid, None)
        elif uid not in self._past and self.knows(decision_of(job)):
            self._past[uid] = _step_of(job)
        if uid not in self._past:
            return False
        c, to, attempt = self._past[uid]
        waits = self.attempt_of(c, to)
        return waits is None or waits > attempt

    async def _read_decision(self, job: Object) -> None:
        """Keep the decision of a Job if the ledger lacks it; our copies lack its document."""
        memory = self._remember(job)
        decision = decision_of(job)
        if not decision or self.knows(decision):
            memory.opening = None
        elif memory.opening is None and not job_ends.is_deleting(job):
            whole = await self.cluster.get(JOBS, self.namespace, job["metadata"]["name"])
            if whole is not None and _uid(whole) == _uid(job):
                memory.opening = opening_of(whole)

    def pods_of(self, job: Object) -> list[Object]:
        """The pods of a Job, as last seen."""
        name = job["metadata"]["name"]
        return [pod for pod in self.copies.pods.of_job(name) if run_uid(pod) == run_uid(job)]

    async def _adopt(self, name: str, opened: Open | None) -> None:
        """A Job of this name exists: ours, as another turn or process made it, or another run's."""
        found = await self.cluster.get(JOBS, self.namespace, name)
        if found is None:
            return  # gone again: the next turn creates it
        annotations = found["metadata"].get("annotations") or {}
        decision = annotations.get(DECISION_ANNOTATION)
        if run_uid(found) == self.owner.uid and (opened is None or decision == opened.h):
            self.copies.jobs.put(found)
            return
        if run_uid(found) and run_uid(found) != self.owner.uid:
            log.info("%s belongs to an earlier run of this name: deleting it", name)
        elif run_uid(found):
            log.warning("%s carries another decision: deleting it", name)
        else:
            raise ClusterError(f"Job {name} exists and is not ours; rename it or the TuningRun")
        await self._delete(found, foreground=True)
        self.wake_after(SOON_SECONDS)

    async def _suspend(self, job: str, *, suspend: bool, mark: str | None) -> None:
        notes = {SUSPENDED_ANNOTATION: mark}
        body: Object = {"metadata": {"annotations": notes}, "spec": {"suspend": suspend}}
        patched = await self.cluster.patch(JOBS, self.namespace, job, body)
        if patched is not None:
            log.info("%s: %s", job, "suspended" if suspend else "resumed")
            self.copies.jobs.put(patched)

    async def _keep_held(self, job: Object, seconds: float) -> None:
        """Write on the Job what its gone pods have used, for an operator that did not see them."""
        body: Object = {"metadata": {"annotations": {HELD_ANNOTATION: f"{seconds:.1f}"}}}
        try:
            await self.cluster.patch(JOBS, self.namespace, job["metadata"]["name"], body)
        except ClusterError as error:
            log.debug("%s: %s", job["metadata"]["name"], error)

    def _remember(self, job: Object) -> _Memory:
        """What this process knows of a Job, begun with what the Job itself says."""
        known = self._memory.get(_uid(job))
        if known is None:
            known = self._memory[_uid(job)] = _Memory(past_seconds=job_ends.past_seconds(job))
        return known

    async def _has_claim(self, job: CreateJob) -> bool:
        """Make the claims that a Job mounts; `prepare` of scope Config mounts none of its own."""
        if not await self.volumes.ensure_weights(self.weights):
            return False
        if job.kind == FETCHES:
            return True
        if not self.volumes.per_config:
            return await self.volumes.ensure()
        return job.kind != "step" or await self.volumes.ensure(job.c)

    async def _delete(self, job: Object, *, foreground: bool) -> None:
        await self.cluster.delete(
            JOBS, self.namespace, job["metadata"]["name"], uid=_uid(job), foreground=foreground
        )

    async def _expire_later(self, job: Object) -> None:
        """The same once the record is on disk; what fails is tried again in a later turn."""
        await asyncio.sleep(self.commit_delay_seconds)
        try:
            await self._expire(job)
        except ClusterError as error:
            log.info("%s: %s", job["metadata"]["name"], error)
            self.wake_after(SOON_SECONDS)
        finally:
            self._forgotten.discard(_uid(job))

    async def _expire(self, job: Object) -> None:
        """Give the Job its time to live; works on finished and unfinished ones alike."""
        body: Object = {"spec": {"ttlSecondsAfterFinished": self.settings.job_ttl_seconds}}
        name = job["metadata"]["name"]
        patched = await self.cluster.patch(JOBS, self.namespace, name, body)
        if patched is not None:
            self.copies.jobs.put(patched)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def is_recorded(job: Object) -> bool:
    """Whether its end was recorded: only then a Job gets a time to live."""
    return (job.get("spec") or {}).get("ttlSecondsAfterFinished") is not None


def _step_of(job: Object) -> tuple[str, int, int]:
    """Configuration, target and attempt; of a Job that is no step, nothing the ledger waits for."""
    seen = job_ends.observed_job(job, (), job_ends.Sight(now=0.0))
    return (seen.c, seen.to, seen.attempt) if seen is not None else ("", 0, 0)


def _uid(found: Object) -> str:
    return str(found["metadata"]["uid"])

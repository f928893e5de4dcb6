"""The one finalizer we set: a run's folder on a claim of the user's goes before the TuningRun does.

Only under `deletionPolicy: Delete` with `checkpoint.claimName` (30-kubernetes 5.7). The Jobs of the
run are ended, one Job deletes `runs/<uid>`, and after ten minutes at most the finalizer goes
whatever came of it: a TuningRun can always be deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from qtt_core.errors import ClusterError, ClusterUnavailableError, SpecError
from qtt_core.jobs import JobDocument, Paths, Task
from qtt_core.plan import EmitEvent
from qtt_core.steps import nonce
from qtt_operator import job_ends
from qtt_operator.active_run import owner_of
from qtt_operator.chores import CHORE_SECONDS, chore_order
from qtt_operator.claims import wipes_shared_claim
from qtt_operator.cluster import JOBS, RUNS, Cluster, Object
from qtt_operator.cluster_backend import CONFLICT, JOB_OF_POD, Copies
from qtt_operator.manifests import build_job
from qtt_operator.names import GROUP
from qtt_operator.owner import RunObject
from qtt_operator.pods import CHECKPOINTS, DATA, JobRequest
from qtt_operator.settings import OperatorSettings

log = logging.getLogger(__name__)

FINALIZER = f"{GROUP}/wipe"
LOOK_SECONDS = 2.0
KEPT_SECONDS = 60
"""How long the Job that wiped stays; nobody owns it."""

Tell = Callable[[Object, EmitEvent], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Wipe:
    """For all runs of a process; `tell` writes an Event about a TuningRun."""

    cluster: Cluster
    copies: Copies
    settings: OperatorSettings
    epoch: int
    clock: Callable[[], float]
    tell: Tell

    async def promise(self, found: Object, owner: RunObject) -> Object:
        """Set or take off the finalizer as the spec wants it; the TuningRun as it is then."""
        wanted, there = wipes_shared_claim(owner.run.spec), is_promised(found)
        if wanted == there or "deletionTimestamp" in found["metadata"]:
            return found
        return await self._write(found, wanted=wanted)

    async def keep_promise(self, found: Object) -> float | None:
        """Wipe for a TuningRun that is being deleted; seconds until the next look, None: done."""
        try:
            owner = owner_of(found, self.settings)
            problem = await self._wipe(owner)
        except SpecError as error:
            problem = str(error)
        except ClusterUnavailableError:
            raise
        except ClusterError as error:  # a namespace that is going away takes no Job
            problem = str(error)
        since = job_ends.seconds(found["metadata"]["deletionTimestamp"]) or 0.0
        if problem is None and self.clock() - since > CHORE_SECONDS:
            problem = f"not done within {CHORE_SECONDS:.0f} seconds"
        if problem is None:
            return LOOK_SECONDS
        if problem:
            words = f"the run's folder on the shared claim was not deleted: {problem}"
            await self.tell(found, EmitEvent(reason="NotWiped", message=words, warning=True))
        await self._write(found, wanted=False)
        return None

    async def _wipe(self, owner: RunObject) -> str | None:
        """One step of it: "" when it is done, None while it goes on, else what went wrong."""
        name, namespace = f"{owner.run.name}-gc-wipe", owner.run.namespace
        others = [
            job for job in self.copies.jobs.of_run(owner.uid) if job["metadata"]["name"] != name
        ]
        for job in others:
            if not job_ends.is_deleting(job):
                metadata = job["metadata"]
                await self.cluster.delete(
                    JOBS, namespace, metadata["name"], uid=metadata["uid"], foreground=True
                )
        if others or self._writers(owner.uid, name):
            return None
        wiper = self.copies.jobs.get(namespace, name)
        if wiper is None:
            await self._create(owner, name)
        elif job_ends.has_condition(wiper, "Complete"):
            return ""
        elif job_ends.has_condition(wiper, "Failed"):
            return "its Job failed"
        return None

    def _writers(self, uid: str, wiper: str) -> bool:
        """Whether a pod of the run may still write."""
        return any(
            (pod["metadata"].get("labels") or {}).get(JOB_OF_POD) != wiper
            and job_ends.terminated(pod) is None
            for pod in self.copies.pods.of_run(uid)
        )

    async def _create(self, owner: RunObject, name: str) -> None:
        order = chore_order(owner.uid, "garbage", 0)
        document = JobDocument(
            run_uid=owner.uid, attempt=0, nonce=nonce(order.decision, 0), task=Task(data=DATA),
            paths=Paths(root=CHECKPOINTS), step="wipe", gc=(".",),
        )  # fmt: skip
        request = JobRequest(job=order, name=name, document=document, opened=None, epoch=self.epoch)
        body = build_job(owner, request, self.settings)
        del body["metadata"]["ownerReferences"]  # else it goes before its owner, which waits for it
        body["spec"]["ttlSecondsAfterFinished"] = KEPT_SECONDS
        try:
            self.copies.jobs.put(await self.cluster.create(JOBS, owner.run.namespace, body))
            log.info("%s/%s: wiping the run's folder", owner.run.namespace, owner.run.name)
        except ClusterError as error:
            if error.status != CONFLICT:
                raise

    async def _write(self, found: Object, *, wanted: bool) -> Object:
        """Raises: ClusterError 409 if the TuningRun has changed meanwhile: look again."""
        metadata = found["metadata"]
        others = [name for name in metadata.get("finalizers") or () if name != FINALIZER]
        fresh: Object = {
            "finalizers": [*others, *([FINALIZER] if wanted else [])],
            "resourceVersion": metadata["resourceVersion"],
        }
        body: Object = {"metadata": fresh}
        patched = await self.cluster.patch(RUNS, metadata["namespace"], metadata["name"], body)
        return patched or found


def is_promised(found: Object) -> bool:
    """Whether a TuningRun waits for us before it goes."""
    return FINALIZER in (found["metadata"].get("finalizers") or ())

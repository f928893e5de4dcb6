"""Looks after a run's volumes: starts chores, records what they did, deletes claims nobody needs.

Level-triggered like a turn: everything follows from the ledger, the Jobs and the claims that are
there. A chore that fails is tried again twice and never holds the run up for longer than its limit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

from qtt_core.errors import ClusterError, MessageError
from qtt_core.jobs import JobDocument
from qtt_core.ledger.events import Note
from qtt_core.ledger.reply import Reply
from qtt_core.plan import EmitEvent, JobPhase
from qtt_core.results import StepResult
from qtt_core.retention import GARBAGE_NOTE, final_garbage, swept, without
from qtt_core.steps import nonce
from qtt_operator import chores, job_ends
from qtt_operator.active_run import ActiveRun
from qtt_operator.cluster import JOBS, Cluster, Object
from qtt_operator.cluster_backend import CONFLICT, Copies, is_recorded
from qtt_operator.documents import job_document
from qtt_operator.informer import run_uid
from qtt_operator.lost_results import RECOVERY_NOTE, is_exhausted, known_heads, recovered
from qtt_operator.manifests import build_job
from qtt_operator.names import COMPONENT_LABEL, CONFIG_LABEL, TRAINER
from qtt_operator.pods import JobRequest
from qtt_operator.settings import OperatorSettings

log = logging.getLogger(__name__)

LOOK_SECONDS, SOON_SECONDS = 5.0, 0.2
"""Until the next look at a chore that runs, if no informer speaks before, and at one that ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoreEnd:
    """How a chore ended: what its trainer said, or why it said nothing."""

    message: str
    ok: bool
    why: str = ""


@dataclass(slots=True, kw_only=True)
class Upkeep:
    """Of all runs of a process. `tell` says what a person should know about one."""

    cluster: Cluster
    copies: Copies
    settings: OperatorSettings
    epoch: int
    clock: Callable[[], float]
    tell: Callable[[tuple[str, str], EmitEvent], Awaitable[None]]

    async def tend(self, run: ActiveRun, *, over: bool, full: bool = False) -> float | None:
        """The next chore of a run; seconds until the next look, None: there is nothing to do.

        `full`: nothing can be opened before a configuration gives its volume up (`maxVolumes`).
        Raises: StoreUnavailableError, ClusterError.
        """
        job = self._present(run, "garbage")
        if job is not None:
            return await self._follow(run, job)
        if chores.gave_up(run.context.state, "garbage"):
            return None
        if run.backend.volumes.per_config:
            return await self._per_config(run, over=over, full=full)
        facts = facts_of(run)
        paths = chores.garbage_at_end(facts) if over else self._worth_it(run, facts)
        return await self._start(run, paths) if paths else None

    async def recover(self, run: ActiveRun) -> float | None:
        """Bring results back that the store lost and no Job can tell; None: nothing is left to do.

        One Job after the other reads the volume; each is told what the ledger has by then. Raises:
        StoreUnavailableError, ClusterError.
        """
        context, volumes = run.context, run.backend.volumes
        job = self._present(run, "recovery")
        if job is not None:
            return await self._follow_recovery(run, job)
        if chores.gave_up(context.state, "recovery") or is_exhausted(context.events):
            return None
        if any(seen.phase is not JobPhase.ENDED for seen in context.observed.jobs):
            return LOOK_SECONDS  # what they will tell is worth more
        if not await volumes.exist():
            return None
        number = chores.chore_number(context.state, "recovery")
        document = replace(
            self._document(run, "recovery", number),
            known=known_heads(context.state, context.configs),
            step_epochs=context.run.spec.fidelity.step,
        )
        await self._create(run, document, "recovery", number, tuple(sorted(volumes.known, key=int)))
        return LOOK_SECONDS

    async def _follow_recovery(self, run: ActiveRun, job: Object) -> float:
        """Record what a recovery Job told."""
        name, end = job["metadata"]["name"], self._end(run, job)
        if end is None or job_ends.is_deleting(job):
            return LOOK_SECONDS
        number = name.rpartition("-")[2]
        order = chores.chore_order(run.uid, "recovery", int(number))
        try:
            if not end.ok:
                raise MessageError(end.why)
            result = StepResult.parse(end.message, nonce=nonce(order.decision, 0), attempt=0)
        except MessageError as error:
            await self._failed(run, RECOVERY_NOTE, name, str(error))
        else:
            told = [await self._restore(run, entry, name) for entry in result.recovered]
            more = result.more if any(told) else 0  # else the next Job would tell the same
            facts = json.dumps({"told": sum(told), "more": more})
            await self._note(run, name, what=RECOVERY_NOTE, new=facts)
            log.warning("%s/%s: %d results brought back", *run.key, sum(told))
        await run.backend.forget(name)
        return SOON_SECONDS

    async def _restore(self, run: ActiveRun, entry: Mapping[str, object], job: str) -> int:
        """Write one configuration's lost events; how many ends the ledger took."""
        context, taken = run.context, 0
        found = recovered(
            entry, context.state, context.run.spec, context.run.identity, context.configs
        )
        for item in found:
            if item.opened is not None:
                reply, _ = await run.ledger.open(item.opened, config=item.config, job=job)
                if reply not in {Reply.OK, Reply.BUSY}:
                    log.warning("%s: configuration %s: %s", job, item.end.c, reply.value)
                    break
            reply, _ = await run.ledger.commit(item.end)
            taken += reply is Reply.OK
        return taken

    async def remember_best(self, run: ActiveRun) -> None:
        """Record what the run ended with, before anything else of it is deleted; or read it."""
        context = run.context
        if context.recommendation is None:
            context.recommendation = chores.recorded_best(context.state)
        elif context.state.closed is not None:
            key = f"{chores.BEST_NOTE}-{context.state.closed.id}"
            await run.ledger.note(chores.best_note(context.recommendation), key=key)

    # --- what to delete -----------------------------------------------------------------------

    def _worth_it(self, run: ActiveRun, facts: chores.Facts) -> tuple[str, ...]:
        """Looked at again only after further configurations have closed."""
        if facts.past.closed < run.swept_closed + chores.BATCH:
            return ()
        paths = chores.garbage_now(facts)
        if not paths:
            run.swept_closed = facts.past.closed
        return paths

    async def _per_config(self, run: ActiveRun, *, over: bool, full: bool) -> float | None:
        """Claims of configurations with nothing to keep go; at the end the others are cleaned."""
        volumes, facts = run.backend.volumes, facts_of(run)
        await volumes.refresh()
        kept = chores.kept_at_end(facts) if over else chores.kept_meanwhile(facts)
        needed = {str(c) for c, _ in kept} | set(run.context.state.open)
        if not over:
            needed |= {str(c) for c, h in facts.past.items() if not h.standing.is_closed}
        useless = [c for c in volumes.known if c not in needed]
        if full and not useless:
            useless = chores.least_promising(facts, volumes.known.keys())
        if useless:
            number = chores.chore_number(run.context.state, "garbage")
            key = chores.chore_name(run.key[1], "garbage", number)
            await self._note(run, key, new=json.dumps([f"c{c}" for c in useless]))
            for c in useless:
                await self._delete_jobs(run, c)
                await volumes.drop(c)
            return 0.0
        if not over:
            return None
        gone, _ = swept(facts.events)
        for c in sorted(volumes.known, key=int):
            paths = without(final_garbage(kept, facts.events, only={int(c)}), gone)
            if paths:
                return await self._start(run, paths, volume=c)
        return None

    async def _delete_jobs(self, run: ActiveRun, c: str) -> None:
        """Delete a configuration's recorded Jobs: a claim stays as long as a pod object names it.

        Measured: ended pods count, so that the claim would stay for the Jobs' time to live.
        """
        for job in self.copies.jobs.of_run(run.uid):
            metadata = job["metadata"]
            mine = (metadata.get("labels") or {}).get(CONFIG_LABEL) == c
            if mine and is_recorded(job) and not job_ends.is_deleting(job):
                await self.cluster.delete(
                    JOBS, run.key[0], metadata["name"], uid=metadata["uid"], foreground=False
                )

    # --- one Job ------------------------------------------------------------------------------

    async def _start(self, run: ActiveRun, paths: tuple[str, ...], volume: str = "") -> float:
        number = chores.chore_number(run.context.state, "garbage")
        document = replace(self._document(run, "garbage", number), gc=paths[: chores.PATHS_A_JOB])
        await self._create(run, document, "garbage", number, (volume,) if volume else ())
        return LOOK_SECONDS

    def _document(self, run: ActiveRun, kind: str, number: int) -> JobDocument:
        order = chores.chore_order(run.uid, kind, number)
        return replace(
            job_document(run.context.run, order, run.context.state),
            cards=(), step=f"{kind}-{number}",
        )  # fmt: skip

    async def _create(
        self,
        run: ActiveRun,
        document: JobDocument,
        kind: str,
        number: int,
        volumes: tuple[str, ...],
    ) -> None:
        """Create the Job; one of this name is ours already, or an earlier run's and goes."""
        name = chores.chore_name(run.key[1], kind, number)
        request = JobRequest(
            job=chores.chore_order(run.uid, kind, number), name=name, document=document,
            opened=None, epoch=self.epoch, volumes=volumes,
        )  # fmt: skip
        body = build_job(run.backend.owner, request, self.settings)
        try:
            self.copies.jobs.put(await self.cluster.create(JOBS, run.key[0], body))
            log.info("%s/%s: started", run.key[0], name)
        except ClusterError as error:
            if error.status != CONFLICT:
                raise
            found = await self.cluster.get(JOBS, run.key[0], name)
            if found is not None and run_uid(found) == run.uid and not is_recorded(found):
                self.copies.jobs.put(found)
            elif found is not None:  # an earlier run's, or one whose note the store has lost
                uid = found["metadata"]["uid"]
                await self.cluster.delete(JOBS, run.key[0], name, uid=uid, foreground=True)

    def _present(self, run: ActiveRun, kind: str) -> Object | None:
        """The chore of a kind whose end is not recorded yet."""
        for job in self.copies.jobs.of_run(run.uid):
            labels = job["metadata"].get("labels") or {}
            if labels.get(COMPONENT_LABEL) == kind and not is_recorded(job):
                return job
        return None

    async def _follow(self, run: ActiveRun, job: Object) -> float | None:
        """Record a garbage Job's end. What it was told to delete stands in the Job itself."""
        name = job["metadata"]["name"]
        end = self._end(run, job)
        if end is None or job_ends.is_deleting(job):
            return LOOK_SECONDS
        if end.ok:
            await self._note(run, name, new=json.dumps(await self._paths(run, name)))
        else:
            await self._failed(run, GARBAGE_NOTE, name, end.why)
        await run.backend.forget(name)
        return SOON_SECONDS

    def _end(self, run: ActiveRun, job: Object) -> ChoreEnd | None:
        """How a chore ended, None while it may still end well."""
        pods = [p for p in run.backend.pods_of(job) if job_ends.terminated(p) is not None]
        state: Mapping[str, object] = {}
        if pods:
            state = job_ends.terminated(pods[-1]) or {}
        message = str(state.get("message") or "")
        if job_ends.has_condition(job, "Complete"):
            return ChoreEnd(message=message, ok=True)
        if job_ends.has_condition(job, "Failed"):
            return ChoreEnd(message=message, ok=False, why=message or "its pod said nothing")
        created = job_ends.seconds(job["metadata"].get("creationTimestamp")) or 0.0
        if self.clock() - created > chores.CHORE_SECONDS:
            waiting = " ".join(run.backend.waiting()).strip()
            return ChoreEnd(message="", ok=False, why=f"not ended in time; {waiting}")
        return None

    async def _paths(self, run: ActiveRun, name: str) -> tuple[str, ...]:
        document = await self._document_of(run, name)
        return tuple(document.get("gc", ())) if document else ()

    async def _document_of(self, run: ActiveRun, name: str) -> Mapping[str, list[str]]:
        """What a chore was told; our copies of Jobs lack it."""
        job = await self.cluster.get(JOBS, run.key[0], name)
        for container in job["spec"]["template"]["spec"]["containers"] if job else ():
            for variable in container.get("env") or () if container["name"] == TRAINER else ():
                if variable["name"] == "QTT_STEP":
                    found: Mapping[str, list[str]] = json.loads(variable["value"])
                    return found
        return {}

    async def _failed(self, run: ActiveRun, what: str, name: str, why: str) -> None:
        await self._note(run, name, what=what, old=why[-300:] or "failed")
        words = f"{name} failed: {why[-300:]}"
        event = EmitEvent(reason=f"{what.capitalize()}Failed", message=words, warning=True)
        await self.tell(run.key, event)

    async def _note(
        self, run: ActiveRun, name: str, *, what: str = GARBAGE_NOTE, new: str = "", old: str = ""
    ) -> None:
        """One note a chore, by its name; the next turn reads it."""
        await run.ledger.note(Note(what=what, old=old, new=new), key=f"chore-{name}")


def facts_of(run: ActiveRun) -> chores.Facts:
    """What the choice of checkpoints rests on, as this process knows it."""
    context = run.context
    return chores.Facts(
        spec=context.run.spec, events=context.events, past=run.house.histories(context),
        recommendation=context.recommendation, best=run.status.get("best") or {},
    )  # fmt: skip

"""One TuningRun brought forward: the shared turn, on Jobs, and its status written.

Level-triggered: `reconcile(key)` looks at the TuningRun as it is now, whatever has changed, and may
be called at any time. A run's context is a cache; it is built again from spec and ledger.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

import qtt_core
from qtt_core.errors import (
    Fault,
    SpecError,
    StaleEpochError,
    StoreUnavailableError,
)
from qtt_core.fields import raise_faults
from qtt_core.ledger.events import PREPARE, Open
from qtt_core.ledger.fold import LedgerState, fold
from qtt_core.plan import CreateJob, Identity, JobPhase, Plan
from qtt_core.spec import changed_immutable_fields, immutable_digest, parse_manifest
from qtt_core.steps import decision_hash, digest
from qtt_operator.cluster import RUNS, Cluster, Object
from qtt_operator.cluster_backend import ClusterBackend, Copies, is_recorded
from qtt_operator.cluster_status import (
    Truth,
    cluster_status,
    ended,
    merge_patch,
    news,
    with_conditions,
)
from qtt_operator.documents import RunContents, job_document, optimizer_setup
from qtt_operator.housekeeping import Housekeeping
from qtt_operator.job_ends import seconds
from qtt_operator.manifests import RunObject, refused
from qtt_operator.optimizer_share import OptimizerShare, SharedOptimizer
from qtt_operator.redis_client import redacted
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.references import places, resolve
from qtt_operator.settings import OperatorSettings
from qtt_operator.status import build_status
from qtt_operator.turn import Reply, RunContext, moved, pause_seconds, run_turn, tell_the_rest

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a TuningRun."""

TURNS = 10
"""Turns of one run before the next run has its go."""

STORE_AWAY_SECONDS = 3.0

CHECK_SECONDS = 3600.0
"""Time limit of the Pod that is only tried out on the server."""


class _Wake(asyncio.Event):
    """An event that also puts a run's key into the queue."""

    def __init__(self, enqueue: Callable[[], None]) -> None:
        super().__init__()
        self._enqueue = enqueue

    def set(self) -> None:
        super().set()
        self._enqueue()


@dataclass(slots=True, kw_only=True)
class ActiveRun:
    """A TuningRun that this process works on."""

    key: Key
    uid: str
    generation: int
    context: RunContext
    backend: ClusterBackend
    optimizer: SharedOptimizer
    house: Housekeeping
    status: dict[str, Any]
    """As last written."""
    written_at: float = 0.0
    rejected: str = ""
    """The server's words on the Pod that the template makes, empty if it takes it."""


class Reconciler:
    """All runs of this process. `fatal` is called when this process must stop writing."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        copies: Copies,
        store: Redis,
        share: OptimizerShare,
        settings: OperatorSettings,
        epoch: int,
        enqueue: Callable[[Key, float], None],
        fatal: Callable[[BaseException], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster, self._copies, self._store = cluster, copies, store
        self._share, self._settings, self._epoch = share, settings, epoch
        self._enqueue, self._fatal, self.clock = enqueue, fatal, clock
        self.objects: dict[Key, Object] = {}
        self.active: dict[Key, ActiveRun] = {}
        self.commit_delay_seconds = 0.0

    # --- told from outside --------------------------------------------------------------------

    def run_changed(self, found: Object) -> None:
        """A TuningRun is new or changed."""
        key = key_of(found)
        known = self.objects.get(key)
        self.objects[key] = found
        if known is None or _spec_of(known) != _spec_of(found):  # not for our own status writes
            self._enqueue(key, 0.0)

    def run_deleted(self, found: Object) -> None:
        """A TuningRun is gone; its Jobs go with it."""
        self.objects.pop(key_of(found), None)
        self._enqueue(key_of(found), 0.0)

    def child_changed(self, uid: str) -> None:
        """A Job or Pod of a run changed."""
        for key, run in self.active.items():
            if run.uid == uid:
                self._enqueue(key, 0.0)

    def backend_of(self, uid: str) -> ClusterBackend | None:
        """The back end of an active run."""
        return next((run.backend for run in self.active.values() if run.uid == uid), None)

    # --- one run ------------------------------------------------------------------------------

    async def reconcile(self, key: Key) -> float | None:
        """Bring a run forward; seconds until it should be looked at again, None: when told."""
        found = self.objects.get(key)
        run = self.active.get(key)
        if run is not None and (found is None or _uid(found) != run.uid):
            await self._drop(run)
            run = None
        if found is None or "deletionTimestamp" in found["metadata"]:
            return None
        try:
            return await self._bring_forward(key, found, run)
        except SpecError as error:
            await self._say(
                found, Truth(type="Accepted", status=False, reason="Invalid", message=str(error))
            )
            return self._settings.resync_seconds
        except StoreUnavailableError as error:
            await self._say(
                found,
                Truth(
                    type="StoreAvailable", status=False, reason="Unreachable", message=str(error)
                ),
            )
            return STORE_AWAY_SECONDS
        except StaleEpochError as error:
            self._fatal(error)
            return None

    async def _bring_forward(self, key: Key, found: Object, run: ActiveRun | None) -> float | None:
        if run is None:
            if ended(found) and all(map(is_recorded, self._copies.jobs.of_run(_uid(found)))):
                return await self._after_the_end(found)
            run = await self._start(key, found)
            self.active[key] = run
        elif run.generation != found["metadata"]["generation"]:
            self._respec(run, found)
        if run.rejected:
            await self._check_pod(run)
        if run.rejected:
            why = Truth(type="Accepted", status=False, reason="PodRejected", message=run.rejected)
            await self._say(found, why)
            return self._settings.resync_seconds
        plan, again = await self._turns(run)
        over = run.context.state.closed is not None and again is None
        if over and self._is_still(run):
            await tell_the_rest(run.context)  # the last status names the best of all results
            await self._write_status(run, plan, at_once=True)
            await self._drop(run)
            return await self._after_the_end(self.objects.get(key, found))
        written = await self._write_status(run, plan) if not over else STORE_AWAY_SECONDS
        pause = pause_seconds(plan) if again is None else again
        return min(pause, self._settings.resync_seconds, written)

    async def _turns(self, run: ActiveRun) -> tuple[Plan, float | None]:
        """Turns until nothing moves: (last plan, 0.0 if more are waiting)."""
        for _ in range(TURNS):
            run.context.wake.clear()
            plan = await run_turn(run.context)
            if not moved(plan):
                return plan, None
        return plan, 0.0

    def _is_still(self, run: ActiveRun) -> bool:
        live = [job for job in run.context.observed.jobs if job.phase is not JobPhase.ENDED]
        return not live and not run.context.view.busy

    # --- starting and changing ------------------------------------------------------------------

    async def _start(self, key: Key, found: Object) -> ActiveRun:
        """Parse, resolve, fence, read, and check the Pod on the server."""
        owner = self._owner(found)
        run = owner.run
        resolved = await resolve(self._cluster, run)
        ledger = RedisLedger(self._store, owner.uid, self._epoch)
        if (await ledger.fence()) is Reply.STALE:
            raise StaleEpochError(f"epoch {self._epoch} is fenced; a newer leader works")
        state = fold(await ledger.read())
        _check_drift(state, owner)
        optimizer = self._share.port()
        contents = RunContents(
            spec=run.spec, identity=_identity(owner, state), hub=resolved.hub,
            places=places(run), space_definition=resolved.space_definition,
        )  # fmt: skip
        space = await optimizer.describe(optimizer_setup(contents, state))
        identity = replace(contents.identity, space_id=space.space_id, space_sha=space.space_sha)
        contents = replace(contents, identity=identity)
        active = self._assemble(key, found, owner, contents, ledger, optimizer)
        if state.prepared is None:
            await self._check_pod(active)
        return active

    def _assemble(
        self,
        key: Key,
        found: Object,
        owner: RunObject,
        contents: RunContents,
        ledger: RedisLedger,
        optimizer: SharedOptimizer,
    ) -> ActiveRun:
        house = Housekeeping(Path())
        backend = ClusterBackend(
            cluster=self._cluster, copies=self._copies, owner=owner, settings=self._settings,
            epoch=self._epoch, clock=self.clock,
            wake_after=lambda after: self._enqueue(key, after),
            others_open=lambda: self._open_jobs(but=key),
            commit_delay_seconds=self.commit_delay_seconds,
        )  # fmt: skip
        context = RunContext(
            run=contents,
            setup=lambda state: optimizer_setup(context.run, state),
            ledger=ledger,
            backend=backend,
            optimizer=optimizer,
            garbage=house.garbage,
            clock=self.clock,
            wake=_Wake(lambda: self._enqueue(key, 0.0)),
        )
        backend.opened = lambda c: _last_open(context, c)
        return ActiveRun(
            key=key, uid=owner.uid, generation=found["metadata"]["generation"], context=context,
            backend=backend, optimizer=optimizer, house=house, status=found.get("status") or {},
        )  # fmt: skip

    def _respec(self, run: ActiveRun, found: Object) -> None:
        """The spec was edited: mutable fields act from now on. Raises: SpecError."""
        owner = self._owner(found)
        _check_drift(run.context.state, owner)
        if owner.run.spec.template != run.backend.owner.run.spec.template:
            run.rejected = "unchecked"  # the new template is tried on the server first
        run.backend.owner = owner
        run.context.run = replace(run.context.run, spec=owner.run.spec)
        run.generation = found["metadata"]["generation"]

    def _owner(self, found: Object) -> RunObject:
        manifest = {name: found[name] for name in ("apiVersion", "kind", "metadata", "spec")}
        run = parse_manifest(manifest)
        raise_faults(refused(run, self._settings))
        return RunObject(run=run, uid=_uid(found))

    async def _check_pod(self, run: ActiveRun) -> None:
        """Dry-run Job and Pod of the first step this run would start."""
        contents = run.context.run
        decision = decision_hash(
            uid=run.uid, config=PREPARE, fidelity_from=0, fidelity_to=1, config_digest=digest({}),
            space_sha=contents.identity.space_sha, seed=contents.identity.seed, position="0-0",
        )  # fmt: skip
        job = CreateJob(
            kind="prepare", c=PREPARE, frm=0, to=1, attempt=0, decision=decision,
            timeout_seconds=CHECK_SECONDS,
        )  # fmt: skip
        document = job_document(contents, job, run.context.state)
        run.rejected = await run.backend.preflight(document)

    # --- ending -------------------------------------------------------------------------------

    async def _drop(self, run: ActiveRun) -> None:
        if run.context.call is not None:
            run.context.call.cancel()
            await asyncio.gather(run.context.call, return_exceptions=True)
        self._share.drop(run.optimizer)
        self.active.pop(run.key, None)

    async def _after_the_end(self, found: Object) -> float | None:
        """Delete a TuningRun whose time to live after its end is over."""
        ttl = found["spec"].get("ttlSecondsAfterFinished")
        done = seconds((found.get("status") or {}).get("completionTime"))
        if ttl is None or done is None:
            return None
        left = done + float(ttl) - self.clock()
        if left > 0:
            return left
        namespace, name = key_of(found)
        await self._cluster.delete(RUNS, namespace, name, uid=_uid(found), foreground=False)
        return None

    # --- status -------------------------------------------------------------------------------

    async def _write_status(self, run: ActiveRun, plan: Plan, *, at_once: bool = False) -> float:
        """Write what changed, at most every few seconds; seconds until a held-back write is due."""
        context = run.context
        status = build_status(
            spec=context.run.spec, identity=context.run.identity, ledger=context.state,
            histories=run.house.histories(context), observed=context.observed, phase=plan.phase,
            held=plan.held, recommendation=context.recommendation, now=self.clock(),
        )  # fmt: skip
        previous = run.status.get("conditions", [])
        full = cluster_status(
            status, self._truths(run, plan), previous=previous, uid=run.uid,
            generation=run.generation, now=self.clock(), store=redacted(self._settings.redis_url),
        )  # fmt: skip
        if context.recommendation is None and "best" in run.status:
            full["best"] = run.status["best"]  # an optimizer that is not loaded yet knows none
        patch = merge_patch(run.status, full)
        if not patch:
            return self._settings.resync_seconds
        wait = run.written_at + self._settings.status_seconds - time.monotonic()
        fresh = news(previous, full["conditions"])
        if wait > 0 and not fresh and not at_once:
            return wait
        for condition in fresh:
            log.info(
                "%s: %s=%s %s %s", "/".join(run.key), condition["type"], condition["status"],
                condition["reason"], condition["message"],
            )  # fmt: skip
        await self._patch_status(run.key, patch)
        run.status, run.written_at = full, time.monotonic()
        return self._settings.resync_seconds

    def _truths(self, run: ActiveRun, plan: Plan) -> list[Truth]:
        """Conditions that only the cluster's side knows."""
        view = run.context.view
        truths = [Truth(type="StoreAvailable", status=True, reason="Connected")]
        if view.error:
            truths.append(
                Truth(type="OptimizerHealthy", status=False, reason="Timeout", message=view.error)
            )
        elif view.loaded:
            truths.append(Truth(type="OptimizerHealthy", status=True, reason="Ready"))
        pending = [job for job in run.context.observed.jobs if job.phase is JobPhase.PENDING]
        running = [job for job in run.context.observed.jobs if job.phase is JobPhase.RUNNING]
        if pending and not running and plan.held is None:
            reason, message = run.backend.waiting()
            if reason:
                truths.append(
                    Truth(type="Progressing", status=False, reason=reason, message=message)
                )
        return truths

    async def _say(self, found: Object, truth: Truth) -> None:
        """Write one condition of a run that cannot go on; the rest of its status stays."""
        found = self.objects.get(key_of(found), found)
        run = self.active.get(key_of(found))
        old = run.status if run is not None else (found.get("status") or {})
        previous = old.get("conditions", [])
        generation = found["metadata"]["generation"]
        conditions = with_conditions(previous, [truth], generation=generation, now=self.clock())
        if conditions == previous:
            return
        patch = {"conditions": conditions, "observedGeneration": generation}
        if "phase" not in old:
            patch["phase"] = "Pending"
        log.warning("%s: %s", "/".join(key_of(found)), truth.message)
        await self._patch_status(key_of(found), patch)
        if run is not None:
            run.status = {**run.status, **patch}
        found["status"] = {**old, **patch}

    async def _patch_status(self, key: Key, patch: dict[str, Any]) -> None:
        patched = await self._cluster.patch(RUNS, *key, {"status": patch}, sub="status")
        if patched is not None and key in self.objects:
            self.objects[key] = patched

    def _open_jobs(self, *, but: Key) -> int:
        return sum(len(run.backend.live()) for key, run in self.active.items() if key != but)


def key_of(found: Object) -> Key:
    """Namespace and name."""
    return found["metadata"]["namespace"], found["metadata"]["name"]


def _uid(found: Object) -> str:
    return str(found["metadata"]["uid"])


def _spec_of(found: Object) -> tuple[object, ...]:
    metadata = found["metadata"]
    deleting = metadata.get("deletionTimestamp")
    return metadata["uid"], metadata["generation"], metadata.get("annotations"), deleting


def _check_drift(state: LedgerState, owner: RunObject) -> None:
    """Raises: SpecError if the run that was started is another one (old servers ignore CEL)."""
    if state.run is None:
        return
    fields = changed_immutable_fields(state.run.spec, owner.run.raw_spec)
    raise_faults([Fault(name, "changed", "is immutable: this run has started") for name in fields])


def _identity(owner: RunObject, state: LedgerState) -> Identity:
    """Who the run is; a seed nobody chose comes from its uid, so that it is drawn once."""
    drawn = int(hashlib.sha256(owner.uid.encode()).hexdigest()[:8], 16) & 0x7FFFFFFF
    seed = owner.run.spec.optimizer.seed
    if state.run is not None:
        seed = state.run.seed
    return Identity(
        uid=owner.uid, name=owner.run.name, seed=drawn if seed is None else seed,
        space_id="", space_sha="", spec_hash=immutable_digest(owner.run.raw_spec),
        version=qtt_core.__version__, raw_spec=owner.run.raw_spec,
    )  # fmt: skip


def _last_open(context: RunContext, c: str) -> Open | None:
    """The `open` event of a configuration's newest decision."""
    for event in reversed(context.events):
        if isinstance(event, Open) and event.c == c:
            return event
    return None

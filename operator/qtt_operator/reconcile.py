"""One TuningRun brought forward: the shared turn, on Jobs, and its status written.

Level-triggered: `reconcile(key)` looks at the TuningRun as it is now, whatever has changed, and may
be called at any time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from redis.asyncio import Redis

from qtt_core.errors import (
    ClusterError,
    LedgerError,
    NotFoundError,
    SpecDriftError,
    SpecError,
    StaleEpochError,
    StoreUnavailableError,
)
from qtt_core.ledger.fold import EVALUATE_NOTE, FINETUNE_NOTE, RETRY_NOTE
from qtt_core.plan import Action, Commit, EmitEvent, OpenStep, Plan, RecordNote
from qtt_core.wishes import note_key
from qtt_operator.active_run import (
    ActiveRun,
    Key,
    Surroundings,
    apply_spec,
    check_pod,
    start_run,
    wishes_of,
)
from qtt_operator.claims import one_node_advice
from qtt_operator.cluster import RUNS, Cluster, Object
from qtt_operator.cluster_backend import ClusterBackend, Copies, is_recorded
from qtt_operator.cluster_events import Events
from qtt_operator.cluster_status import ended, told_ended
from qtt_operator.conditions import Truth, of_error
from qtt_operator.farewell import Farewell
from qtt_operator.job_limit import JobLimit
from qtt_operator.leader import LeadershipLostError
from qtt_operator.metrics import Metrics
from qtt_operator.optimizer_share import OptimizerShare
from qtt_operator.progress import progress
from qtt_operator.redis_client import redacted
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.run_metrics import RunMetrics
from qtt_operator.settings import OperatorSettings
from qtt_operator.status_writer import StatusWriter
from qtt_operator.turn import moved, pause_seconds, run_turn, tell_the_rest
from qtt_operator.upkeep import Upkeep
from qtt_operator.wipe import Wipe, is_promised

log = logging.getLogger(__name__)

TURNS = 10
"""Turns of one run before the next run has its go."""

REFUSALS = 3
"""Turns in a row that write and find nothing written: the store is not what we remember."""

STORE_AWAY_SECONDS, ABSENT_SECONDS = 3.0, 15.0
"""Until a store that was away, or a claim that was not there, is looked for again."""


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
        metrics: Metrics,
        instance: str = "operator",
        install: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster, self._copies, self._settings = cluster, copies, settings
        self._share, self._enqueue, self._fatal = share, enqueue, fatal
        self._metrics, self._clock = metrics, clock
        self.run_metrics = RunMetrics(metrics, epoch)
        self._limit = JobLimit(
            settings.max_open_jobs, settings.max_parallelism, lambda key: enqueue(key, 0.0)
        )
        self.events = Events(cluster, instance=instance)
        self._status = StatusWriter(
            cluster, settings=settings, store=redacted(settings.redis_url),
            events=self.events, stored=self._stored, clock=clock,
            failures=self.run_metrics.failure,
        )  # fmt: skip

        def ledger_of(uid: str) -> RedisLedger:
            return RedisLedger(store, uid, epoch, observer=metrics.store_called)

        self._around = Surroundings(
            cluster=cluster, copies=copies, share=share, settings=settings, epoch=epoch,
            clock=clock, ledger_of=ledger_of, enqueue=enqueue,
            room=self._limit.room,
            commit_delay_seconds=lambda: self.commit_delay_seconds, tell=self._tell,
        )  # fmt: skip
        self._upkeep = Upkeep(
            cluster=cluster, copies=copies, settings=settings, epoch=epoch, clock=clock,
            tell=self._tell,
        )  # fmt: skip
        self._wipe = Wipe(
            cluster=cluster, copies=copies, settings=settings, epoch=epoch, clock=clock,
            tell=self._emit,
        )  # fmt: skip
        self._farewell = Farewell(cluster, store, self._around.ledger_of, install)
        self.objects: dict[Key, Object] = {}
        self._keys: dict[str, Key] = {}
        """Uid -> key of the TuningRun."""
        self.active: dict[Key, ActiveRun] = {}
        self._left: dict[str, Object] = {}
        """Uid -> TuningRun that is gone and was not parted with yet."""
        self.commit_delay_seconds = 0.0

    # --- told from outside --------------------------------------------------------------------

    def run_changed(self, found: Object) -> None:
        """A TuningRun is new or changed."""
        key = key_of(found)
        known = self.objects.get(key)
        self.objects[key] = found
        self._keys[_uid(found)] = key
        if known is None or _wish(known) != _wish(found):  # not for our own status writes
            self._enqueue(key, 0.0)

    def run_deleted(self, found: Object) -> None:
        """A TuningRun is gone; its Jobs go with it."""
        self.objects.pop(key_of(found), None)
        self._left[_uid(found)] = found
        self._keys.pop(_uid(found), None)
        self.run_metrics.deleted(_uid(found))
        self._enqueue(key_of(found), 0.0)

    def child_changed(self, uid: str) -> None:
        """A Job or Pod of a run changed."""
        if uid in self._keys:
            self._enqueue(self._keys[uid], 0.0)

    def backend_of(self, uid: str) -> ClusterBackend | None:
        """The back end of an active run."""
        run = self.active.get(self._keys.get(uid, ("", "")))
        return run.backend if run is not None and run.uid == uid else None

    # --- one run ------------------------------------------------------------------------------

    async def reconcile(self, key: Key) -> float | None:
        """Bring a run forward; seconds until it should be looked at again, None: when told."""
        found, run = self.objects.get(key), self.active.get(key)
        if run is not None and (found is None or _uid(found) != run.uid):
            await self._drop(run)
            run = None
        began, result = time.monotonic(), "ok"
        try:
            await self._part(key)
            return None if found is None else await self._bring_forward(key, found, run)
        except (SpecError, SpecDriftError) as error:
            result = "invalid"
            again = await self._held(key, of_error(error))
            return min(again, ABSENT_SECONDS) if isinstance(error, NotFoundError) else again
        except StoreUnavailableError as error:
            result = "store"
            await self._held(key, of_error(error))
            return STORE_AWAY_SECONDS
        except LedgerError as error:
            result = "ledger"
            if run is not None:  # what this process remembers may be what is wrong: read anew
                log.warning("%s/%s: %s; reading it anew", *key, error)
                await self._drop(run)
                return 0.0
            log.error("%s/%s: %s", *key, error)
            return await self._held(key, of_error(error))
        except (StaleEpochError, LeadershipLostError) as error:
            self._fatal(error)
            return None
        except Exception as error:  # noted for people; the queue logs it and comes back
            result = self._broken(key, error)
            raise
        finally:
            self._metrics.turn(result, time.monotonic() - began)

    def _broken(self, key: Key, error: Exception) -> str:
        """Remember what ended a turn, for the status; the word that the metrics count."""
        run = self.active.get(key)
        if run is not None:
            run.failure = (self._clock(), type(error).__name__, str(error))
        return "cluster" if isinstance(error, ClusterError) else "bug"

    async def _bring_forward(self, key: Key, found: Object, run: ActiveRun | None) -> float | None:
        if "deletionTimestamp" in found["metadata"]:
            return await self._wipe.keep_promise(found) if is_promised(found) else None
        if run is None and await self._is_over(found):
            return await self._after_the_end(found)
        if run is None:
            run = await start_run(key, found, self._around)
            await self._introduce(run, found)
            self.active[key] = run
        elif run.generation != found["metadata"]["generation"]:
            apply_spec(run, found, self._settings)
            await self._introduce(run, found)
        if run.rejected:
            await check_pod(run)
        if run.rejected:
            why = Truth(type="Accepted", status=False, reason="PodRejected", message=run.rejected)
            await self._status.say(found, why, run)
            return self._settings.resync_seconds
        run.listen(found)
        plan, again = await self._turns(run)
        self._count(run)
        if plan.held is not None and plan.held[0] == "DataRegressed":
            reason, message = plan.held
            truth = Truth(type="StoreAvailable", status=False, reason=reason, message=message)
            await self._held(key, truth)  # what was counted stays
            return again if again is not None else await self._recover(run)
        if run.context.state.closed is not None and again is None:
            return await self._finish(run, plan) if run.is_still else STORE_AWAY_SECONDS
        held_back = await self._status.write(run, found, plan)
        pause = again if again is not None else await self._rest(run, plan)
        return min(pause, self._settings.resync_seconds, held_back)

    async def _rest(self, run: ActiveRun, plan: Plan) -> float:
        """Look after the volumes of a run that moves no more; seconds until the next turn."""
        full = plan.held is not None and plan.held[0] == "NoProgress"
        chore = await self._upkeep.tend(run, over=False, full=full)
        return pause_seconds(plan) if chore is None else min(chore, pause_seconds(plan))

    async def _recover(self, run: ActiveRun) -> float:
        """Read the volume for what the store lost; seconds until the next turn."""
        chore = await self._upkeep.recover(run)
        return STORE_AWAY_SECONDS if chore is None else chore

    async def _introduce(self, run: ActiveRun, found: Object) -> None:
        """Let ledger, claims and finalizer follow the spec: what `deletionPolicy` says may change.

        Before the first Job, so that nothing is written that nobody would delete.
        """
        await run.ledger.describe(self._farewell.facts(found))
        await run.ledger.refer(run.context.run.references)
        await run.backend.volumes.hand_over()
        self._stored(await self._wipe.promise(found, run.backend.owner))
        advice = one_node_advice(run.context.run.spec, self._settings.checkpoint_defaults)
        if advice:
            await self._emit(found, EmitEvent(reason="OneNodeVolume", message=advice))
        if run.news:
            await self._emit(found, EmitEvent(reason="PriorChosen", message=run.news))
            run.news = ""

    async def _part(self, key: Key) -> None:
        """Part with TuningRuns of this name that are gone."""
        for uid, found in list(self._left.items()):
            if key_of(found) == key:
                policy = found["spec"].get("deletionPolicy", "Retain")
                await self._farewell.say(uid, key[0], policy)
                self._left.pop(uid, None)

    async def sweep(self) -> None:
        """Part with runs that went while nobody watched. Raises: StoreUnavailableError."""
        await self._farewell.sweep({_uid(found) for found in self.objects.values()})

    async def _is_over(self, found: Object) -> bool:
        """Whether the status says so, no Job waits for its record and no wish is new."""
        jobs = self._copies.jobs.of_run(_uid(found))
        if not ended(found) or not all(map(is_recorded, jobs)):
            return False
        wishes = wishes_of(found)
        given = {
            RETRY_NOTE: wishes.retry,
            FINETUNE_NOTE: wishes.finetune,
            EVALUATE_NOTE: wishes.evaluate,
        }
        keys = [note_key(what, value) for what, value in given.items() if value.strip()]
        return not keys or await self._around.ledger_of(_uid(found)).noted(keys)

    async def _turns(self, run: ActiveRun) -> tuple[Plan, float | None]:
        """Turns until nothing moves: (last plan, 0.0 if more are waiting)."""
        refused = 0
        for _ in range(TURNS):
            run.context.wake.clear()
            known = len(run.context.events)
            plan = await run_turn(run.context)
            self.run_metrics.ended(run.context, plan)
            if not moved(plan):
                return plan, None
            repeats = known == len(run.context.events) and any(map(_writes, plan.actions))
            refused = refused + 1 if repeats else 0
            if refused >= REFUSALS:
                raise LedgerError("the ledger refuses what follows from its own events")
        return plan, 0.0

    async def _finish(self, run: ActiveRun, plan: Plan) -> float | None:
        """The last status of a run, with the best of all results; then it is let go.

        Before that the volume is cleaned: who waits for Complete finds what retention promises.
        """
        await tell_the_rest(run.context)
        await self._upkeep.remember_best(run)
        chore = await self._upkeep.tend(run, over=True)
        if chore is not None:
            return chore
        found = self.objects[run.key]
        await self._status.write(run, found, plan, at_once=True)
        await self._drop(run)
        return await self._after_the_end(self.objects.get(run.key, found))

    async def _after_the_end(self, found: Object) -> float | None:
        """Delete a TuningRun whose time to live after its end is over."""
        ttl = found["spec"].get("ttlSecondsAfterFinished")
        done = told_ended(found.get("status") or {})
        if ttl is None or done is None:
            return None
        left = done + float(ttl) - self._clock()
        if left > 0:
            return left
        namespace, name = key_of(found)
        await self._cluster.delete(RUNS, namespace, name, uid=_uid(found), foreground=False)
        return None

    async def _held(self, key: Key, truth: Truth) -> float:
        """Say why a run cannot go on; it is looked at again with the next change or resync."""
        if key in self.objects:  # else it is gone, and only its keys are left to part with
            await self._status.say(self.objects[key], truth, self.active.get(key))
        return self._settings.resync_seconds

    async def _tell(self, key: Key, event: EmitEvent) -> None:
        if key in self.objects:
            await self._emit(self.objects[key], event)

    async def _emit(self, found: Object, event: EmitEvent) -> None:
        log.info("%s/%s: %s: %s", *key_of(found), event.reason, event.message)
        await self.events.emit(
            found, reason=event.reason, message=event.message, warning=event.warning
        )

    async def _drop(self, run: ActiveRun) -> None:
        await run.close()
        self._share.drop(run.optimizer)
        self.active.pop(run.key, None)
        self._limit.forget(run.key)
        self.run_metrics.forget(run.key[0], run.context)

    def _count(self, run: ActiveRun) -> None:
        """Feed the metrics what is new, and give back room for Jobs that was not used."""
        context, namespace = run.context, run.key[0]
        self.run_metrics.take(context, namespace)
        so_far = progress(context.run.spec, context.state, context.events, context.clock())
        saved = run.house.histories(context).checkpoint_bytes
        self.run_metrics.describe(context, namespace, so_far=so_far, saved=saved)
        self._limit.settle(run.key, max(len(context.state.open), len(run.backend.live())))

    def _stored(self, found: Object) -> None:
        """The server's copy after a write of ours; kopf will say it again."""
        if key_of(found) in self.objects:
            self.objects[key_of(found)] = found


def key_of(found: Object) -> Key:
    """Namespace and name."""
    return found["metadata"]["namespace"], found["metadata"]["name"]


def _uid(found: Object) -> str:
    return str(found["metadata"]["uid"])


def _writes(action: Action) -> bool:
    return isinstance(action, Commit | OpenStep | RecordNote)


def _wish(found: Object) -> tuple[object, ...]:
    """What a person may change."""
    metadata = found["metadata"]
    deleting = metadata.get("deletionTimestamp")
    return metadata["uid"], metadata["generation"], metadata.get("annotations"), deleting

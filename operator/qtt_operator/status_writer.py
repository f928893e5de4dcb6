"""Writes a TuningRun's status: little, seldom, and at once when a condition changes.

Computes with `status` and `cluster_status`, sends the smallest patch, and says changed conditions
as Events and in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from qtt_core.ledger.events import Cancel, Fail, Retry
from qtt_core.plan import Phase, Plan
from qtt_operator.active_run import ActiveRun
from qtt_operator.cluster import RUNS, Cluster, Object
from qtt_operator.cluster_events import Events
from qtt_operator.cluster_status import (
    Condition,
    cluster_status,
    merge_patch,
    news,
    timestamp,
    with_conditions,
)
from qtt_operator.conditions import Truth, of_jobs, of_optimizer
from qtt_operator.failpoints import reached
from qtt_operator.job_ends import seconds
from qtt_operator.progress import progress
from qtt_operator.run_metrics import word
from qtt_operator.settings import OperatorSettings
from qtt_operator.status import build_status
from qtt_operator.status_schema import MESSAGE_LENGTH

log = logging.getLogger(__name__)

GOOD = frozenset({"Accepted", "StoreAvailable", "OptimizerHealthy", "Progressing", "Complete"})
"""Conditions whose truth is no reason to warn; of the others, `Suspended` is a user's wish."""

ETA_SECONDS, ETA_SHARE = 60.0, 0.1
"""An estimate is written again when it moved by more than a minute and a tenth of what is left."""


class StatusWriter:
    """`failures`: the newest end without a result of a run, by uid.

    `stored` is told of the object as the server has it after a write.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        settings: OperatorSettings,
        store: str,
        events: Events,
        stored: Callable[[Object], None],
        clock: Callable[[], float],
        failures: Callable[[str], Retry | Cancel | Fail | None],
    ) -> None:
        self._cluster, self._settings, self._store = cluster, settings, store
        self._events, self._stored, self._clock = events, stored, clock
        self._failures = failures

    async def write(
        self, run: ActiveRun, found: Object, plan: Plan, *, at_once: bool = False
    ) -> float:
        """Write what changed; seconds until a write that was held back is due."""
        full = self._status(run, plan)
        patch = merge_patch(run.status, full)
        if not patch:
            return self._settings.resync_seconds
        wait = run.written_at + self._settings.status_seconds - time.monotonic()
        fresh = news(run.status.get("conditions", []), full["conditions"])
        if wait > 0 and not fresh and not at_once:
            return wait
        await self._send(found, patch, fresh)
        run.status, run.written_at = full, time.monotonic()
        return self._settings.resync_seconds

    async def say(self, found: Object, truth: Truth, run: ActiveRun | None) -> None:
        """Write one condition of a run that cannot go on; the rest of its status stays."""
        old = run.status if run is not None else (found.get("status") or {})
        previous = old.get("conditions", [])
        generation = found["metadata"]["generation"]
        conditions = with_conditions(previous, [truth], generation=generation, now=self._clock())
        if conditions == previous:
            return
        patch = {"conditions": conditions, "observedGeneration": generation}
        if "phase" not in old:
            patch["phase"] = "Pending"
        if run is not None:
            run.status = {**run.status, **patch}
        await self._send(found, patch, news(previous, conditions))

    def _status(self, run: ActiveRun, plan: Plan) -> dict[str, Any]:
        context = run.context
        status = build_status(
            spec=context.run.spec, identity=context.run.identity, ledger=context.state,
            histories=run.house.histories(context), observed=context.observed, phase=plan.phase,
            held=plan.held, recommendation=context.recommendation, now=self._clock(),
            seconds_left=self._seconds_left(run),
        )  # fmt: skip
        full = cluster_status(
            status, truths(run, plan), previous=run.status.get("conditions", []), uid=run.uid,
            generation=run.generation, now=self._clock(), store=self._store,
        )  # fmt: skip
        full |= self._facts(run)
        if context.recommendation is None and "best" in run.status:
            full["best"] = run.status["best"]  # an optimizer that is not loaded yet knows none
        return full

    def _seconds_left(self, run: ActiveRun) -> float | None:
        """Until the budget is used; as written before, unless it moved by more than a little.

        An estimate that changes with every look would be a write with every look.
        """
        context, now = run.context, self._clock()
        left = progress(context.run.spec, context.state, context.events, now).seconds_left
        known = seconds(run.status.get("estimatedCompletionTime"))
        if left is None or known is None:
            return left
        moved = abs(now + left - known)
        return left if moved > max(ETA_SECONDS, ETA_SHARE * left) else max(0.0, known - now)

    def _facts(self, run: ActiveRun) -> dict[str, Any]:
        """What the server can do, and what went wrong last."""
        features = "Degraded" if run.backend.degraded else "Full"
        facts: dict[str, Any] = {"jobFeatures": features}
        found = self._failures(run.uid)
        ends = [] if found is None else [(found.time, word(found), found.msg)]
        turns = [] if run.failure is None else [run.failure]
        if ends or turns:
            at, reason, message = max(ends + turns)
            text = message[:MESSAGE_LENGTH]
            facts["lastError"] = {"time": timestamp(at), "reason": reason, "message": text}
        return facts

    async def _send(self, found: Object, patch: dict[str, Any], fresh: list[Condition]) -> None:
        namespace, name = found["metadata"]["namespace"], found["metadata"]["name"]
        patched = await self._cluster.patch(RUNS, namespace, name, {"status": patch}, sub="status")
        reached("status")
        if patched is None:
            return
        self._stored(patched)
        for condition in fresh:
            what = f"{condition['type']}={condition['status']} {condition['reason']}"
            log.info("%s/%s: %s %s", namespace, name, what, condition["message"])
            warning = (condition["type"] in GOOD) != (condition["status"] == "True")
            await self._events.emit(
                found, reason=condition["reason"], message=condition["message"] or what,
                warning=warning and condition["type"] not in {"Suspended", "Progressing"},
            )  # fmt: skip


def truths(run: ActiveRun, plan: Plan) -> list[Truth]:
    """Conditions that only the cluster's side knows."""
    context, ledger = run.context, run.context.state
    found = [Truth(type="StoreAvailable", status=True, reason="Connected")]
    began = ledger.run.version if ledger.run is not None else ""
    health = of_optimizer(
        context.view, run.optimizer.trouble, began=began, version=context.run.identity.version
    )
    if health is not None:
        found.append(health)
    if plan.held is None and plan.phase is not Phase.SUSPENDED:
        found += of_jobs(context.observed.jobs, run.backend.waiting)
    return found

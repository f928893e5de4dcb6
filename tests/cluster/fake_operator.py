"""The operator's parts around a `FakeCluster`: real informers, queue, reconciler and Redis ledger.

Only the API server is a fake, and the optimizer runs in this process instead of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from qtt_core.optimizer import Optimizer, build, setup_prior, setup_space
from qtt_core.steps import BudgetView, OptimizerEvent, OptimizerSetup, Proposal, Recommendation
from qtt_operator.active_run import Key
from qtt_operator.cluster import JOBS, PODS, RUNS, Cluster, Object, Resource
from qtt_operator.cluster_backend import Copies, trim_job, trim_pod
from qtt_operator.informer import Informer, Informers, run_uid
from qtt_operator.metrics import Metrics
from qtt_operator.optimizer_pool import Answer, SpaceIdentity
from qtt_operator.optimizer_share import OptimizerShare
from qtt_operator.reconcile import Reconciler
from qtt_operator.settings import OperatorSettings
from qtt_operator.store import EmbeddedStore
from qtt_operator.workqueue import WorkQueue
from tests.cluster.fake_cluster import FakeCluster

SETTINGS = OperatorSettings(status_seconds=0.0, resync_seconds=5.0)


class InProcessOptimizer:
    """`SharedOptimizer` without the process."""

    trouble: tuple[str, str] | None = None

    def __init__(self) -> None:
        self._optimizer: Optimizer | None = None

    async def describe(self, setup: OptimizerSetup) -> SpaceIdentity:
        space, _ = setup_space(setup)
        setup_prior(setup)
        return SpaceIdentity(space_id=space.space_id, space_sha=space.sha)

    async def load(
        self, setup: OptimizerSetup, events: Sequence[tuple[str, OptimizerEvent]]
    ) -> None:
        self._optimizer = build(setup)
        await self.tell(events)

    async def tell(self, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        assert self._optimizer is not None
        for position, event in events:
            if position:
                self._optimizer.feed(event)

    async def ask(self, n: int, budget: BudgetView) -> Answer:
        assert self._optimizer is not None
        self._optimizer.retract()
        proposals = tuple(self._optimizer.ask(n, budget))
        return Answer(proposals=proposals, finished=self._optimizer.finished, position="")

    async def recommend(self) -> Recommendation | None:
        assert self._optimizer is not None
        return self._optimizer.recommend()

    async def explain(self, proposal: Proposal) -> str:
        assert self._optimizer is not None
        return self._optimizer.explain(proposal)


class InProcessShare:
    """`OptimizerShare` without processes."""

    def port(self, timeout_seconds: float = 60.0) -> InProcessOptimizer:
        return InProcessOptimizer()

    def drop(self, port: InProcessOptimizer) -> None:
        pass


class FakeOperator:
    """One leader's parts; several may follow each other on one cluster and store."""

    def __init__(
        self,
        cluster: FakeCluster,
        store: EmbeddedStore,
        *,
        epoch: int = 1,
        settings: OperatorSettings = SETTINGS,
        api: Cluster | None = None,
        share: OptimizerShare | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.cluster, self.store, self.settings = cluster, store, settings
        self.fatal: list[BaseException] = []
        self.queue: WorkQueue[Key] = WorkQueue(self._reconcile)
        self.api = api or cluster
        copies = Copies(jobs=self._informers(JOBS, trim_job), pods=self._informers(PODS, trim_pod))
        self.copies = copies
        self.client = store.client()
        self.shift: Callable[[], float] = lambda: 0.0
        self.metrics = metrics or Metrics()
        self.reconciler = Reconciler(
            cluster=self.api, copies=copies, store=self.client,  # type: ignore[arg-type]
            share=share or InProcessShare(), settings=settings, epoch=epoch,  # type: ignore[arg-type]
            enqueue=self.queue.add, fatal=self.fatal.append, metrics=self.metrics,
            clock=lambda: time.time() + self.shift(),
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def running(self, *, stepping: bool = True) -> AsyncIterator[FakeOperator]:
        """Informers, queue and a watch of TuningRuns at work; leaving is like a kill."""
        work = [self.copies.jobs.run(), self.copies.pods.run(), self._follow_runs()]
        tasks = [asyncio.create_task(part) for part in work]
        await self.copies.jobs.synced()
        await self.copies.pods.synced()
        tasks.append(asyncio.create_task(self.queue.run()))
        if stepping:
            tasks.append(asyncio.create_task(self._step()))
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.client.aclose()

    async def until(self, seen: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for something to be so."""
        async with asyncio.timeout(seconds):
            while not seen():
                await asyncio.sleep(0.005)

    def shift_clock(self, seconds: Callable[[], float]) -> None:
        """Let the operator's clock be ahead of the cluster's."""
        self.shift = seconds

    def run(self, name: str = "toy") -> Object:
        """The TuningRun as the server has it."""
        return self.cluster.objects[("tuningruns", "default", name)]

    def condition(self, kind: str) -> Object:
        """One condition, {} where there is none."""
        found = (self.run().get("status") or {}).get("conditions") or []
        return next((c for c in found if c["type"] == kind), {})

    def is_true(self, kind: str) -> bool:
        """Whether a condition is True."""
        return self.condition(kind).get("status") == "True"

    async def edit(self, **spec: Any) -> None:
        """A person changes the spec."""
        await self.cluster.patch(RUNS, "default", "toy", {"spec": spec})

    async def _reconcile(self, key: Key) -> float | None:
        return await self.reconciler.reconcile(key)

    async def _step(self) -> None:
        while True:
            self.cluster.step()
            await asyncio.sleep(0.005)

    async def _follow_runs(self) -> None:
        """What kopf does for us."""
        seen: dict[str, str] = {}
        while True:
            now: dict[str, str] = {}
            for (plural, _, name), found in list(self.cluster.objects.items()):
                if plural == "tuningruns":
                    now[name] = found["metadata"]["resourceVersion"]
                    if seen.get(name) != now[name]:
                        self.reconciler.run_changed(found)
            for name in seen.keys() - now.keys():
                for (_, gone), known in list(self.reconciler.objects.items()):
                    if gone == name:
                        self.reconciler.run_deleted(known)
            seen = now
            await asyncio.sleep(0.01)

    def _informers(self, resource: Resource, trim: Callable[[Object], Object]) -> Informers:
        part = Informer(
            self.api, resource, trim=trim, on_change=self._changed,  # type: ignore[arg-type]
            on_delete=self._job_gone if resource == JOBS else self._pod_gone,
        )  # fmt: skip
        return Informers({"": part})

    def _changed(self, found: Object) -> None:
        self.reconciler.child_changed(run_uid(found))

    def _job_gone(self, job: Object) -> None:
        backend = self.reconciler.backend_of(run_uid(job))
        if backend is not None:
            backend.job_deleted(job)
        self._changed(job)

    def _pod_gone(self, pod: Object) -> None:
        backend = self.reconciler.backend_of(run_uid(pod))
        if backend is not None:
            backend.pod_deleted(pod)
        self._changed(pod)


def manifest(name: str = "toy", **spec: Any) -> Object:
    """A TuningRun of the tiny hub, as the server would store it."""
    return {
        "apiVersion": "quicktune.dev/v1alpha1",
        "kind": "TuningRun",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "dataset": {"claimName": "data"},
            "search": {"space": "native", "hub": "tiny", "portfolio": "None", "poolSize": 16},
            "fidelity": {"max": 3, "step": 1, "stepsPerJob": 1},
            "optimizer": {"algorithm": "Random", "seed": 1},
            "budget": {"maxSteps": 6},
            "parallelism": 2,
            **spec,
        },
    }

"""The operator on a cluster: `python -m qtt_operator controller`.

One asyncio program: leader election, then kopf for TuningRuns, our informers for Jobs and Pods, a
queue of runs, a pool of optimizer workers, and an HTTP port for probes and metrics. kopf only says
that a TuningRun changed; everything else is level-triggered and ours.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from typing import Any

import kopf
from redis.asyncio import Redis

from qtt_core.errors import StoreUnavailableError
from qtt_operator.cli import Outcome
from qtt_operator.cluster import JOBS, PODS, Cluster, Object
from qtt_operator.cluster_backend import Copies, trim_job, trim_pod
from qtt_operator.exits import INTERRUPTED
from qtt_operator.informer import Informer, run_uid
from qtt_operator.leader import Leader
from qtt_operator.names import GROUP
from qtt_operator.optimizer_share import OptimizerShare
from qtt_operator.reconcile import Key, Reconciler
from qtt_operator.redis_client import client_of_url, highest_epoch, raise_epoch, server_clock_offset
from qtt_operator.settings import OperatorSettings, load_settings
from qtt_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)


def controller_verb(arguments: argparse.Namespace) -> Outcome:
    """`qtt controller`: run until SIGTERM."""
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # a line for each of our writes
    asyncio.run(run_operator(load_settings(arguments.settings)))
    return Outcome()


async def run_operator(settings: OperatorSettings) -> None:
    """Wait for the Lease, then work until a signal. Leaves the process when leadership is lost."""
    cluster = await Cluster.connect(qps=settings.api_qps, burst=settings.api_burst)
    store = client_of_url(settings.redis_url)
    identity = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    leader = Leader(
        cluster, namespace=settings.lease_namespace, name=settings.lease_name,
        identity=identity, highest_epoch=lambda: _highest_epoch(store),
    )  # fmt: skip
    try:
        epoch = await leader.acquire()
        cluster.guard = leader.check
        with contextlib.suppress(StoreUnavailableError):
            await raise_epoch(store, epoch)
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(_keep(leader))
            operator = _Operator(cluster, store, settings, epoch)
            await operator.run()
            keeping.cancel()
        await leader.release()
    finally:
        await store.aclose()
        await cluster.close()


async def _highest_epoch(store: Redis) -> int:
    """0 while the store is away: the fence of each run then tells whether ours is high enough."""
    try:
        return await highest_epoch(store)
    except StoreUnavailableError as error:
        log.warning("%s", error)
        return 0


async def _keep(leader: Leader) -> None:
    try:
        await leader.keep()
    except Exception as error:  # noqa: BLE001  # whatever it is: not the leader any more
        stop_at_once(error)


def stop_at_once(error: BaseException) -> None:
    """End this process now: another one may already be working."""
    log.critical("stopping: %s", error)
    logging.shutdown()
    os._exit(INTERRUPTED)


class _Operator:
    """What the leader runs."""

    def __init__(
        self, cluster: Cluster, store: Redis, settings: OperatorSettings, epoch: int
    ) -> None:
        self._cluster, self._store, self._settings = cluster, store, settings
        namespaces = settings.namespaces
        self._copies = Copies(
            jobs=Informer(
                cluster, JOBS, namespaces[0] if namespaces else "", trim=trim_job,
                on_change=self._child_changed, on_delete=self._job_deleted,
            ),
            pods=Informer(
                cluster, PODS, namespaces[0] if namespaces else "", trim=trim_pod,
                on_change=self._child_changed, on_delete=self._pod_deleted,
            ),
        )  # fmt: skip
        self._share = OptimizerShare(settings.optimizer_workers)
        self._queue: WorkQueue[Key] = WorkQueue(self._reconcile)
        self._offset = 0.0
        self.reconciler = Reconciler(
            cluster=cluster, copies=self._copies, store=store, share=self._share,
            settings=settings, epoch=epoch, enqueue=self._queue.add, fatal=stop_at_once,
            clock=lambda: time.time() + self._offset,
        )  # fmt: skip

    async def run(self) -> None:
        """Until a signal stops kopf."""
        tasks = [
            asyncio.create_task(self._copies.jobs.run()),
            asyncio.create_task(self._copies.pods.run()),
            asyncio.create_task(self._follow_clock()),
        ]
        await self._copies.jobs.synced.wait()
        await self._copies.pods.synced.wait()
        tasks.append(asyncio.create_task(self._queue.run()))
        try:
            await self._watch_runs()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._share.close()

    async def _watch_runs(self) -> None:
        """kopf: every TuningRun there is, then every change of one."""
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(_login)
        kopf.on.event(GROUP, "v1alpha1", "tuningruns", registry=registry)(self._run_seen)
        await kopf.operator(
            registry=registry, settings=_kopf_settings(), standalone=True,
            clusterwide=not self._settings.namespaces, namespaces=self._settings.namespaces,
        )  # fmt: skip

    async def _run_seen(self, *, event: Any, **_: Any) -> None:
        found: Object = event["object"]
        if event["type"] == "DELETED":
            self.reconciler.run_deleted(found)
        else:
            self.reconciler.run_changed(found)

    async def _reconcile(self, key: Key) -> float | None:
        return await self.reconciler.reconcile(key)

    async def _follow_clock(self) -> None:
        """Times of the ledger are the store's: count with its clock, whatever ours says."""
        while True:
            with contextlib.suppress(Exception):
                self._offset = await server_clock_offset(self._store)
            await asyncio.sleep(60.0)

    def _child_changed(self, found: Object) -> None:
        self.reconciler.child_changed(run_uid(found))

    def _job_deleted(self, job: Object) -> None:
        backend = self.reconciler.backend_of(run_uid(job))
        if backend is not None:
            backend.job_deleted(job)
        self._child_changed(job)

    def _pod_deleted(self, pod: Object) -> None:
        backend = self.reconciler.backend_of(run_uid(pod))
        if backend is not None:
            backend.pod_deleted(pod)
        self._child_changed(pod)


def _login(**kwargs: Any) -> Any:
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def _kopf_settings() -> kopf.OperatorSettings:
    """No scanning, no Events, no peering, no annotations: kopf is our watch of TuningRuns."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.persistence.finalizer = f"{GROUP}/kopf"
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 270
    settings.networking.request_timeout = 30
    return settings

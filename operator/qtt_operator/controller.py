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

from qtt_core.errors import (
    ClusterError,
    QuickTuneError,
    StaleEpochError,
    StoreError,
    StoreUnavailableError,
)
from qtt_operator import http_port
from qtt_operator.active_run import Key
from qtt_operator.cli import Outcome
from qtt_operator.cluster import JOBS, PODS, Cluster, Object, Resource
from qtt_operator.cluster_backend import Copies, trim_job, trim_pod
from qtt_operator.cluster_events import EVERY_SECONDS
from qtt_operator.cluster_status import ended
from qtt_operator.exits import INTERRUPTED
from qtt_operator.failpoints import reached
from qtt_operator.fenced import pods_folder, remember, remembered
from qtt_operator.informer import Informer, Informers, run_uid
from qtt_operator.leader import Leader
from qtt_operator.metrics import Metrics
from qtt_operator.names import GROUP
from qtt_operator.optimizer_share import OptimizerShare
from qtt_operator.reconcile import Reconciler
from qtt_operator.redis_client import (
    client_of_url,
    highest_epoch,
    raise_epoch,
    server_clock_offset,
    syncs_always,
)
from qtt_operator.settings import OperatorSettings, load_settings
from qtt_operator.vitals import CountedWorkers, Vitals
from qtt_operator.warmth import Warmth, any_unfinished
from qtt_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

STORE_LOOK_SECONDS, SWEEP_SECONDS = 60.0, 600.0
EVERYSEC_DELAY = 2.0
"""Between a commit and the Job's time to live, where Redis writes to disk once a second."""


def controller_verb(arguments: argparse.Namespace) -> Outcome:
    """`qtt controller`: run until SIGTERM."""
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # a line for each of our writes
    asyncio.run(run_operator(load_settings(arguments.settings)))
    return Outcome()


async def run_operator(settings: OperatorSettings) -> None:
    """Wait for the Lease, then work until a signal. Leaves the process when leadership is lost."""
    cluster = await Cluster.connect(qps=settings.api_qps, burst=settings.api_burst)
    store = client_of_url(settings.redis_url, settings.redis_password_file)
    operator = Operator(cluster, store, settings)
    try:
        await operator.run()
    finally:
        await store.aclose()
        await cluster.close()


def stop_at_once(error: BaseException) -> None:
    """End this process now: another one may already be working."""
    log.critical("stopping: %s", error)
    if isinstance(error, StaleEpochError):
        remember(pods_folder())
    logging.shutdown()
    os._exit(INTERRUPTED)


class Operator:
    """The parts of one process, and how they hang together."""

    def __init__(self, cluster: Cluster, store: Redis, settings: OperatorSettings) -> None:
        self._cluster, self._store, self._settings = cluster, store, settings
        self._metrics = Metrics()
        self._leader = Leader(
            cluster, namespace=settings.lease_namespace, name=settings.lease_name,
            identity=f"{socket.gethostname()}-{secrets.token_hex(4)}",
            highest_epoch=self._highest_epoch, lease_seconds=settings.lease_seconds,
        )  # fmt: skip
        self._offset = 0.0
        self._share = OptimizerShare(settings.optimizer_workers, news=CountedWorkers(self._metrics))
        self._queue: WorkQueue[Key] = WorkQueue(self._reconcile)
        self._copies = Copies(jobs=self._informers(JOBS), pods=self._informers(PODS))
        self._reconciler: Reconciler | None = None
        self._vitals = Vitals(
            self._metrics, cluster=cluster, leader=self._leader, queue=self._queue,
            copies=self._copies,
        )  # fmt: skip
        cluster.observer = self._metrics.api_called
        if fenced := remembered(pods_folder()):
            self._metrics.add("store_commit_results", "stale", amount=fenced)

    async def run(self) -> None:
        """Stand by, lead, and let go in order when a signal ends kopf."""
        settings = self._settings
        port = await http_port.serve(
            settings.metrics_port, metrics=self._vitals.text,
            healthy=self._vitals.unwell, ready=self._vitals.unready,
        )  # fmt: skip
        warmth = Warmth(self._share, self._unfinished)
        tasks = [
            asyncio.create_task(self._vitals.watch_loop()), asyncio.create_task(warmth.run())
        ]  # fmt: skip
        try:
            epoch = await self._leader.acquire()
            reached("elected")
            self._cluster.guard = self._leader.check
            tasks.append(asyncio.create_task(self._keep_leading()))
            await self._look_at_store()
            self._reconciler = self._vitals.reconciler = self._new_reconciler(epoch)
            tasks += [
                asyncio.create_task(self._copies.jobs.run()),
                asyncio.create_task(self._copies.pods.run()),
                asyncio.create_task(self._follow_store()),
                asyncio.create_task(self._flush_events()),
            ]
            await self._copies.jobs.synced()
            await self._copies.pods.synced()
            tasks.append(asyncio.create_task(self._queue.run()))
            self._vitals.working = True
            await self._watch_runs()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._share.close()
            await port.cleanup()
            with contextlib.suppress(QuickTuneError):
                await self._leader.release()

    # --- parts -------------------------------------------------------------------------------

    def _informers(self, resource: Resource) -> Informers:
        trim = trim_job if resource == JOBS else trim_pod
        gone = self._job_deleted if resource == JOBS else self._pod_deleted
        return Informers(
            {
                namespace: Informer(
                    self._cluster, resource, namespace,
                    trim=trim, on_change=self._child_changed, on_delete=gone,
                )
                for namespace in self._settings.namespaces or ("",)
            }
        )  # fmt: skip

    def _new_reconciler(self, epoch: int) -> Reconciler:
        return Reconciler(
            cluster=self._cluster, copies=self._copies, store=self._store, share=self._share,
            settings=self._settings, epoch=epoch, enqueue=self._queue.add, fatal=stop_at_once,
            metrics=self._metrics, instance=self._leader.identity, install=self._leader.install,
            clock=lambda: time.time() + self._offset,
        )  # fmt: skip

    async def _watch_runs(self) -> None:
        """kopf: every TuningRun there is, then every change of one, until a signal."""
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(_login)
        kopf.on.event(GROUP, "v1alpha1", "tuningruns", registry=registry)(self._run_seen)
        await kopf.operator(
            registry=registry, settings=_kopf_settings(), standalone=True,
            clusterwide=not self._settings.namespaces, namespaces=self._settings.namespaces,
        )  # fmt: skip

    async def _keep_leading(self) -> None:
        try:
            await self._leader.keep()
        except Exception as error:  # noqa: BLE001  # whatever it is: not the leader any more
            stop_at_once(error)

    # --- what the parts tell each other --------------------------------------------------------

    async def _reconcile(self, key: Key) -> float | None:
        assert self._reconciler is not None  # the queue runs after election
        return await self._reconciler.reconcile(key)

    async def _run_seen(self, *, event: Any, **_: Any) -> None:
        assert self._reconciler is not None
        found: Object = event["object"]
        if event["type"] == "DELETED":
            self._reconciler.run_deleted(found)
        else:
            self._reconciler.run_changed(found)

    def _child_changed(self, found: Object) -> None:
        if self._reconciler is not None:
            self._reconciler.child_changed(run_uid(found))

    def _job_deleted(self, job: Object) -> None:
        backend = self._reconciler and self._reconciler.backend_of(run_uid(job))
        if backend:
            backend.job_deleted(job)
        self._child_changed(job)

    def _pod_deleted(self, pod: Object) -> None:
        backend = self._reconciler and self._reconciler.backend_of(run_uid(pod))
        if backend:
            backend.pod_deleted(pod)
        self._child_changed(pod)

    # --- the store ----------------------------------------------------------------------------

    async def _highest_epoch(self) -> int:
        """0 while the store is away: the fence of each run then tells whether ours will do."""
        try:
            return await highest_epoch(self._store)
        except StoreUnavailableError as error:
            log.warning("%s", error)
            return 0

    async def _follow_store(self) -> None:
        sweep_at = 0.0
        while True:
            await asyncio.sleep(STORE_LOOK_SECONDS)
            await self._look_at_store()
            if time.monotonic() >= sweep_at:
                await self._sweep()
                sweep_at = time.monotonic() + SWEEP_SECONDS

    async def _sweep(self) -> None:
        """Part with runs that went while nobody watched."""
        if self._reconciler is not None:
            try:
                await self._reconciler.sweep()
            except (StoreError, ClusterError) as error:
                log.warning("sweep: %s", error)

    async def _look_at_store(self) -> None:
        """Its clock dates every event: we count with it. Its settings say when a write is safe."""
        try:
            await raise_epoch(self._store, self._leader.epoch)
            self._offset = await server_clock_offset(self._store)
            always = await syncs_always(self._store)
        except StoreError as error:
            log.warning("%s", error)
            return
        if self._reconciler is not None:
            self._reconciler.commit_delay_seconds = 0.0 if always else EVERYSEC_DELAY

    async def _unfinished(self) -> bool:
        """Whether any TuningRun is not over: from our copies, or, on standby, from the server."""
        if self._vitals.working and self._reconciler is not None:
            return not all(map(ended, self._reconciler.objects.values()))
        return await any_unfinished(self._cluster, self._settings.namespaces)

    async def _flush_events(self) -> None:
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            if self._reconciler is not None:
                await self._reconciler.events.flush()


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

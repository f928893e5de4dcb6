"""How the operator's process is: its probes, and the gauges that are read when Prometheus asks.

Liveness is what a restart can mend: a stuck event loop, a watch that fell silent, a Lease nobody
looks at. An outage of Redis or of the API server is not: the next process could do no better.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from qtt_operator.active_run import Key
from qtt_operator.cluster import Cluster
from qtt_operator.cluster_backend import Copies
from qtt_operator.leader import Leader
from qtt_operator.metrics import Metrics
from qtt_operator.optimizer_share import ShareNews
from qtt_operator.reconcile import Reconciler
from qtt_operator.workqueue import WorkQueue

LAG_LOOK_SECONDS = 0.25

SILENCE_SECONDS = 600.0
LAG_SECONDS = 30.0
LEASE_LOOKS = 30
"""An informer that heard nothing, a loop that was stuck, a Lease that nobody looked at so often as
it should have been: restart this process."""

CALLS = {
    "ask": "optimizer_ask_seconds",
    "tell": "optimizer_tell_seconds",
    "load": "optimizer_replay_seconds",
}
ORPHANS = ("open_without_job", "job_without_open")


class Vitals:
    """Probes and gauges of one process; `reconciler` is set once it leads."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        cluster: Cluster,
        leader: Leader,
        queue: WorkQueue[Key],
        copies: Copies,
    ) -> None:
        self._metrics, self._cluster, self._leader = metrics, cluster, leader
        self._queue, self._copies = queue, copies
        self._lag = 0.0
        self.reconciler: Reconciler | None = None
        self.working = False
        """Whether a leader's informers are in step and its queue is served."""

    async def watch_loop(self) -> None:
        """Measure how late the event loop wakes up, until cancelled."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_LOOK_SECONDS)
            self._lag = max(0.0, time.monotonic() - before - LAG_LOOK_SECONDS)
            self._metrics.observe("event_loop_lag_seconds", self._lag)

    def unwell(self) -> str:
        """Why this process should be restarted, empty if it should not."""
        if self._lag > LAG_SECONDS:
            return f"the event loop was stuck for {self._lag:.0f} s"
        unseen = self._leader.unseen_seconds
        if unseen > LEASE_LOOKS * self._leader.look_seconds:
            return f"the Lease was not looked at for {unseen:.0f} s"
        if self.reconciler is None:
            return ""
        silence = max(self._copies.jobs.silent_seconds, self._copies.pods.silent_seconds)
        return f"no word of the API server for {silence:.0f} s" if silence > SILENCE_SECONDS else ""

    def unready(self) -> str:
        """Why this process can neither lead nor stand by, empty if it can."""
        if not self._leader.has_looked:
            return "the Lease was not read yet"
        if self._leader.leads and not self.working:
            return "elected; Jobs and pods are being listed"
        return ""

    def text(self) -> bytes:
        """Every metric, as Prometheus reads it."""
        metrics, copies = self._metrics, self._copies
        metrics.set("leader", int(self._leader.leads))
        metrics.set("lease_epoch", self._leader.epoch)
        metrics.set("workqueue_depth", self._queue.depth)
        metrics.set("workqueue_oldest_seconds", self._queue.oldest_seconds)
        metrics.add_up_to("api_throttled_seconds", self._cluster.throttled_seconds)
        for name, copy in (("jobs", copies.jobs), ("pods", copies.pods)):
            metrics.set("informer_last_event_seconds", copy.silent_seconds, name)
            metrics.add_up_to("informer_relists", copy.relists, name)
        if self.reconciler is not None:
            self._of_runs(self.reconciler)
        return metrics.text()

    def _of_runs(self, reconciler: Reconciler) -> None:
        phases = Counter[tuple[str, ...]](
            (key[0], str((found.get("status") or {}).get("phase", "Pending")))
            for key, found in reconciler.objects.items()
        )
        self._metrics.replace("runs", phases)
        found = reconciler.run_metrics.orphans()
        for kind in ORPHANS:
            self._metrics.set("ledger_orphans", found[kind], kind)


class CountedWorkers(ShareNews):
    """Feeds the metrics what the optimizer workers do."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def called(self, op: str, algorithm: str, seconds: float) -> None:
        """A call was answered."""
        if op in CALLS:
            self._metrics.observe(CALLS[op], seconds, algorithm)

    def lost(self, reason: str) -> None:
        """A worker was lost and is started again."""
        self._metrics.add("optimizer_worker_restarts", reason)

    def fell_back(self) -> None:
        """An ask was answered at random."""
        self._metrics.add("optimizer_fallback_asks")

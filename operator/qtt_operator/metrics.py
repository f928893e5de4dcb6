"""Every metric of the operator, in one table; what Prometheus reads at /metrics.

Prefix `quicktune_`. The label `run` stands on gauges of active runs only and is removed with them;
no label ever names a configuration, a step, a Job or a pod, so that the number of series stays
bounded whatever runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import qtt_core

SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 30)
LONG = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
SHARE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1)
SPEED = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000)
BYTES = tuple(2.0**power for power in range(28, 38))  # 256 MiB to 128 GiB
RATIO = (0.1, 0.25, 0.5, 0.7, 0.85, 1, 1.15, 1.4, 2, 4, 10)
RUN = ("namespace", "run")

GIT_VARIABLE = "QTT_GIT"
"""Set in the image: the commit it was built from."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class Metrics:
    """The registry and its metrics; one instance per process."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    _gauges: dict[str, Gauge] = field(default_factory=dict)
    _counters: dict[str, Counter] = field(default_factory=dict)
    _histograms: dict[str, Histogram] = field(default_factory=dict)
    _totals: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (text, labels) in GAUGES.items():
            self._gauges[name] = Gauge(f"quicktune_{name}", text, labels, registry=self.registry)
        for name, (text, labels) in COUNTERS.items():
            self._counters[name] = Counter(
                f"quicktune_{name}", text, labels, registry=self.registry
            )
        for name, (text, labels, buckets) in HISTOGRAMS.items():
            self._histograms[name] = Histogram(
                f"quicktune_{name}", text, labels, buckets=buckets, registry=self.registry
            )
        git = os.environ.get(GIT_VARIABLE, "")
        self.set("build_info", 1, qtt_core.__version__, git, qtt_core.__version__)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        gauge = self._gauges[name]
        (gauge.labels(*labels) if labels else gauge).set(value)

    def add(self, name: str, *labels: str, amount: float = 1.0) -> None:
        """Raise a counter."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(amount)

    def add_up_to(self, name: str, total: float, *labels: str) -> None:
        """Raise a counter to a total that is counted elsewhere."""
        known = self._totals.get((name, labels), 0.0)
        if total > known:
            self._totals[name, labels] = total
            self.add(name, *labels, amount=total - known)

    def replace(self, name: str, values: Mapping[tuple[str, ...], float]) -> None:
        """Set every series of a gauge; those that are not named end."""
        self._gauges[name].clear()
        for labels, value in values.items():
            self.set(name, value, *labels)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Record a value of a histogram."""
        histogram = self._histograms[name]
        (histogram.labels(*labels) if labels else histogram).observe(value)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)

    def turn(self, result: str, seconds: float) -> None:
        """A turn of a run ended: `ok`, or why it did not."""
        self.observe("reconcile_seconds", seconds, result)
        if result != "ok":
            self.add("reconcile_errors", result)

    def api_called(self, verb: str, resource: str, code: str, seconds: float) -> None:
        """A call of the Kubernetes API was answered."""
        self.add("api_requests", verb, resource, code)
        self.observe("api_request_seconds", seconds, verb, resource)

    def store_called(self, op: str, seconds: float, result: str) -> None:
        """A call of Redis was answered: `error`, a script's reply or nothing."""
        self.observe("store_op_seconds", seconds, op)
        if result == "error":
            self.add("store_errors", op)
        elif result:
            self.add("store_commit_results", result.lower())

    def forget_run(self, namespace: str, run: str) -> None:
        """Remove every series of a run that is active no more."""
        for name, (_, labels) in GAUGES.items():
            if "run" in labels:
                self._gauges[name].remove_by_labels({"namespace": namespace, "run": run})


GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "build_info": ("What runs here, always 1.", ("version", "git", "optimizer_version")),
    "leader": ("1 while this process holds the Lease.", ()),
    "lease_epoch": ("Epoch that fences this process's writes to the ledger.", ()),
    "runs": ("TuningRuns by phase.", ("namespace", "phase")),
    "run_info": ("What an active run uses, always 1.", (*RUN, "algorithm", "portfolio")),
    "run_best_score": ("Recommended score in [0, 1], higher is better.", RUN),
    "run_progress_ratio": ("Share of the budget that is used, the largest of all limits.", RUN),
    "run_eta_seconds": ("Expected time until the budget is used.", RUN),
    "checkpoint_bytes": ("Newest checkpoints of an active run's configurations.", RUN),
    "run_open_jobs": ("Jobs of an active run.", (*RUN, "state")),
    "run_budget_consumed_ratio": ("Share of one limit that is used.", (*RUN, "kind")),
    "workqueue_depth": ("Runs that wait for a turn.", ()),
    "workqueue_oldest_seconds": ("How long the first of them has waited.", ()),
    "informer_last_event_seconds": ("Since the API server last said anything.", ("resource",)),
    "ledger_orphans": ("Open decisions without a Job, Jobs without a decision.", ("kind",)),
}

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "steps": ("Steps that ended, by outcome.", ("namespace", "outcome")),
    "step_failures": ("Attempts without a result, by reason.", ("namespace", "reason")),
    "step_cost_gpu_seconds": ("Device-seconds charged.", ("namespace", "gpu_product", "kind")),
    "optimizer_worker_restarts": ("Optimizer workers started again.", ("reason",)),
    "optimizer_fallback_asks": ("Asks answered without the optimizer.", ()),
    "reconcile_errors": ("Turns that failed.", ("reason",)),
    "api_requests": ("Calls of the Kubernetes API.", ("verb", "resource", "code")),
    "api_throttled_seconds": ("Time calls waited for our own limit.", ()),
    "informer_relists": ("Full lists.", ("resource",)),
    "store_errors": ("Calls of Redis that failed.", ("op",)),
    "store_commit_results": ("Answers of the ledger's scripts.", ("result",)),
}

HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "step_phase_seconds": ("Parts of a step's time.", ("phase",), LONG),
    "step_images_per_second": ("Images trained in a second of training.", (), SPEED),
    "step_data_wait_ratio": ("Share of training in which no batch was there.", (), SHARE),
    "step_peak_memory_bytes": ("The most memory of a step, of its device.", (), BYTES),
    "cost_prediction_ratio": ("Measured over predicted seconds of a step.", (), RATIO),
    "optimizer_ask_seconds": ("Time of an ask.", ("algorithm",), SHORT),
    "optimizer_tell_seconds": ("Time to tell results.", ("algorithm",), SHORT),
    "optimizer_replay_seconds": ("Time to build an optimizer again.", ("algorithm",), SHORT),
    "reconcile_seconds": ("Time of a turn.", ("result",), SHORT),
    "event_loop_lag_seconds": ("How late the event loop wakes up.", (), SHORT),
    "api_request_seconds": ("Time of an API call.", ("verb", "resource"), SHORT),
    "store_op_seconds": ("Time of a call of Redis.", ("op",), SHORT),
}

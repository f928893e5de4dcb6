"""Every metric of the operator, in one table; what Prometheus reads at /metrics.

Prefix `quicktune_`. The label `run` stands on gauges of active runs only and is removed with them;
no label ever names a configuration, a step, a Job or a pod, so that the number of series stays
bounded whatever runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import qtt_core
from qtt_core.ledger.events import Cancel, Done, Event, Fail, Prepared, Retry
from qtt_core.plan import JobPhase
from qtt_core.steps import Recommendation
from qtt_operator.turn import RunContext

SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LONG = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
RUN = ("namespace", "run")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class Metrics:
    """The registry and its metrics; one instance per process."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    _gauges: dict[str, Gauge] = field(default_factory=dict)
    _counters: dict[str, Counter] = field(default_factory=dict)
    _histograms: dict[str, Histogram] = field(default_factory=dict)

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
        self.set("build_info", 1, qtt_core.__version__)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        gauge = self._gauges[name]
        (gauge.labels(*labels) if labels else gauge).set(value)

    def add(self, name: str, *labels: str, amount: float = 1.0) -> None:
        """Raise a counter."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(amount)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Record a value of a histogram."""
        histogram = self._histograms[name]
        (histogram.labels(*labels) if labels else histogram).observe(value)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)

    # --- what the events of a run say ----------------------------------------------------------

    def record(self, namespace: str, events: Iterable[Event], step: int) -> None:
        """Count newly committed events; call once per event."""
        for event in events:
            if isinstance(event, Done):
                self.observe("step_phase_seconds", event.q, "queue")
                wasted = event.ov
                self.add("step_cost_gpu_seconds", namespace, event.gpu, "overhead", amount=wasted)
                trained = max(0.0, event.dev - wasted)
                self.add("step_cost_gpu_seconds", namespace, event.gpu, "train", amount=trained)
                count = max(1, -(-len(event.epochs) // step))
                self.add("steps", namespace, event.state, amount=count)
                self.observe("step_phase_seconds", trained, "train")
            elif isinstance(event, Fail):
                self.observe("step_phase_seconds", event.q, "queue")
                self.add("steps", namespace, "failed")
                self.add("step_failures", namespace, event.state)
                self.add("step_cost_gpu_seconds", namespace, event.gpu, "wasted", amount=event.dev)
            elif isinstance(event, Retry | Cancel):
                self.observe("step_phase_seconds", event.q, "queue")
                outcome = "infra" if isinstance(event, Retry) else "cancelled"
                self.add("steps", namespace, outcome)
                self.add("step_failures", namespace, event.reason)
                self.add("step_cost_gpu_seconds", namespace, "", "wasted", amount=event.dev)
            elif isinstance(event, Prepared):
                self.add("step_cost_gpu_seconds", namespace, "", "overhead", amount=event.dev)

    # --- gauges of active runs -----------------------------------------------------------------

    def describe_run(self, namespace: str, context: RunContext) -> None:
        """Set the gauges of a run from what is known of it."""
        state, spec = context.state, context.run.spec
        labels = (namespace, context.run.identity.name)
        self.set("run_info", 1, *labels, spec.optimizer.algorithm, spec.search.portfolio)
        best: Recommendation | None = context.recommendation
        if best is not None:
            self.set("run_best_score", best.score, *labels)
        phases = [job.phase for job in context.observed.jobs]
        for phase in (JobPhase.QUEUED, JobPhase.PENDING, JobPhase.RUNNING):
            self.set("run_open_jobs", phases.count(phase), *labels, phase.value)
        shares = []
        if spec.budget.max_steps:
            shares.append(("steps", state.steps / spec.budget.max_steps))
        if spec.budget.max_gpu_seconds:
            shares.append(("gpu_seconds", state.charged_seconds / spec.budget.max_gpu_seconds))
        if spec.budget.max_wallclock and state.first_time:
            passed = (context.clock() - state.first_time) / spec.budget.max_wallclock
            shares.append(("wallclock", passed))
        for kind, share in shares:
            self.set("run_budget_consumed_ratio", share, *labels, kind)
        progress = max([share for _, share in shares], default=0.0)
        self.set("run_progress_ratio", min(1.0, progress), *labels)
        if 0.0 < progress < 1.0 and state.first_time:
            passed = context.clock() - state.first_time
            self.set("run_eta_seconds", passed * (1 - progress) / progress, *labels)

    def forget_run(self, namespace: str, run: str) -> None:
        """Remove every series of a run that is active no more."""
        for name, (_, labels) in GAUGES.items():
            if "run" in labels:
                with contextlib.suppress(KeyError):
                    self._gauges[name].remove_by_labels({"namespace": namespace, "run": run})


GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "build_info": ("Version of the operator, always 1.", ("version",)),
    "leader": ("1 while this process holds the Lease.", ()),
    "lease_epoch": ("Epoch that fences this process's writes to the ledger.", ()),
    "runs": ("TuningRuns by phase.", ("namespace", "phase")),
    "run_info": ("What an active run uses, always 1.", (*RUN, "algorithm", "portfolio")),
    "run_best_score": ("Recommended score in [0, 1], higher is better.", RUN),
    "run_progress_ratio": ("Share of the budget that is used, the largest of all limits.", RUN),
    "run_eta_seconds": ("Expected time until the budget is used.", RUN),
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
    "optimizer_ask_seconds": ("Time of an ask.", ("algorithm",), SHORT),
    "reconcile_seconds": ("Time of a turn.", ("result",), SHORT),
    "event_loop_lag_seconds": ("How late the event loop wakes up.", (), SHORT),
    "api_request_seconds": ("Time of an API call.", ("verb", "resource"), SHORT),
    "store_op_seconds": ("Time of a call of Redis.", ("op",), SHORT),
}

"""The `.status` of a run, computed from what is known: bounded, rebuildable, for people. Pure.

The same shape goes to a TuningRun's status on a cluster and to `status.yaml` on one machine.
Scores are shown as the metric's own values (a log loss as a loss), as strings, never as floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from qtt_core import plan as p
from qtt_core.history import ConfigHistory, closed_configs
from qtt_core.ledger.fold import LedgerState
from qtt_core.limits import template_hash
from qtt_core.retention import ranked, recommended
from qtt_core.spec import RunSpec
from qtt_core.steps import Metric, Recommendation
from qtt_operator.conditions import Truth, of_run
from qtt_operator.names import checkpoint_folder
from qtt_operator.report import evaluated
from qtt_operator.status_schema import MESSAGE_LENGTH, TOP

Condition = dict[str, Any]


def build_status(
    *,
    spec: RunSpec,
    identity: p.Identity,
    ledger: LedgerState,
    histories: Mapping[int, ConfigHistory],
    observed: p.Observed,
    phase: p.Phase,
    held: tuple[str, str] | None,
    recommendation: Recommendation | None,
    now: float,
    seconds_left: float | None = None,
    previous: Sequence[Condition] = (),
) -> dict[str, Any]:
    """The status as a JSON-able mapping, of the shape of `status_schema`: at most a few KiB."""
    status: dict[str, Any] = {
        "phase": phase.value,
        "seed": identity.seed,
        "epoch": ledger.epoch,
        "conditions": _merged(of_run(ledger, phase, held), now, previous),
        "jobs": _jobs(ledger, observed),
        "configs": {
            "started": len(histories),
            "stopped": closed_configs(histories),
            "failed": len(ledger.failed),
        },
        "consumed": {
            "steps": ledger.steps,
            "gpuSeconds": round(ledger.charged_seconds),
            "overheadSeconds": round(ledger.overhead_seconds * spec.charged_devices),
            "wastedSeconds": round(ledger.wasted_seconds),
            "queueSeconds": round(ledger.queue_seconds),
        },
        "top": [_trial(h, spec.metric) for h in ranked(histories, TOP)],
        "specHash": identity.spec_hash[:12],
    }
    if identity.prior:
        status["prior"] = identity.prior.rpartition("@")[0]
    if spec.template:
        status["templateHash"] = template_hash(spec)
    if ledger.first_time:
        status["startTime"] = _time(ledger.first_time)
    if ledger.last_end:
        status["lastStepTime"] = _time(ledger.last_end)
    if seconds_left is not None and ledger.closed is None:
        status["estimatedCompletionTime"] = _time(now + seconds_left)
    if ledger.closed is not None:
        status["completionTime"] = _time(ledger.closed.time)
    if recommendation is not None:
        scores = evaluated(ledger.notes)
        status["best"] = _best(recommendation, histories, spec.metric, scores)
    return status


def shown(score: float, metric: Metric) -> str:
    """A score as the metric's own value, four digits."""
    return f"{metric.to_value(score):.4f}"


def _jobs(ledger: LedgerState, observed: p.Observed) -> dict[str, int]:
    live = [job for job in observed.jobs if job.phase is not p.JobPhase.ENDED]
    running = sum(1 for job in live if job.phase is p.JobPhase.RUNNING)
    return {
        "running": running,
        "queued": len(live) - running,
        "succeeded": ledger.results,
        "failed": len(ledger.failed),
        "infraRetries": ledger.infra_retries,
    }


def _trial(history: ConfigHistory, metric: Metric) -> dict[str, Any]:
    best = history.best_score
    epoch = history.best_epoch or 0
    return {
        "configID": history.config_id,
        "model": str(history.config.get("model", ""))[:256],
        "score": "" if best is None else shown(best, metric),
        "fidelity": epoch,
        "costSeconds": f"{history.trained_seconds:.1f}",
    }


def _best(
    recommendation: Recommendation,
    histories: Mapping[int, ConfigHistory],
    metric: Metric,
    scores: Mapping[tuple[int, int], Mapping[str, Any]],
) -> dict[str, Any]:
    history = histories[recommendation.config_id]
    epoch = recommended(history, recommendation) or history.checkpoint_epoch
    best = {
        "score": shown(recommendation.score, metric),
        "observedScore": shown(recommendation.best_observed.score, metric),
        "fidelity": recommendation.fidelity,
        "checkpoint": checkpoint_folder(str(history.config_id), epoch),
    }
    tested = scores.get((history.config_id, epoch))
    if tested is not None:
        best["testScore"] = f"{float(tested[metric.name]):.4f}"
    ended = {"time": _time(history.ended_at)} if history.ended_at else {}
    return _trial(history, metric) | best | ended


def _merged(truths: Sequence[Truth], now: float, previous: Sequence[Condition]) -> list[Condition]:
    """A time moves only with its condition's status."""
    old = {condition["type"]: condition for condition in previous}
    for truth in truths:
        status, known = str(truth.status), old.get(truth.type, {})
        same = known.get("status") == status
        old[truth.type] = {
            "type": truth.type,
            "status": status,
            "reason": truth.reason,
            "message": truth.message[:MESSAGE_LENGTH],
            "lastTransitionTime": known["lastTransitionTime"] if same else _time(now),
        }
    return list(old.values())


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

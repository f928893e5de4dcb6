"""Writes the chart's three Grafana dashboards: `python docs/dashboards.py`.

A panel is a few words here: title, what the answer is called, what is asked, unit. Names of metrics
are checked against the operator's by tests/chart/test_dashboards.py, which also compares the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]

FOLDER = Path(__file__).parents[1] / "helm" / "quicktune-operator" / "dashboards"
WIDTH, HEIGHT = 8, 8
"""Of a panel, in Grafana's grid of 24 columns."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = '{namespace="$namespace", run="$run"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A panel: `asked` maps a legend, with labels in double braces, to a PromQL expression."""

    title: str
    asked: dict[str, str]
    kind: str = "timeseries"
    unit: str = "short"
    stacked: bool = False
    text: str = ""


def now(metric: str, by: str) -> str:
    """A gauge, added up by a label."""
    return f"sum by ({by}) (quicktune_{metric})"


def rate(metric: str, by: str, where: str = "") -> str:
    """How much a counter grows in a second, by labels."""
    return f"sum by ({by}) (rate(quicktune_{metric}{where}[$__rate_interval]))"


def a_minute(metric: str, by: str, where: str = "") -> str:
    """How much a counter grows in a minute, by labels."""
    return f"60 * {rate(metric, by, where)}"


def in_sight(metric: str, by: str) -> str:
    """How much a counter grew in the time that the dashboard shows.

    One that first appeared in that time was 0 before, which `increase` does not know.
    """
    name = f"quicktune_{metric}"
    grown = f"(max_over_time({name}[$__range]) unless {name} offset $__range)"
    return f"sum by ({by}) ({grown} or increase({name}[$__range]))"


def quantile(q: float, metric: str, by: str = "") -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', f'le, {by}' if by else 'le')})"


def middle_and_tail(metric: str, by: str = "") -> dict[str, str]:
    """p50 and p99 of a histogram."""
    suffix = f" {{{{{by}}}}}" if by else ""
    return {f"p{q * 100:.0f}{suffix}": quantile(q, metric, by) for q in (0.5, 0.99)}


def split(
    title: str, asked: Callable[[str, str], str], metric: str, by: str, **options: Any
) -> Panel:
    """A panel of one metric, a line for each value of its labels."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return Panel(title=title, asked={legend: asked(metric, by)}, **options)


FLEET = [
    split("Runs by phase", now, "runs", "phase", stacked=True),
    split("Open Jobs", now, "run_open_jobs", "state", stacked=True),
    split("Steps a minute, by outcome", a_minute, "steps_total", "outcome", stacked=True),
    split(
        "Devices in use, by what for", rate, "step_cost_gpu_seconds_total", "kind", stacked=True
    ),
    split(
        "Device-seconds in this time, by device", in_sight, "step_cost_gpu_seconds_total",
        "gpu_product", kind="bargauge", unit="s",
    ),
    split(
        "Attempts without a result in this time, by reason", in_sight, "step_failures_total",
        "reason", kind="bargauge",
    ),
    Panel(
        title="Time in a queue",
        asked={"{{le}}": rate("step_phase_seconds_bucket", "le", '{phase="queue"}')},
        kind="heatmap", unit="s",
    ),
    Panel(
        title="Where a step's time goes (mean)",
        asked={
            "{{phase}}": f"{rate('step_phase_seconds_sum', 'phase')}"
            f" / {rate('step_phase_seconds_count', 'phase')}"
        },
        unit="s", stacked=True,
    ),
    Panel(
        title="Images a second of training (median)",
        asked={"": quantile(0.5, "step_images_per_second")},
    ),
    Panel(
        title="Share of training that waits for images (median)",
        asked={"": quantile(0.5, "step_data_wait_ratio")}, unit="percentunit",
    ),
    Panel(
        title="Most memory of a step on its device (p90)",
        asked={"p90": quantile(0.9, "step_peak_memory_bytes")}, unit="bytes",
    ),
    Panel(
        title="Progress of active runs",
        asked={"{{namespace}}/{{run}}": "quicktune_run_progress_ratio"},
        kind="bargauge", unit="percentunit",
    ),
]  # fmt: skip

ONE_RUN = [
    Panel(
        title="Best score so far, and share of the budget used",
        asked={
            "best score": f"quicktune_run_best_score{RUN}",
            "budget": f"quicktune_run_progress_ratio{RUN}",
        },
        unit="percentunit",
    ),
    Panel(
        title="Best score", asked={"": f"quicktune_run_best_score{RUN}"},
        kind="stat", unit="percentunit",
    ),
    Panel(title="Time left", asked={"": f"quicktune_run_eta_seconds{RUN}"}, kind="stat", unit="s"),
    Panel(
        title="Budget used", asked={"{{kind}}": f"quicktune_run_budget_consumed_ratio{RUN}"},
        kind="bargauge", unit="percentunit",
    ),
    Panel(title="Open Jobs", asked={"{{state}}": f"quicktune_run_open_jobs{RUN}"}, stacked=True),
    Panel(title="Checkpoints", asked={"size": f"quicktune_checkpoint_bytes{RUN}"}, unit="bytes"),
    Panel(
        title="Steps a minute in this namespace, by outcome",
        asked={"{{outcome}}": a_minute("steps_total", "outcome", '{namespace="$namespace"}')},
        stacked=True,
    ),
    Panel(
        title="Measured over predicted seconds of a step, all runs",
        asked={
            "median": quantile(0.5, "cost_prediction_ratio"),
            "p90": quantile(0.9, "cost_prediction_ratio"),
        },
    ),
    Panel(
        title="The best five", asked={}, kind="text",
        text="    kubectl get tnr $run -n $namespace -o jsonpath='{.status.top}'",
    ),
]  # fmt: skip

OPERATOR = [
    Panel(title="Leader", asked={"{{instance}}": "quicktune_leader"}, kind="stat"),
    split("Version", now, "build_info", "version", kind="stat"),
    Panel(title="Epoch", asked={"{{instance}}": "quicktune_lease_epoch"}, kind="stat"),
    Panel(title="Time of a turn", asked=middle_and_tail("reconcile_seconds"), unit="s"),
    split("Turns that failed a minute, by reason", a_minute, "reconcile_errors_total", "reason"),
    Panel(
        title="Runs that wait for a turn",
        asked={
            "waiting": "quicktune_workqueue_depth",
            "oldest, s": "quicktune_workqueue_oldest_seconds",
        },
    ),
    Panel(
        title="Time of an ask",
        asked=middle_and_tail("optimizer_ask_seconds", "algorithm"), unit="s",
    ),
    Panel(
        title="Optimizer: restarts and fallback asks in this time",
        asked={
            "restart: {{reason}}": in_sight("optimizer_worker_restarts_total", "reason"),
            "fallback": "sum(increase(quicktune_optimizer_fallback_asks_total[$__range]))",
        },
    ),
    Panel(title="Event loop late by", asked=middle_and_tail("event_loop_lag_seconds"), unit="s"),
    split("API calls a second, by answer", rate, "api_requests_total", "code", stacked=True),
    split(
        "API calls a second, by what", rate, "api_requests_total", "verb, resource", stacked=True
    ),
    Panel(
        title="Time of an API call; waiting for our own limit",
        asked=middle_and_tail("api_request_seconds")
        | {"throttled": "sum(rate(quicktune_api_throttled_seconds_total[$__rate_interval]))"},
        unit="s",
    ),
    Panel(
        title="Time of a call of Redis", asked=middle_and_tail("store_op_seconds", "op"), unit="s"
    ),
    Panel(
        title="Answers of the ledger, and errors, a minute",
        asked={
            "{{result}}": a_minute("store_commit_results_total", "result"),
            "error: {{op}}": a_minute("store_errors_total", "op"),
        },
    ),
    Panel(
        title="Since the API server last said anything; relists; orphans",
        asked={
            "{{resource}}, s": "quicktune_informer_last_event_seconds",
            "relists of {{resource}} a minute": a_minute("informer_relists_total", "resource"),
            "{{kind}}": "quicktune_ledger_orphans",
        },
    ),
]  # fmt: skip


def grafana_panel(number: int, panel: Panel) -> Json:
    """A panel as Grafana stores it, at its place in the grid."""
    row, column = divmod(number, 24 // WIDTH)
    place = {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT}
    base = {"id": number + 1, "type": panel.kind, "title": panel.title, "gridPos": place}
    if panel.kind == "text":
        return {**base, "options": {"mode": "markdown", "content": panel.text}}
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 40} if panel.stacked else {}
    defaults = {"unit": panel.unit, "min": 0, "custom": custom}
    return {
        **base, "datasource": SOURCE, "targets": _targets(panel), "options": _options(panel.kind),
        "fieldConfig": {"defaults": defaults, "overrides": []},
    }  # fmt: skip


def _targets(panel: Panel) -> list[Json]:
    shape = "heatmap" if panel.kind == "heatmap" else "time_series"
    return [
        {
            "refId": chr(ord("A") + number), "datasource": SOURCE, "format": shape,
            "expr": expression, "legendFormat": legend,
        }
        for number, (legend, expression) in enumerate(panel.asked.items())
    ]  # fmt: skip


def _options(kind: str) -> Json:
    if kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": "s"}}
    if kind in {"stat", "bargauge"}:
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal"}
    return {"legend": {"displayMode": "list", "placement": "bottom"}}


def variable(name: str, asked: str) -> Json:
    """A choice at the top of a dashboard, out of the labels of a metric."""
    return {
        "name": name, "type": "query", "datasource": SOURCE, "refresh": 2, "sort": 1,
        "query": {"query": asked, "refId": name},
    }  # fmt: skip


def dashboard(uid: str, title: str, panels: list[Panel], *choices: Json) -> Json:
    """A dashboard of Grafana 10 or later."""
    source = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    link = {"type": "dashboards", "tags": ["quicktune"], "title": "Quick-Tune", "asDropdown": True}
    return {
        "uid": uid, "title": f"Quick-Tune / {title}", "tags": ["quicktune"], "schemaVersion": 39,
        "version": 1, "editable": True, "refresh": "30s", "timezone": "",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, *choices]}, "links": [link],
        "panels": [grafana_panel(number, panel) for number, panel in enumerate(panels)],
    }  # fmt: skip


def dashboards() -> dict[str, Json]:
    """File name -> dashboard."""
    choices = (
        variable("namespace", "label_values(quicktune_run_info, namespace)"),
        variable("run", 'label_values(quicktune_run_info{namespace="$namespace"}, run)'),
    )
    return {
        "fleet.json": dashboard("quicktune-fleet", "Fleet", FLEET),
        "run.json": dashboard("quicktune-run", "Run", ONE_RUN, *choices),
        "operator.json": dashboard("quicktune-operator", "Operator", OPERATOR),
    }


def text_of(board: Json) -> str:
    """As the file has it."""
    return json.dumps(board, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, board in dashboards().items():
        (FOLDER / name).write_text(text_of(board), encoding="utf-8")

"""Which columns people see of leaderboard and statistics; JSON and CSV carry every field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtt_core.steps import Metric
from qtt_operator.output import Column
from qtt_operator.report import settings

Record = Mapping[str, Any]


def _score(metric: Metric, field: str) -> Column:
    def cell(record: Record) -> str:
        value = record.get(field)
        return "–" if value is None else f"{value:.4f}"

    title = {"value": metric.name, "test": "test"}[field]
    return Column(title=title, cell=cell, right=True, style="bold" if field == "value" else "")


def _config(record: Record) -> str:
    return f"c{record['config_id']}"


def _hyper(record: Record, name: str) -> str:
    value = record["hyperparameters"].get(name)
    return f"{value:.3g}" if isinstance(value, float) else "–" if value is None else str(value)


def _details(record: Record) -> str:
    """Key settings without optimizer and learning rate, which have columns of their own."""
    words = settings(record["hyperparameters"], 4).split(", ")
    return ", ".join(words[1:])


def leaderboard_columns(metric: Metric, *, tested: bool) -> list[Column]:
    """Rank, configuration, scores, model, optimizer, key settings, epochs, seconds."""
    columns = [
        Column(
            title="",
            cell=lambda r: f"{'★' if r['best'] else ' '} {r['rank']}",
            right=True,
            style="yellow",
        ),
        Column(title="config", cell=_config, style="cyan"),
        _score(metric, "value"),
    ]
    if tested:
        columns.append(_score(metric, "test"))
    return [
        *columns,
        Column(title="epoch", cell=lambda r: str(r["fidelity"]), right=True),
        Column(title="train s", cell=lambda r: f"{r['cost']:.1f}", right=True),
        Column(title="model", cell=lambda r: str(r["model"])),
        Column(title="opt", cell=lambda r: _hyper(r, "opt")),
        Column(title="lr", cell=lambda r: _hyper(r, "lr"), right=True),
        Column(title="settings", cell=_details, style="dim", flexible=True),
    ]


_STATE_NOTE = {"open": "unfinished", "paused": "paused", "finished": "finished"}


def statistics_columns(metric: Metric) -> list[Column]:
    """Every configuration: what it is, how far it came, what it cost, where it stands."""
    return [
        Column(title="config", cell=_config, style="cyan"),
        _score(metric, "value"),
        Column(title="epochs", cell=lambda r: str(r["epochs"]), right=True),
        Column(title="steps", cell=lambda r: str(r["steps"]), right=True),
        Column(title="train s", cell=lambda r: f"{r['cost']:.1f}", right=True),
        Column(title="state", cell=lambda r: _STATE_NOTE.get(r["state"], str(r["state"]))),
        Column(title="model", cell=lambda r: str(r["model"])),
        Column(title="device s", cell=lambda r: f"{r['device_seconds']:.1f}", right=True),
        Column(title="opt", cell=lambda r: _hyper(r, "opt")),
        Column(title="lr", cell=lambda r: _hyper(r, "lr"), right=True),
        Column(title="settings", cell=_details, style="dim", flexible=True),
    ]


def status_columns() -> list[Column]:
    """The few lines of `qtt get`."""
    return [
        Column(title="", cell=lambda r: str(r["name"]), style="dim"),
        Column(title="", cell=lambda r: str(r["value"]), flexible=True),
    ]

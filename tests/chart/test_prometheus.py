"""A real Prometheus scrapes the operator's metrics and evaluates every panel and every rule."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_dashboards import BOARDS, board, expressions

from qtt_operator.metrics import CONTENT_TYPE, COUNTERS, GAUGES, HISTOGRAMS, Metrics

LABELS = {
    "namespace": "vision",
    "run": "birds",
    "phase": "queue",
    "state": "running",
    "kind": "train",
}
GRAFANA = {
    "$__rate_interval": "5s", "$__range": "30s", "$namespace": "vision", "$run": "birds",
}  # fmt: skip
"""What Grafana puts in for its own variables and for the choices of a person."""


class Operator(BaseHTTPRequestHandler):
    """An operator whose every metric moves with each look at it."""

    shown = Metrics()
    looks = count(1)

    def do_GET(self) -> None:
        look = next(self.looks)
        for name, (_, labels) in GAUGES.items():
            self.shown.set(name, look, *(LABELS.get(label, "x") for label in labels))
        for name, (_, labels) in COUNTERS.items():
            self.shown.add(name, *(LABELS.get(label, "x") for label in labels), amount=look)
        for name, (_, labels, _) in HISTOGRAMS.items():
            self.shown.observe(name, look, *(LABELS.get(label, "x") for label in labels))
        self.shown.set("leader", 1)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.end_headers()
        self.wfile.write(self.shown.text())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


class Asked:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer. Raises: urllib.error.URLError, also for a query that is wrong."""
        text = urllib.parse.urlencode(query)
        with urllib.request.urlopen(f"{self._root}/{path}?{text}", timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[Any]:
        found: list[Any] = self.get("query", query=expression)["result"]
        return found


@pytest.fixture(scope="module")
def asked(
    prometheus: str, chart: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Asked]:
    """Prometheus, after it has looked at the operator often enough for every rate."""
    folder = tmp_path_factory.mktemp("prometheus")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Operator)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    job = {
        "job_name": "quicktune", "honor_labels": True,
        "static_configs": [
            {
                "targets": [f"127.0.0.1:{server.server_port}"],
                "labels": {"namespace": "quicktune-system"},
            }
        ],
    }  # fmt: skip
    config = folder / "prometheus.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(chart / "files" / "alerts.yaml")],
                "scrape_configs": [job],
            }
        )
    )
    port = free_port()
    words = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [prometheus, *words, f"--web.listen-address=127.0.0.1:{port}"], stderr=log
        )
    found = Asked(port)
    try:
        deadline = time.monotonic() + 120
        while not _has_looked_often(found):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield found
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()


def _has_looked_often(asked: Asked) -> bool:
    try:
        return bool(asked.values("count_over_time(quicktune_leader[5s]) >= 3"))
    except OSError:
        return False


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_has_data(name: str, asked: Asked, chart: Path) -> None:
    empty = []
    for expression in expressions(board(chart, name)):
        if expression.startswith("label_values"):
            continue
        for variable, value in GRAFANA.items():
            expression = expression.replace(variable, value)
        if not asked.values(expression):
            empty.append(expression)

    assert empty == []


def test_every_rule_can_be_evaluated_and_none_fires_at_once(asked: Asked) -> None:
    rules = [rule for group in asked.get("rules")["groups"] for rule in group["rules"]]

    assert len(rules) >= 14
    assert {rule["name"] for rule in rules if rule["health"] == "err"} == set()
    firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
    assert firing <= {"QuickTuneFencedWrites"}  # has no patience: every counter moves here


def test_a_metric_keeps_its_own_namespace_and_the_others_get_the_operators(asked: Asked) -> None:
    (best,) = asked.values("quicktune_run_best_score")
    (leader,) = asked.values("quicktune_leader")

    assert best["metric"]["namespace"] == "vision"
    assert leader["metric"]["namespace"] == "quicktune-system"

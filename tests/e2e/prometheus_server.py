"""A real Prometheus beside the cluster.

Debian's cannot look for pods: a thread keeps a file of them for it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from real_cluster import Kube, connect, until

PORT, TARGETS = 19090, "targets.json"
SOONER = {"m": 6, "h": 360}
"""Seconds that a minute and an hour of the rules become: all is ten times as fast."""


class Prometheus:
    """A running server."""

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer. Raises: urllib.error.URLError, also for a query that is wrong."""
        text = urllib.parse.urlencode(query)
        with urllib.request.urlopen(
            f"http://127.0.0.1:{PORT}/api/v1/{path}?{text}", timeout=30
        ) as answer:
            return json.load(answer)["data"]

    def now(self, expression: str) -> list[Any]:
        """The series that an expression has now."""
        found: list[Any] = self.get("query", query=expression)["result"]
        return found

    def since(self, begin: float, expression: str, step: int = 2) -> list[Any]:
        """The series of an expression from `begin` until now, a value every `step` seconds."""
        found: list[Any] = self.get(
            "query_range", query=expression, start=str(begin), end=str(time.time()), step=str(step)
        )["result"]
        return found

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        alerts = self.get("alerts")["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}


def program() -> str | None:
    """PATH, or where tests/chart/prometheus.sh puts it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache / "testbed/prometheus/bin/prometheus"
    return shutil.which("prometheus") or (str(kept) if kept.exists() else None)


def sooner(rules: str) -> str:
    """Rules with every time ten times shorter."""
    times = re.compile(r"(?<=[\[ ])(\d+)([mh])(?=[\]\)\s])")
    return times.sub(lambda found: f"{int(found[1]) * SOONER[found[2]]}s", rules)


def configuration(folder: Path) -> Mapping[str, Any]:
    """Scrape once a second who is in the file of targets."""
    job = {
        "job_name": "quicktune", "honor_labels": True,
        "file_sd_configs": [{"files": [str(folder / TARGETS)], "refresh_interval": "1s"}],
    }  # fmt: skip
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")], "scrape_configs": [job],
    }  # fmt: skip


def keep_targets(folder: Path, namespace: str, over: threading.Event) -> None:
    """The addresses of the operator's pods, as its Service has them, until it is over."""
    kube = Kube(namespace=namespace, api=connect().api)
    while not over.wait(0.5):
        with contextlib.suppress(OSError, http.client.HTTPException, LookupError):
            pods = kube.items("pod", "app.kubernetes.io/name=quicktune-operator")
            found = [f"{p['status']['podIP']}:8080" for p in pods if p["status"].get("podIP")]
            part = folder / "part"
            text = [{"targets": found, "labels": {"namespace": namespace}}]
            part.write_text(json.dumps(text))
            part.rename(folder / TARGETS)
    kube.api.close()


@contextmanager
def prometheus(binary: str, folder: Path, rules: str, namespace: str) -> Iterator[Prometheus]:
    """A server that scrapes the operator's pods and evaluates the rules, until the block ends."""
    (folder / "rules.yaml").write_text(rules)
    config = folder / "prometheus.yaml"
    config.write_text(yaml.safe_dump(dict(configuration(folder))))
    over = threading.Event()
    targets = threading.Thread(target=keep_targets, args=(folder, namespace, over))
    targets.start()
    words = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [binary, *words, f"--web.listen-address=127.0.0.1:{PORT}"], stderr=log
        )
    found = Prometheus()
    try:
        until("the operator is scraped", lambda: found.now("quicktune_leader == 1"), seconds=60)
        yield found
    finally:
        over.set()
        process.kill()
        process.wait()
        targets.join()
        sys.stderr.write((folder / "log").read_text()[-3000:])  # shown where a test failed

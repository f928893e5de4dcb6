"""A write that the ledger refused is seen by Prometheus, although its process is gone at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from qtt_operator.fenced import pods_folder, remember, remembered

FENCED = """
from qtt_core.errors import StaleEpochError
from qtt_operator.controller import stop_at_once
stop_at_once(StaleEpochError("a newer leader works"))
"""
NEXT = """
import asyncio, sys
from qtt_operator.cluster import Cluster
from qtt_operator.controller import Operator
from qtt_operator.redis_client import client_of_url
from qtt_operator.settings import OperatorSettings

async def start():
    cluster = Cluster.__new__(Cluster)
    return Operator(cluster, client_of_url("redis://nowhere:1/0", ""), OperatorSettings())

sys.stdout.buffer.write(asyncio.run(start())._metrics.text())
"""


def process(words: str, folder: Path, **pod: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "KUBERNETES_SERVICE_HOST"}
    return subprocess.run(
        [sys.executable, "-c", words], env={**environment, "TMPDIR": str(folder), **pod},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_next_process_of_the_pod_shows_how_often_a_write_was_refused(tmp_path: Path) -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    for _ in range(2):
        ended = process(FENCED, tmp_path, **pod)
        assert ended.returncode == 75, ended.stderr

    shown = process(NEXT, tmp_path, **pod)

    assert 'quicktune_store_commit_results_total{result="stale"} 2.0' in shown.stdout, shown.stderr


def test_outside_of_a_pod_nothing_is_kept(tmp_path: Path) -> None:
    assert process(FENCED, tmp_path).returncode == 75

    assert list(tmp_path.iterdir()) == []
    assert pods_folder({}) is None
    assert remembered(None) == 0


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    remember(tmp_path / "away")

    assert remembered(tmp_path / "away") == 0

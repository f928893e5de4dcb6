"""Operators as processes beside the cluster: started in a second, killed, frozen, clocks shifted.

They use the cluster's Redis and API server like the operator's pod, which is away meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from real_cluster import Kube, until

LEASE_SECONDS = 4
PASSWORD = "testbed-only"  # of tests/testbed/redis.yaml


@dataclass(slots=True, kw_only=True)
class Operators:
    """Where they run. `folder`: for settings and logs."""

    system: Kube
    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, failpoint: str = "", **environment: str) -> subprocess.Popen[bytes]:
        """One more candidate for the Lease."""
        number = len(self.started)
        address = self.system.get("pod", "redis-0")["status"]["podIP"]
        settings = self.folder / "settings.json"
        settings.write_text(json.dumps(self.settings()))
        variables = {
            "QTT_REDIS_URL": f"redis://:{PASSWORD}@{address}:6379/0",
            "QTT_FAILPOINT": failpoint, "OMP_NUM_THREADS": "1", **environment,
        }  # fmt: skip
        words = [sys.executable, "-m", "qtt_operator", "controller", "--settings", str(settings)]
        with (self.folder / f"operator-{number}.log").open("w") as log:
            process = subprocess.Popen(
                words, env={**os.environ, **variables}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    @staticmethod
    def settings() -> dict[str, object]:
        """Short waits, so that a test has them too."""
        return {
            "lease_namespace": "quicktune-system", "lease_seconds": LEASE_SECONDS,
            "trainer_image": "testbed.local/trainer:1", "metrics_port": 0, "status_seconds": 1,
            "checkpoint_defaults": {"size": "64Mi"}, "node_lost_grace_seconds": 3,
        }  # fmt: skip

    def died(self, process: subprocess.Popen[bytes], seconds: float = 300.0) -> int:
        """Its exit code, once it has one; its workers go with it."""
        until("the operator ended", lambda: process.poll() is not None, seconds=seconds)
        self.kill(process)
        return int(process.returncode)

    def kill(self, process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
        """Signal it and its workers."""
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if number == signal.SIGKILL:
            process.wait(timeout=30)

    def log(self) -> str:
        """The last lines of each."""
        texts = sorted(self.folder.glob("operator-*.log"), key=lambda p: p.stat().st_mtime)
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in texts[-4:])


@contextmanager
def operators(system: Kube, folder: Path) -> Iterator[Operators]:
    """The pod's place, for as long as the block runs."""
    workload = "deployment/quicktune-operator"
    system.kubectl("scale", workload, "--replicas=0")
    pods = "app.kubernetes.io/name=quicktune-operator"
    until("the operator's pod is away", lambda: not system.items("pod", pods))
    made = Operators(system=system, folder=folder)
    try:
        yield made
    finally:
        for process in made.started:
            made.kill(process)
        system.kubectl("scale", workload, "--replicas=1")
        system.kubectl("rollout", "status", workload, "--timeout=120s")

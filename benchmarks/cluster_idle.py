"""What an operator costs that has nothing to do, and how soon after `helm install` it works.

    python benchmarks/cluster_idle.py              # about 6 minutes, boots its own cluster

The chart with its own Redis, images already there. Idle: there is no TuningRun, so no optimizer
worker runs; memory is what is resident, CPU and API requests are over a window (`--seconds`), the
requests from the API server's audit log. Then all is uninstalled, installed again, and the digits
example applied at once: seconds from the beginning of `helm install` until the operator is ready
and until the status counts the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from cluster_world import verdict

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))

from manifests import data_claim, namespace
from real_cluster import Kube, Testbed, command, connect, until

ROOT = Path(__file__).resolve().parents[1]
RELEASE, HOME = "quicktune-operator", "quicktune-system"
ACCOUNT = f"system:serviceaccount:{HOME}:{RELEASE}"
BUNDLED = {
    "bundled": {"enabled": True, "image": {"repository": "testbed.local/redis", "tag": "1"}},
    "external": {"url": ""},
    "existingSecret": {"name": ""},
}

LOOK = """
import json, os, pathlib
ticks, found = os.sysconf("SC_CLK_TCK"), {}
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    if int(folder.name) == os.getpid():
        continue
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    pages = int((folder / "statm").read_text().split()[1])
    found[folder.name] = [pages * os.sysconf("SC_PAGE_SIZE"), sum(map(int, fields[11:15])) / ticks]
print(json.dumps(found))
"""
"""Of every process in the operator's container: resident bytes, CPU seconds with its children's."""


def inside() -> None:
    """Run this script again in a new cluster with our images, unless it is in one already."""
    if "TESTBED_DIR" in os.environ:
        return
    tools = ROOT / "tests" / "testbed"
    images = subprocess.run(
        [sys.executable, tools / "images.py"], check=True, capture_output=True, text=True
    ).stdout.strip()
    boot = [sys.executable, str(tools / "cluster.py"), "run", "--resource", "nvidia.com/gpu=4"]
    where = ["--audit", "--image", images, "--dir", tempfile.mkdtemp(prefix="qtt-idle-")]
    sys.exit(subprocess.call([*boot, *where, "--", sys.executable, *sys.argv]))


def install(kube: Kube) -> float:
    """`helm install` until Redis and the operator are ready; seconds."""
    begun = time.monotonic()
    values = yaml.safe_load((ROOT / "tests/testbed/values.yaml").read_text()) | {"redis": BUNDLED}
    chart = ("install", RELEASE, str(ROOT / "helm" / RELEASE))
    command("helm", *chart, "-n", HOME, "--values", "-", stdin=yaml.safe_dump(values))
    kube.kubectl("rollout", "status", f"deployment/{RELEASE}", "--timeout=300s")
    return time.monotonic() - begun


def uninstall(kube: Kube) -> None:
    """Everything, the data too: the second install is like the first."""
    command("helm", "uninstall", RELEASE, "-n", HOME, "--wait")
    kube.kubectl("delete", "pvc,secret", "--all", "--timeout=120s")


def look(kube: Kube) -> dict[str, tuple[float, float]]:
    """Process id -> (resident bytes, CPU seconds so far)."""
    found: dict[str, Any] = json.loads(kube.execute(f"deployment/{RELEASE}", "python", "-c", LOOK))
    return {number: (memory, cpu) for number, (memory, cpu) in found.items()}


def idle(testbed: Testbed, kube: Kube, seconds: float) -> list[bool]:
    """Wait for start-up to be over, then measure; whether each bound holds."""
    time.sleep(30.0)
    requests, before, begun = asked(testbed), look(kube), time.monotonic()
    time.sleep(seconds)
    after, window = look(kube), time.monotonic() - begun
    calls = asked(testbed) - requests
    cpu = sum(after[n][1] - before.get(n, (0.0, 0.0))[1] for n in after)
    share = 100 * cpu / window
    megabytes = {number: memory / 2**20 for number, (memory, _) in after.items()}
    print(f"idle for {window:.0f} s: {len(after)} processes, {calls} API requests")
    return [
        verdict("main process, resident", megabytes["1"], 150.0, " MiB"),
        verdict("pod, resident", sum(megabytes.values()), 200.0, " MiB"),
        verdict("share of a core", share, 2.0, " %"),
        verdict("API requests a second", calls / window, 1.0, ""),
    ]


def asked(testbed: Testbed) -> int:
    """Requests of the operator so far; of a watch its beginning counts."""
    mine = [e for e in testbed.audit() if e["user"].get("username") == ACCOUNT]
    return len({e["auditID"] for e in mine})


def first_step(testbed: Testbed, kube: Kube) -> list[bool]:
    """A fresh install and the digits example; whether both bounds hold."""
    folder = testbed.folder / "data" / "digits"
    script = ROOT / "examples" / "digits" / "prepare.py"
    subprocess.run([sys.executable, script, "--to", folder], check=True, capture_output=True)
    kube.create(namespace("digits", "restricted"))
    user = Kube(namespace="digits", api=testbed.api)
    user.create(*data_claim("digits", "digits", folder))
    manifest = yaml.safe_load((ROOT / "examples/digits/tuningrun-cluster.yaml").read_text())
    begun = time.monotonic()
    ready = install(kube)
    user.apply(text=yaml.safe_dump(manifest))
    until("a step is counted", lambda: told(user), seconds=900, every=0.2)
    return [
        verdict("helm install -> operator ready", ready, 60.0, " s"),
        verdict("helm install -> first finished step", time.monotonic() - begun, 120.0, " s"),
    ]


def told(kube: Kube) -> int:
    """Steps that the status counts."""
    found: int = kube.get("tuningrun", "digits")["status"]["consumed"]["steps"]
    return found


def main() -> None:
    """Boot, measure, print; exit 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="how long it is watched idle")
    arguments = parser.parse_args()
    inside()
    testbed = connect()
    Kube(namespace="default", api=testbed.api).create(namespace(HOME, "restricted"))
    kube = Kube(namespace=HOME, api=testbed.api)
    install(kube)
    held = idle(testbed, kube, arguments.seconds)
    uninstall(kube)
    sys.exit(0 if all(held + first_step(testbed, kube)) else 1)


if __name__ == "__main__":
    main()

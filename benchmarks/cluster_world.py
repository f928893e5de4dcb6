"""A cluster of fake nodes for benchmarks: the real operator, Redis and API server, no containers.

Scripts call `inside`, which boots a test cluster around them, and `World`, which installs what the
operator needs there. A kubelet of a few lines ends the pods: it answers as the simulated trainer
does, with the nonce of the job document that the pod carries. Needs Linux, root and Go
(tests/testbed/README.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from qtt_core.jobs import parse_job
from qtt_core.testing.trainer import Volume, result_of
from qtt_operator.cluster import JOBS, PODS, RUNS, Cluster, Object
from qtt_operator.informer import run_uid
from qtt_operator.job_ends import terminated
from qtt_operator.names import COMPONENT_LABEL, RUN_UID_LABEL
from qtt_operator.store import EmbeddedStore

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "out"
SYSTEM, ACCOUNT = "quicktune-system", "quicktune-operator"
USER = f"system:serviceaccount:{SYSTEM}:{ACCOUNT}"
WRITES = {"create", "update", "patch", "delete"}
RIGHTS = {"Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"}


def inside(*options: str) -> None:
    """Run this script again in a new cluster, unless it is in one already."""
    if "TESTBED_DIR" in os.environ:
        return
    boot = [sys.executable, str(ROOT / "tests/testbed/cluster.py"), "run", "--nodes", "0"]
    folder = tempfile.mkdtemp(prefix="qtt-bench-")
    command = [*boot, "--fake-nodes", "10", "--audit", "--dir", folder, *options]
    sys.exit(subprocess.call([*command, "--", sys.executable, *sys.argv]))


def kubectl(*arguments: str, text: str = "") -> str:
    """What kubectl prints."""
    done = subprocess.run(
        ["kubectl", *arguments], input=text, text=True, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"kubectl {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def install(namespace: str = "default") -> None:
    """CRD, rights, and claims that are bound to volumes nobody mounts."""
    kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    printed = subprocess.run(ROOT / "tests/testbed/operator.sh", check=True, capture_output=True)
    documents = yaml.safe_load_all(printed.stdout)
    rights = [found for found in documents if found and found["kind"] in RIGHTS]
    kubectl("apply", "-f", "-", text=yaml.safe_dump_all(rights))
    for name in ("data", "checkpoints"):
        kubectl("apply", "-f", "-", text=yaml.safe_dump_all(_volume(name, namespace)))
    kubectl("wait", "--for=condition=established", "crd/tuningruns.quicktune.dev")
    bound = "--for=jsonpath={.status.phase}=Bound"
    kubectl("wait", bound, "pvc/data", "pvc/checkpoints", "-n", namespace, "--timeout=60s")


def _volume(name: str, namespace: str) -> list[Object]:
    size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
    volume = {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{namespace}-{name}"},
        "spec": {
            "capacity": size, "accessModes": modes, "storageClassName": "",
            "nfs": {"server": "nowhere.invalid", "path": "/"},
            "claimRef": {"namespace": namespace, "name": name},
        },
    }  # fmt: skip
    claim = {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"accessModes": modes, "resources": {"requests": size}, "storageClassName": ""},
    }  # fmt: skip
    return [volume, claim]


def tuning_run(name: str, **spec: Any) -> Object:
    """A run on fake nodes, whose pods wait for our kubelet."""
    return {
        "apiVersion": "quicktune.dev/v1alpha1", "kind": "TuningRun",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "dataset": {"claimName": "data"},
            "search": {"space": "native", "hub": "tiny", "portfolio": "None", "poolSize": 512},
            "fidelity": {"max": 4, "step": 1, "stepsPerJob": 1},
            "optimizer": {"algorithm": "Random", "seed": 1},
            "checkpoint": {"claimName": "checkpoints"},
            "template": {
                "metadata": {"annotations": {"testbed.local/run-for": "24h"}},
                "spec": {"nodeSelector": {"type": "kwok"}},
            },
            **spec,
        },
    }  # fmt: skip


@dataclass(slots=True)
class Operator:
    """One operator process, with the rights of the service account."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def metrics(self) -> str:
        """What it serves at /metrics, empty while it does not answer."""
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self.port}/metrics"
            with urllib.request.urlopen(url, timeout=5) as answer:
                text: str = answer.read().decode()
                return text
        return ""

    @property
    def leads(self) -> bool:
        """Whether it says that it holds the Lease."""
        return "quicktune_leader 1.0" in self.metrics()

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the main process alone."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def worker_bytes(self) -> int:
        """Resident memory of its optimizer workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return sum(int(child.memory_info().rss) for child in children)


@dataclass(slots=True)
class World:
    """Redis, operators and the kubelet; `ends` and `made` are what a bare watcher saw, in order.

    `ends`: (monotonic time, run uid, component) of terminated trainer containers; `made`: the same
    of new Jobs. `seconds`: how long a step lasts, by its pod.
    """

    store: EmbeddedStore
    folder: Path
    api: Cluster
    seconds: Callable[[Object], float] = lambda _pod: 1.0
    ends: list[tuple[float, str, str]] = field(default_factory=list)
    made: list[tuple[float, str, str]] = field(default_factory=list)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    operators: list[Operator] = field(default_factory=list)
    _volume: Volume = field(default_factory=Volume)
    _taken: set[str] = field(default_factory=set)
    _over: set[str] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def start_operator(self, **settings: Any) -> Operator:
        """Start one more operator process on this cluster."""
        number = len(self.operators)
        port = 18080 + number
        path = self.folder / f"settings-{number}.yaml"
        raw = {
            "redis_url": f"unix://{self.store.socket}", "metrics_port": port,
            "lease_namespace": SYSTEM, **settings,
        }  # fmt: skip
        path.write_text(yaml.safe_dump(raw))
        log = self.folder / f"operator-{number}.log"
        env = {**os.environ, "KUBECONFIG": str(self._kubeconfig()), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "qtt_operator", "controller", "--settings", str(path)],
            env=env, stdout=log.open("wb"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.operators.append(Operator(process, port, log))
        return self.operators[-1]

    async def leader(self) -> Operator:
        """The operator that leads, once one does."""
        while True:
            for operator in self.operators:
                if operator.process.poll() is None and await asyncio.to_thread(
                    lambda o: o.leads, operator
                ):
                    return operator
            await asyncio.sleep(0.2)

    async def start(self, manifest: Object) -> str:
        """Create a TuningRun; its uid."""
        made = await self.api.create(RUNS, "default", manifest)
        return str(made["metadata"]["uid"])

    async def complete(self, name: str) -> Object:
        """Wait for a run's end; its status."""
        while True:
            found = await self.api.get(RUNS, "default", name)
            status: Object = (found or {}).get("status") or {}
            kinds = {c["type"]: c for c in status.get("conditions", ()) if c["status"] == "True"}
            if "Failed" in kinds:
                sys.exit(f"{name} failed: {kinds['Failed']}")
            if "Complete" in kinds:
                return status
            await asyncio.sleep(0.5)

    def _kubeconfig(self) -> Path:
        """Credentials of the operator's service account: the audit log tells its writes apart."""
        path = self.folder / "operator.kubeconfig"
        if not path.exists():
            token = kubectl("create", "token", ACCOUNT, "-n", SYSTEM, "--duration=10h").strip()
            config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
            for user in config["users"]:
                user["user"] = {"token": token}
            path.write_text(yaml.safe_dump(config))
        return path

    # --- the kubelet and the watcher ------------------------------------------------------------

    async def follow_jobs(self) -> None:
        """Note when Jobs appear."""
        seen: set[str] = set()
        async for kind, job in self._events(JOBS):
            uid = job["metadata"]["uid"]
            if kind == "ADDED" and uid not in seen:
                seen.add(uid)
                self.made.append((time.monotonic(), run_uid(job), _component(job)))

    async def follow_pods(self) -> None:
        """Note when trainers end, and end those whose time has come."""
        async for kind, pod in self._events(PODS):
            uid = pod["metadata"]["uid"]
            if kind == "DELETED":
                continue
            if terminated(pod) is not None and uid not in self._over:
                self._over.add(uid)
                self.ends.append((time.monotonic(), run_uid(pod), _component(pod)))
                self.finished.set()
            elif (pod.get("status") or {}).get("phase") == "Running" and uid not in self._taken:
                self._taken.add(uid)
                task = asyncio.create_task(self._end(pod))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _events(self, resource: Any) -> AsyncIterator[tuple[str, Object]]:
        version = ""
        while True:
            if not version:
                page = await self.api.page(resource, "default", selector=RUN_UID_LABEL, limit=5000)
                version = page["metadata"]["resourceVersion"]
                for found in page["items"]:
                    yield "ADDED", found
            async with self.api.watch(
                resource, "default", selector=RUN_UID_LABEL, version=version, seconds=600
            ) as events:
                async for event in events:
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        yield event["type"], event["object"]

    async def _end(self, pod: Object) -> None:
        trainer = next(c for c in pod["spec"]["containers"] if c["name"] == "trainer")
        began = datetime.now(UTC)
        await asyncio.sleep(self.seconds(pod))
        raw = next(e["value"] for e in trainer["env"] if e["name"] == "QTT_STEP")
        command = trainer["args"][0]
        document = parse_job(json.loads(raw), command=command)
        state = {
            "exitCode": 0, "reason": "Completed", "startedAt": f"{began:%Y-%m-%dT%H:%M:%SZ}",
            "message": result_of(command, document, self._volume).encode(),
            "finishedAt": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        }  # fmt: skip
        status = {
            "name": "trainer", "image": trainer["image"], "imageID": "", "ready": False,
            "started": False, "restartCount": 0, "state": {"terminated": state},
        }  # fmt: skip
        body: Object = {"status": {"phase": "Succeeded", "containerStatuses": [status]}}
        await self.api.patch(PODS, "default", pod["metadata"]["name"], body, sub="status")


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    """Redis that syncs every write, a kubelet and a watcher at work; all end with the block."""
    install()
    OUT.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="qtt-bench-") as folder,
        EmbeddedStore(Path(folder)) as store,
    ):
        api = await Cluster.connect(qps=2000.0, burst=2000)
        here = World(store, Path(folder), api)
        tasks = [asyncio.create_task(part()) for part in (here.follow_jobs, here.follow_pods)]
        try:
            yield here
        finally:
            for task in tasks:
                task.cancel()
            for operator in here.operators:
                operator.process.kill()
                operator.process.wait()
                (OUT / operator.log.name).write_bytes(operator.log.read_bytes())
            await asyncio.gather(*tasks, return_exceptions=True)
            await api.close()


def writes_of_ours(since: str) -> dict[str, int]:
    """Writes of the operator in the audit log since a time, by verb and resource."""
    found: dict[str, int] = {}
    log = Path(os.environ["TESTBED_DIR"]) / "log" / "audit.jsonl"
    with log.open() as lines:
        for line in lines:
            entry = json.loads(line)
            if (
                entry["user"]["username"] == USER
                and entry["verb"] in WRITES
                and entry["stage"] == "ResponseComplete"
                and entry["stageTimestamp"] >= since
            ):
                what = f"{entry['verb']} {entry['objectRef']['resource']}"
                found[what] = found.get(what, 0) + 1
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below this share of all."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def now_text() -> str:
    """The present time as the audit log writes it."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def verdict(name: str, value: float, bound: float, unit: str = "", *, least: bool = False) -> bool:
    """Print a figure beside its bound; whether it holds."""
    holds = value >= bound if least else value <= bound
    sign = ">=" if least else "<="
    print(f"{'ok  ' if holds else 'MISS'} {name}: {value:.3g}{unit} (bound {sign} {bound:g}{unit})")
    return holds


def _component(found: Object) -> str:
    return str((found["metadata"].get("labels") or {}).get(COMPONENT_LABEL, ""))

"""An operator without work is one small process; with work its workers are ready before it."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from qtt_operator.cluster import RUNS
from qtt_operator.cluster_backend import Copies
from qtt_operator.informer import Informers
from qtt_operator.leader import Leader
from qtt_operator.metrics import Metrics
from qtt_operator.vitals import LAG_SECONDS, LEASE_LOOKS, Vitals
from qtt_operator.warmth import Warmth, any_unfinished
from qtt_operator.workqueue import WorkQueue
from tests.cluster.fake_cluster import FakeCluster
from tests.cluster.fake_operator import manifest


class Workers:
    def __init__(self) -> None:
        self.running = False

    async def warm(self) -> None:
        self.running = True

    async def idle(self) -> None:
        self.running = False


def test_workers_start_with_the_first_unfinished_run_and_end_a_while_after_the_last() -> None:
    clock, unfinished, workers = [0.0], [False], Workers()

    async def any_left() -> bool:
        return unfinished[0]

    warmth = Warmth(workers, any_left, linger_seconds=600.0, now=lambda: clock[0])
    seen = []
    for at, left in [(0, False), (5, True), (10, False), (604, False), (606, False), (700, True)]:
        clock[0], unfinished[0] = float(at), left
        asyncio.run(warmth.look())
        seen.append(workers.running)

    assert seen == [False, True, True, True, False, True]


@pytest.mark.parametrize(("ends", "expected"), [([True] * 3, False), ([True, False, True], True)])
def test_a_standby_asks_the_server_whether_any_run_is_left(
    ends: list[bool], expected: bool
) -> None:
    cluster = FakeCluster()

    async def main() -> bool:
        for number, over in enumerate(ends):
            run = manifest(f"run-{number}")
            if over:
                done = {"type": "Complete", "status": "True", "observedGeneration": 1}
                run["status"] = {"conditions": [done]}
            await cluster.create(RUNS, "default", run)
        return await any_unfinished(cluster, ())  # type: ignore[arg-type]

    assert asyncio.run(main()) is expected


def test_the_main_process_loads_neither_torch_nor_scipy() -> None:
    program = (
        "import sys, pkgutil, importlib, qtt_operator\n"
        "for part in pkgutil.iter_modules(qtt_operator.__path__):\n"
        "    if part.name not in {'optimizer_worker', '__main__'}:\n"
        "        importlib.import_module(f'qtt_operator.{part.name}')\n"
        "heavy = {'torch', 'scipy', 'ConfigSpace', 'gpytorch', 'sklearn', 'torchvision', 'timm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True)

    assert done.stdout.decode().strip() == "[]", done.stderr.decode()


class Silence:
    """An informer that heard the server so many seconds ago."""

    def __init__(self) -> None:
        self.silent_seconds, self.relists = 0.0, 1


def vitals(clock: list[float]) -> tuple[Vitals, Silence]:
    async def no_epoch() -> int:
        return 0

    cluster, silence = FakeCluster(), Silence()
    leader = Leader(
        cluster,  # type: ignore[arg-type]
        namespace="default", name="lease", identity="a", highest_epoch=no_epoch,
        now=lambda: clock[0],
    )  # fmt: skip
    asyncio.run(leader.acquire())
    copies = Copies(jobs=silence, pods=Informers({}))  # type: ignore[arg-type]
    copies.pods = silence  # type: ignore[assignment]
    queue: WorkQueue[tuple[str, str]] = WorkQueue(lambda _key: no_epoch())
    found = Vitals(
        Metrics(), cluster=cluster, leader=leader, queue=queue, copies=copies,  # type: ignore[arg-type]
    )  # fmt: skip
    return found, silence


def test_a_stuck_loop_a_silent_watch_and_a_lease_nobody_looks_at_are_unwell() -> None:
    clock = [0.0]
    found, silence = vitals(clock)
    assert found.unwell() == ""

    silence.silent_seconds = 601.0
    assert found.unwell() == ""  # a standby has no copies
    found.reconciler = object()  # type: ignore[assignment]  # it leads
    assert "API server" in found.unwell()
    silence.silent_seconds = 59.0
    assert found.unwell() == ""

    found._lag = LAG_SECONDS + 1
    assert "event loop" in found.unwell()
    found._lag = 0.0

    clock[0] = LEASE_LOOKS * 2.0 + 1
    assert "Lease" in found.unwell()


def test_a_leader_is_ready_when_its_copies_are_complete() -> None:
    found, _ = vitals([0.0])

    assert "listed" in found.unready()
    found.working = True
    assert found.unready() == ""

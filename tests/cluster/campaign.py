"""Random faults in whole runs, again and again: `python -m tests.cluster.campaign --faults 1000`.

A trial is one TuningRun through the operator's loop (real informers, queue, reconciler, planner and
Lua ledger in a real Redis; the API server is in memory), with faults drawn from its seed. A shard
of compressed JSON lines is written for each call; the next call goes on behind the newest seed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import redis

from qtt_core.errors import ClusterError
from qtt_core.results import EXIT_CODES, State, StepResult
from qtt_operator.cluster import RUNS, Object
from qtt_operator.store import EmbeddedStore
from tests.cluster.fake_cluster import FakeCluster, document_of
from tests.cluster.fake_operator import SETTINGS, FakeOperator, manifest
from tests.cluster.shards import HEADER, SHARD, SHARDS, lines, name_of, read, tally, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))
from ledger_reader import faults as broken_in  # reads Redis without code of ours

STEPS, TRIAL_SECONDS, HELD_SECONDS = 10, 90.0, 15.0
TROUBLES = (State.PREEMPTED, State.DISK_FULL, State.INFRA_GPU, State.INFRA_STORAGE)
CALLS = (
    ("POST", "jobs"), ("PATCH", "jobs"), ("DELETE", "jobs"), ("GET", "jobs"), ("LIST", "jobs"),
    ("WATCH", "jobs"), ("LIST", "pods"), ("WATCH", "pods"), ("PATCH", "tuningruns"),
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Trial:
    """One run and what is done to it. `facts` counts faults that really happened."""

    seed: int
    store: EmbeddedStore
    rng: random.Random
    cluster: FakeCluster = field(default_factory=FakeCluster)
    facts: Counter[str] = field(default_factory=Counter)
    epoch: int = 0
    leaders: list[tuple[FakeOperator, Any]] = field(default_factory=list)
    uid: str = ""
    kept: dict[bytes, bytes] | None = None
    ends: dict[str, tuple[int, str]] = field(default_factory=dict)
    trouble: float = 0.15
    """How often a trainer ends with a state that is to be tried again."""

    async def lead(self) -> None:
        """One more operator, with an epoch above all others."""
        self.epoch += 1
        settings = replace(SETTINGS, node_lost_grace_seconds=0.2)
        operator = FakeOperator(self.cluster, self.store, epoch=self.epoch, settings=settings)
        working = operator.running(stepping=False)
        await working.__aenter__()
        self.leaders.append((operator, working))

    async def leave(self, number: int) -> None:
        """An operator dies without a word."""
        _, working = self.leaders.pop(number)
        await working.__aexit__(None, None, None)

    @property
    def leader(self) -> FakeOperator:
        """The newest one."""
        return self.leaders[-1][0]

    def answer(self, pod: Object) -> tuple[int, str] | None:
        """How a trainer ends: mostly well."""
        uid = pod["metadata"]["uid"]
        if uid not in self.ends:
            command, document = document_of(pod)
            self.ends[uid] = self.cluster.succeed(pod)
            if command == "step" and self.leaders and self.rng.random() < self.trouble:
                state = self.rng.choice(TROUBLES)
                self.facts[f"trainer: {state.value}"] += 1
                result = StepResult(attempt=document.attempt, nonce=document.nonce, state=state)
                self.ends[uid] = EXIT_CODES[state], result.encode()
        return self.ends[uid] if self.rng.random() < 0.6 else None

    # --- faults -------------------------------------------------------------------------------

    async def call_fails(self) -> bool:
        """One call to the API server, at random, is refused or gets no answer."""
        status = self.rng.choice([0, 429, 500, 503])
        self.cluster.faults.append((*self.rng.choice(CALLS), status))
        return True

    async def watch_cut(self) -> bool:
        """Every watch ends; half the time none can go on from where it was."""
        self.cluster.cut_watches(compact=self.rng.random() < 0.5)
        return True

    async def operator_killed(self) -> bool:
        """The leader dies; the next one reads everything anew."""
        while self.leaders:
            await self.leave(0)
        await self.lead()
        return True

    async def two_leaders(self) -> bool:
        """A second one takes over while the first still works."""
        if len(self.leaders) > 1:
            return False
        await self.lead()
        await asyncio.sleep(self.rng.random() * 0.1)
        await self.leave(0)
        return True

    async def job_deleted(self) -> bool:
        """By hand, whatever its state."""
        jobs = [j for j in self.cluster.jobs() if not _is_recorded(j)]
        if not jobs:
            return False
        self.cluster.remove(self.rng.choice(jobs), "jobs")
        return True

    async def pod_deleted(self) -> bool:
        """By hand: its trainer says that it was preempted."""
        pods = self._working()
        if not pods:
            return False
        pod = self.rng.choice(pods)
        _, document = document_of(pod)
        said = StepResult(
            attempt=document.attempt, nonce=document.nonce, state=State.PREEMPTED
        ).encode()
        self.cluster.end_pod(pod, EXIT_CODES[State.PREEMPTED], said)
        return True

    async def node_lost(self) -> bool:
        """A pod is on its way out and nobody hears of it again."""
        pods = self._working()
        if not pods:
            return False
        pod = self.rng.choice(pods)
        self.ends[pod["metadata"]["uid"]] = (0, "")
        leaving = {**pod["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
        self.cluster.change({**pod, "metadata": leaving}, "pods")
        self.cluster.remove({**pod, "metadata": leaving}, "pods")
        return True

    async def end_seen_again(self) -> bool:
        """A recorded Job loses its time to live: it looks like one that was never recorded."""
        jobs = [j for j in self.cluster.jobs() if _is_recorded(j)]
        if not jobs:
            return False
        job = self.rng.choice(jobs)
        spec = {k: v for k, v in job["spec"].items() if k != "ttlSecondsAfterFinished"}
        self.cluster.change({**job, "spec": spec}, "jobs")
        return True

    async def redis_killed(self) -> bool:
        """kill -9 of the server; it comes back from its file."""
        pid = self.store.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(self.rng.random() * 0.2)
        self.store.restart()  # in this thread: the server dies with the one that started it
        return True

    async def tail_lost(self) -> bool:
        """Redis comes back as it was a while ago; Jobs still witness what it lost."""
        with _plain(self.store) as client:
            if self.kept is None:
                self.kept = {n: client.dump(n) for n in client.keys(f"qtt:{{{self.uid}}}:*")}
                return False
            for name in client.keys(f"qtt:{{{self.uid}}}:*"):
                client.delete(name)
            for name, data in self.kept.items():
                client.restore(name, 0, data)
        self.kept = None
        return True

    async def suspended(self) -> bool:
        """A person pauses the run and lets it go on."""
        policy = self.rng.choice(["Drain", "Evict"])
        await self._edit(suspend=True, suspendPolicy=policy)
        await asyncio.sleep(self.rng.random() * 0.3)
        await self._edit(suspend=False)
        return True

    async def scaled(self) -> bool:
        """A person wants fewer or more at once."""
        await self._edit(parallelism=self.rng.randint(1, 4))
        return True

    async def _edit(self, **spec: Any) -> None:
        """A person types it until the server takes it."""
        while True:
            try:
                return await self.leader.edit(**spec)
            except ClusterError:
                await asyncio.sleep(0.01)

    def _working(self) -> list[Object]:
        return [p for p in self.cluster.pods() if p["status"]["phase"] == "Running"]

    # --- the run ------------------------------------------------------------------------------

    async def play(self) -> list[str]:
        """What broke, if anything."""
        spec: dict[str, Any] = {
            "budget": {"maxSteps": STEPS}, "parallelism": self.rng.randint(1, 3),
            "failurePolicy": {"maxInfraRetriesPerStep": 20}, "optimizer": {
                "algorithm": "Random", "seed": self.seed},
        }  # fmt: skip
        run = await self.cluster.create(RUNS, "default", manifest(**spec))
        self.uid = run["metadata"]["uid"]
        self.cluster.answer = self.answer
        controllers = asyncio.create_task(self._step())
        await self.lead()
        try:
            return await self._through()
        finally:
            controllers.cancel()
            while self.leaders:
                await self.leave(0)

    async def _step(self) -> None:
        while True:
            self.cluster.step()
            await asyncio.sleep(0.005)

    async def _through(self) -> list[str]:
        for _ in range(self.rng.randint(3, 9)):
            await asyncio.sleep(self.rng.random() * 0.25)
            if self.leader.is_true("Complete"):
                break
            name = self.rng.choice(FAULTS)
            if await name(self):
                self.facts[name.__name__] += 1
        self.trouble = 0.0
        if self.leader.fatal:
            await self.operator_killed()
        try:
            await self._end()
        except TimeoutError:
            jobs = [job["metadata"]["name"] for job in self.cluster.jobs()]
            return [f"not complete: {self.leader.run().get('status')}, {jobs}"]
        return self._wrong()

    async def _end(self) -> None:
        """Until it is Complete; a loss that no Job witnesses any more is accepted by a person."""
        leader = self.leader
        store = lambda: leader.condition("StoreAvailable").get("reason")  # noqa: E731
        await leader.until(
            lambda: leader.is_true("Complete") or store() == "DataRegressed", TRIAL_SECONDS
        )
        with contextlib.suppress(TimeoutError):
            await leader.until(lambda: leader.is_true("Complete"), HELD_SECONDS)
        if store() == "DataRegressed":
            self.facts["a loss accepted by a person"] += 1
            note = {"metadata": {"annotations": {"quicktune.dev/retry": "go-on"}}}
            await self.cluster.patch(RUNS, "default", "toy", note)
        await leader.until(lambda: leader.is_true("Complete"), TRIAL_SECONDS)

    def _wrong(self) -> list[str]:
        with _plain(self.store) as client:
            stored = client.xrange(f"qtt:{{{self.uid}}}:log")
        events = [
            {"id": i.decode(), **{k.decode(): v.decode() for k, v in fields.items()}}
            for i, fields in stored
        ]
        found = broken_in(events, STEPS)
        told = sum(len(json.loads(e["epochs"])) for e in events if e["k"] == "done")
        if told != STEPS:
            found.append(f"{told} steps of {STEPS} were told")
        closes = [e for e in events if e["k"] in {"close", "reopen"}]
        if not closes or closes[-1].get("reason") != "BudgetExhausted":
            found.append(f"not closed by its budget: {closes}")
        return found


Fault = Callable[[Trial], Awaitable[bool]]
FAULTS: tuple[Any, ...] = (
    Trial.call_fails, Trial.call_fails, Trial.watch_cut, Trial.operator_killed,
    Trial.operator_killed, Trial.two_leaders, Trial.job_deleted, Trial.pod_deleted,
    Trial.node_lost, Trial.end_seen_again, Trial.redis_killed, Trial.tail_lost, Trial.tail_lost,
    Trial.suspended, Trial.scaled,
)  # fmt: skip


def _is_recorded(job: Object) -> bool:
    return "ttlSecondsAfterFinished" in job["spec"]


def _plain(store: EmbeddedStore) -> redis.Redis:
    """A client that takes bytes as they are."""
    return redis.Redis(unix_socket_path=str(store.socket))


def trial(seed: int, store: EmbeddedStore) -> dict[str, Any]:
    """One trial's line."""
    began = time.monotonic()
    made = Trial(seed=seed, store=store, rng=random.Random(seed))
    try:
        broken = asyncio.run(made.play())
    except Exception as error:  # noqa: BLE001  # a trial that ends in a bug is a finding, not an end
        broken = [f"{type(error).__name__}: {error}"]
    return {
        "seed": seed, "cluster": "in memory", "faults": dict(made.facts), "broken": broken,
        "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip


def again(folder: Path, run: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the seeds that broke anew; a line keeps what was found `before`. The new lines."""
    new: list[dict[str, Any]] = []
    for shard in sorted(folder.glob("*.jsonl.gz")):
        known = read(shard)
        if any(line["broken"] for line in known):
            found = [_once_more(line, run) if line["broken"] else line for line in known]
            new += [after for after, before in zip(found, known, strict=True) if after != before]
            write(found, folder, name_of(shard))
    return new


def _once_more(line: dict[str, Any], run: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    before = [*line.get("before", ()), *(words[:120] for words in line["broken"])]
    return {**run(line["seed"]), "before": before}


def onwards(
    store: EmbeddedStore, folder: Path, *, faults: int, minutes: float, first: int
) -> list[dict[str, Any]]:
    """Shard after shard behind the newest seed, until so many faults or minutes."""
    deadline, new = time.monotonic() + 60 * minutes, []
    while True:
        known = [line for line in lines(folder) if line["cluster"] == "in memory"]
        made = sum(sum(line["faults"].values()) for line in known)
        if made >= faults or time.monotonic() > deadline:
            return new
        begin = max((line["seed"] + 1 for line in known), default=first)
        found = [trial(seed, store) for seed in range(begin, begin + SHARD)]
        write(found, folder, f"memory-{begin:06}")
        new += found


def main() -> int:
    """Go on until so many faults were made, or the time is over; 1 if something broke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--first", type=int, default=0, help="seed of an empty folder")
    parser.add_argument("--again", action="store_true", help="run what broke once more, no others")
    parser.add_argument("--to", type=Path, default=SHARDS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedStore(Path(folder)) as store:
        if given.again:
            new = again(given.to, lambda seed: trial(seed, store))
        else:
            new = onwards(
                store, given.to, faults=given.faults, minutes=given.minutes, first=given.first
            )
    broken = [line for line in new if line["broken"]]
    for line in broken:
        print(line, file=sys.stderr)  # noqa: T201
    (given.to / "tally.md").write_text(HEADER + tally(given.to))
    print(tally(given.to))  # noqa: T201
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())

"""How long an `ask` takes, with and without a prior; memory above torch; time of a replay.

    python benchmarks/ask.py            # one core; about 4 minutes, and 2 for the prior once

A search of `transfer.py` with 4 asynchronous workers and a pool of 512, until 1,000 epochs are
known. Each ask follows a tell at once, so all fitting that a worker process would do while it waits
is in it; its time is set beside that of a random optimizer's ask on the same states. Then 10,000
results are replayed into a new optimizer, up to its first ask.
"""

from __future__ import annotations

import argparse
import heapq
import subprocess
import sys
from time import perf_counter

import numpy as np
import psutil
import torch
from threadpoolctl import threadpool_limits
from transfer import UNSEEN, WORLD, prior

from qtt_core.optimizer import ALGORITHMS, QuickTune, replay
from qtt_core.prior import MetaPrior
from qtt_core.steps import BudgetView, Observation, OptimizerEvent
from qtt_core.testing.curves import answer

POINTS = 1000
NEAR = ((1, 30), (31, 300), (301, POINTS))
"""Counts of known epochs that figures are printed for."""
WORKERS = 4
BOUNDS = {"p50": 0.050, "p95": 0.100, "replay": 2.0, "memory": 300.0}
BARE = "import torch, gpytorch, psutil; print(psutil.Process().memory_info().rss)"

Times = list[tuple[int, float, float]]
"""(known epochs, seconds of the ask, seconds of the tell before it)."""


def searched(algorithm: str, given: MetaPrior | None, index: int) -> Times:
    """A search from its first ask until POINTS epochs are known."""
    task = WORLD.task(UNSEEN + index)
    optimizer = ALGORITHMS[algorithm](
        WORLD.space, seed=index, metafeatures=task.metafeatures, prior=given
    )
    full = task.seconds(WORLD.space.default()) * WORLD.max_fidelity
    total, spent, clock, known, told = 40 * full, 0.0, 0.0, 0, 0.0
    running: list[tuple[float, int, Observation]] = []
    found: Times = []
    while known < POINTS:
        while len(running) < WORKERS:
            budget = BudgetView(total_seconds=total, spent_seconds=spent, workers=WORKERS)
            begun = perf_counter()
            asked = optimizer.ask(1, budget)
            found.append((known, perf_counter() - begun, told))
            told = 0.0
            if not asked:
                break
            result = answer(task, asked[0], 0.0)
            used = sum(result.seconds)
            spent += used
            heapq.heappush(running, (clock + used, len(found), result))
        if not running:
            break
        clock, _, result = heapq.heappop(running)
        begun = perf_counter()
        optimizer.tell(result)
        told = perf_counter() - begun
        known += len(result.scores)
    return found


def shown(name: str, found: Times, beside: Times) -> list[str]:
    """A line for every range of known epochs, and what falls short."""
    short = []
    for low, high in NEAR:
        asks = [ask for known, ask, _ in found if low <= known <= high]
        tells = [tell for known, _, tell in found if low <= known <= high]
        others = [ask for known, ask, _ in beside if low <= known <= high]
        p50, p95 = np.quantile(asks, (0.5, 0.95))
        ratio = p50 / np.median(others)
        print(
            f"{name:9} {low:4}-{high:<5} epochs known: ask p50 {1e3 * p50:6.1f} ms, "
            f"p95 {1e3 * p95:6.1f} ms ({len(asks)} asks), {ratio:5.1f} x random's; "
            f"tell p95 {1e3 * np.quantile(tells, 0.95):5.2f} ms"
        )
        if p50 > BOUNDS["p50"] or p95 > BOUNDS["p95"]:
            short.append(f"{name} at {low}-{high}")
    return short


def replayed(given: MetaPrior | None, count: int) -> tuple[float, float]:
    """Seconds to feed so many results of an epoch each, and of the ask that follows."""
    task = WORLD.task(UNSEEN)
    writer = ALGORITHMS["FreezeThawRandom"](WORLD.space, seed=0, metafeatures=task.metafeatures)
    budget = BudgetView(total_steps=2 * count)
    events: list[OptimizerEvent] = []
    while len(events) < 2 * count:
        (proposal,) = writer.ask(1, budget)
        result = answer(task, proposal)
        writer.tell(result)
        events += [proposal, result]
    fresh = QuickTune(WORLD.space, seed=0, metafeatures=task.metafeatures, prior=given)
    begun = perf_counter()
    replay(fresh, events)
    fed = perf_counter() - begun
    begun = perf_counter()
    fresh.ask(1, BudgetView(total_steps=2 * count, spent_steps=count, workers=WORKERS))
    return fed, perf_counter() - begun


def main() -> None:
    """Print the figures; exit 1 where one falls short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="data sets")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    given = prior("58")
    short = []
    seeds = range(asked.seeds)
    random = [line for seed in seeds for line in searched("Random", None, seed)]
    for name, known in (("prior", given), ("no prior", None)):
        found = [line for seed in seeds for line in searched("QuickTune", known, seed)]
        short += shown(name, found, random)
    bare = int(subprocess.run([sys.executable, "-c", BARE], capture_output=True, check=True).stdout)
    above = (psutil.Process().memory_info().rss - bare) / 2**20
    print(f"memory: {above:.0f} MiB above a process that imported torch and gpytorch alone")
    fed, first = replayed(given, 10_000)
    print(f"replay of 10,000 results: {fed:.2f} s, the first ask after it {first:.2f} s")
    short += ["memory"] if above > BOUNDS["memory"] else []
    short += ["replay"] if fed > BOUNDS["replay"] else []
    sys.exit(f"above its bound: {', '.join(short)}" if short else 0)


if __name__ == "__main__":
    main()

"""Quick-Tune against random search on the demo's data: best validation error at equal CPU-seconds.

    python benchmarks/quicktune_vs_random.py                     # 5 seeds x 2 algorithms x 150 s
    python benchmarks/quicktune_vs_random.py --seeds 10 --seconds 300
    python benchmarks/quicktune_vs_random.py --report            # print what is there

Each run has one core to itself (pinned), so a second of its clock is a CPU-second of everything it
does: trainer, optimizer, Redis, controller. Time counts from the first opened step. The two
algorithms of a seed run side by side where there are two cores. Every finished run leaves one small
JSON shard in benchmarks/out, and a second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from measure import DIGITS, MANIFEST, OUT, PREPARE, QTT, Usage, ledger_of, must_succeed, watch

ALGORITHMS = ("QuickTune", "Random")
SHARDS = OUT / "quicktune_vs_random"
START_SECONDS = 45
"""What a run may spend on start-up and `prepare` before its first step; cut off again below."""

Shard = dict[str, Any]


def manifest(algorithm: str, seed: int, seconds: int) -> dict[str, Any]:
    """The demo's manifest with another optimizer, one step at a time, ended by the clock."""
    raw = yaml.safe_load(MANIFEST.read_text())
    raw["metadata"]["name"] = f"{algorithm.lower()}-{seed}"
    spec = raw["spec"]
    spec["parallelism"] = 1
    spec["budget"] = {"maxWallclock": f"{seconds + START_SECONDS}s"}
    spec["optimizer"] = {"algorithm": algorithm, "seed": seed}
    spec["objective"] = {"metric": "top1"}
    return raw


def curve(events: Sequence[Shard], seconds: float) -> list[tuple[float, float]]:
    """(seconds since the first opened step, best validation error so far), up to `seconds`.

    A job reports its epochs together at its end; each counts from the moment it was scored, so that
    an algorithm that trains eight epochs in a row is not judged by the last one only.
    """
    opened = [event for event in events if event["k"] == "open" and event["c"].isdigit()]
    begun = _time(opened[0])
    scored = sorted(
        (at - begun, 1 - score)
        for event in events
        if event["k"] == "done"
        for at, score in _moments(event)
    )
    points, best = [], 1.0
    for at, error in scored:
        if at <= seconds and error < best:
            best = error
            points.append((round(at, 2), best))
    return points


def _moments(event: Shard) -> list[tuple[float, float]]:
    """(time, score) of each epoch of a job: the job's end less the epochs that followed."""
    at, moments = _time(event), []
    for _, score, seconds in reversed(_epochs(event)):
        moments.append((at, score))
        at -= seconds
    return moments


def _epochs(event: Shard) -> list[list[float]]:
    """A list, also where the export keeps the wire's text."""
    raw = event["epochs"]
    return json.loads(raw) if isinstance(raw, str) else raw


def _time(event: Shard) -> float:
    return int(str(event["id"]).partition("-")[0]) / 1000


def run_one(algorithm: str, seed: int, seconds: int, cores: queue.Queue[int]) -> None:
    """One run on a core of its own, then its shard; nothing if the shard is there."""
    shard = shard_path(algorithm, seed, seconds)
    if shard.exists():
        return
    work = SHARDS / f"{algorithm}-{seed}-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    core = cores.get()
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {core})  # of this thread; what it starts inherits it
        usage, events = tune(manifest(algorithm, seed, seconds), work)
    finally:
        cores.put(core)
    result = summary(events, seconds) | {
        "algorithm": algorithm,
        "seed": seed,
        "cpu_seconds": round(usage.cpu_seconds, 1),
        "wall_seconds": round(usage.wall_seconds, 1),
    }
    draft = shard.with_suffix(".part")
    draft.write_text(json.dumps(result))
    draft.rename(shard)
    shutil.rmtree(work)
    print(f"{algorithm:<10} seed {seed}: best error {result['best_error']:.4f}", flush=True)


def tune(raw: dict[str, Any], work: Path) -> tuple[Usage, list[Shard]]:
    """Run a manifest in a folder of its own; what it took, and its ledger."""
    path = work / "tuningrun.yaml"
    path.write_text(yaml.safe_dump(raw))
    mount = f"{raw['spec']['dataset']['claimName']}={DIGITS}"
    options = ["--no-test", "--plain", "--devices", "cpu:1", "--mount", mount]
    usage = watch([QTT, "run", str(path), "--state-dir", str(work), *options])
    must_succeed(usage, raw["metadata"]["name"])
    return usage, ledger_of(raw["metadata"]["name"], work)


def summary(events: Sequence[Shard], seconds: int) -> Shard:
    """What a run reached within its seconds, and by how much work."""
    points = curve(events, seconds)
    done = [event for event in events if event["k"] == "done"]
    return {
        "seconds": seconds,
        "best_error": points[-1][1] if points else 1.0,
        "jobs": len(done),
        "configurations": len({event["c"] for event in done}),
        "curve": points,
    }


def shard_path(algorithm: str, seed: int, seconds: int) -> Path:
    """Where the result of one run is kept."""
    return SHARDS / f"{algorithm}-{seed}-{seconds}s.json"


def error_at(shard: Shard, seconds: float) -> float:
    """The best validation error this many seconds after the first step was opened."""
    return min((error for at, error in shard["curve"] if at <= seconds), default=1.0)


def report(seeds: Sequence[int], seconds: int) -> None:
    """The table by seed, and the ratio at a quarter, half and all of the time."""
    found = {
        (algorithm, seed): json.loads(shard_path(algorithm, seed, seconds).read_text())
        for algorithm in ALGORITHMS
        for seed in seeds
        if shard_path(algorithm, seed, seconds).exists()
    }
    whole = [seed for seed in seeds if all((name, seed) in found for name in ALGORITHMS)]
    if not whole:
        sys.exit("no seed has both runs yet")
    print(f"best validation error after {seconds} CPU-seconds, {len(whole)} seeds")
    print(f"{'seed':>5} {'QuickTune':>10} {'Random':>10}   configurations and jobs of each")
    for seed in whole:
        ours, theirs = (found[name, seed] for name in ALGORITHMS)
        work = " | ".join(f"{run['configurations']}, {run['jobs']}" for run in (ours, theirs))
        print(f"{seed:>5} {ours['best_error']:>10.4f} {theirs['best_error']:>10.4f}   {work}")
    for share in (0.25, 0.5, 1.0):
        ours, theirs = (
            [error_at(found[name, seed], share * seconds) for seed in whole] for name in ALGORITHMS
        )
        wins = sum(a < b for a, b in zip(ours, theirs, strict=True))
        ties = sum(a == b for a, b in zip(ours, theirs, strict=True))
        mean, other = statistics.fmean(ours), statistics.fmean(theirs)
        ratio = mean / other if other else math.nan
        print(
            f"after {share * seconds:>4.0f} s: mean {mean:.4f} against {other:.4f}, "
            f"ratio {ratio:.2f}; better on {wins}, equal on {ties} of {len(whole)}"
        )


def main() -> int:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 … N-1")
    parser.add_argument("--seconds", type=int, default=150, metavar="S", help="CPU-seconds a run")
    parser.add_argument("--report", action="store_true", help="run nothing")
    asked = parser.parse_args()
    seeds = range(asked.seeds)
    if not asked.report:
        SHARDS.mkdir(parents=True, exist_ok=True)
        must_succeed(watch([sys.executable, str(PREPARE)]), "examples/digits/prepare.py")
        cores: queue.Queue[int] = queue.Queue()
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        for core in available[: len(ALGORITHMS)]:
            cores.put(core)
        with ThreadPoolExecutor(cores.qsize()) as threads:
            wanted = [(name, seed) for seed in seeds for name in ALGORITHMS]
            for job in [threads.submit(run_one, *one, asked.seconds, cores) for one in wanted]:
                job.result()
    report(seeds, asked.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

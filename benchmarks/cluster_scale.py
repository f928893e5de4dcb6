"""Memory and event-loop lag of the operator's main process with 100 runs of 8 open steps each.

    python benchmarks/cluster_scale.py             # about 10 minutes, boots its own cluster

On fake nodes; the controller-manager is let off its limits, so that it is not what is measured. The
baseline is the same process before the first run. Optimizer workers are processes of their own and
printed beside it. Bounds: 150 MiB, and 200 ms of lag at the 99th percentile (a bucket's upper end).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time

from cluster_world import Operator, World, inside, tuning_run, verdict, world

from qtt_operator.cluster import Object

MIB = 2**20
LOOK_SECONDS = 2.0


def lag(before: str, after: str, share: float) -> float:
    """Upper end of the bucket that holds this share of the lags between two scrapes, in seconds."""
    first, last = _buckets(before), _buckets(after)
    counts = {bound: last[bound] - first.get(bound, 0.0) for bound in last}
    total = counts[float("inf")]
    return next(bound for bound, count in sorted(counts.items()) if count >= share * total)


def _buckets(text: str) -> dict[float, float]:
    found = re.findall(r'event_loop_lag_seconds_bucket{le="([^"]+)"} (\S+)', text)
    return {float(bound): float(count) for bound, count in found}


def longs(seconds: float) -> object:
    """Steps that last about so long, not all the same; `prepare` is quick."""

    def last(pod: Object) -> float:
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] != "step":
            return 0.5
        return seconds * (0.5 + (hash(pod["metadata"]["uid"]) % 1000) / 1000)

    return last


async def until_open(here: World, wanted: int, limit: float) -> int:
    """Wait until so many steps run at once, or for so long; how many run."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        running = sum(c == "step" for *_, c in here.made) - sum(c == "step" for *_, c in here.ends)
        if running >= wanted:
            break
        await asyncio.sleep(LOOK_SECONDS)
    return running


async def watch(operator: Operator, seconds: float) -> int:
    """The most memory that the main process had resident in this time."""
    most, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        most = max(most, operator.rss_bytes)
        await asyncio.sleep(LOOK_SECONDS)
    return most


async def measure(arguments: argparse.Namespace) -> bool:
    """All figures; whether every bound holds."""
    open_steps = arguments.runs * arguments.together
    async with world() as here:
        here.seconds = longs(arguments.step_seconds)  # type: ignore[assignment]
        operator = here.start_operator(
            max_open_jobs=open_steps + arguments.runs, api_qps=arguments.qps,
            api_burst=int(2 * arguments.qps),
        )  # fmt: skip
        await here.leader()
        idle_from = operator.metrics()
        idle = await watch(operator, 30)
        idle_lag = lag(idle_from, operator.metrics(), 0.99)
        for number in range(arguments.runs):
            await here.start(
                tuning_run(
                    f"run-{number}", budget={"maxSteps": 100_000}, parallelism=arguments.together,
                    optimizer={"algorithm": "Random", "seed": number},
                )
            )  # fmt: skip
        ramp = operator.metrics()
        running = await until_open(here, int(0.95 * open_steps), arguments.ramp_seconds)
        steady = operator.metrics()
        ended = len(here.ends)
        most = await watch(operator, arguments.seconds)
        after = await asyncio.to_thread(operator.metrics)
        workers, rate = operator.worker_bytes, (len(here.ends) - ended) / arguments.seconds
    print(f"{running} steps open in {arguments.runs} runs, {rate:.1f} steps/s end; ramp p99 lag")
    print(
        f"  <= {lag(ramp, steady, 0.99):g} s; idle {idle / MIB:.0f} MiB, p99 lag <= {idle_lag:g} s"
    )
    print(f"  memory, loaded : idle = {most / idle:.2f}; workers {workers / MIB:.0f} MiB beside it")
    return all(
        [
            verdict("open steps", running, 0.95 * open_steps, least=True),
            verdict("resident memory of the main process", most / MIB, 150, " MiB"),
            verdict("event-loop lag, p99", lag(steady, after, 0.99), 0.2, " s"),
        ]
    )


def main() -> None:
    """Boot, measure, print; exit 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--together", type=int, default=8, help="open steps of each run")
    parser.add_argument("--step-seconds", type=float, default=240.0)
    parser.add_argument("--ramp-seconds", type=float, default=300.0, help="patience for the start")
    parser.add_argument("--seconds", type=float, default=180.0, help="of steady work")
    parser.add_argument("--qps", type=float, default=50.0, help="the operator's own API limit")
    arguments = parser.parse_args()
    inside(
        "--manager-arg=--kube-api-qps=400", "--manager-arg=--kube-api-burst=800",
        "--manager-arg=--concurrent-job-syncs=20",
    )  # fmt: skip
    sys.exit(0 if asyncio.run(measure(arguments)) else 1)


if __name__ == "__main__":
    main()

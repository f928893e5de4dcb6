"""Steps a second through real Jobs, against a bare loop that only creates Jobs, in one cluster.

    python benchmarks/cluster_throughput.py            # about 5 minutes, boots its own cluster

Stock controller-manager flags: its 20 requests a second are the ceiling for both. The bare loop
keeps as many Jobs open as the run does and creates the next when a trainer container ended.
Prints the ratio, our API writes per step from the audit log, and the time from the end of a trainer
container, as a bare watcher sees it, to the creation of the next Job.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import sys
import time

from cluster_world import (
    World,
    inside,
    now_text,
    percentile,
    tuning_run,
    verdict,
    world,
    writes_of_ours,
)

from qtt_operator.cluster import JOBS, Object

SKIPPED = 40
"""Jobs that use up the burst the controller-manager has saved."""


def rate(ends: list[tuple[float, str, str]], uid: str, together: int) -> float:
    """Ends a second of one loop, its start and its last Jobs left out."""
    times = [at for at, owner, component in ends if owner == uid and component == "step"]
    steady = times[SKIPPED:-together]
    return (len(steady) - 1) / (steady[-1] - steady[0])


async def bare(here: World, model: Object, number: int, jobs: int, together: int) -> float:
    """Create Jobs like the model, a new one for each that ended; ends a second."""
    uid = f"bare-{number}"
    made = 0

    async def one_more() -> None:
        nonlocal made
        body = copy.deepcopy(model)
        body["metadata"]["name"] = f"bare-{number}-{made}"
        for labels in (body["metadata"]["labels"], body["spec"]["template"]["metadata"]["labels"]):
            labels["quicktune.dev/run-uid"] = uid
        made += 1
        await here.api.create(JOBS, "default", body)

    for _ in range(together):
        await one_more()
    while (ended := _ended(here, uid)) < jobs:
        for _ in range(min(jobs, ended + together) - made):
            await one_more()
        here.finished.clear()
        if _ended(here, uid) == ended:
            await here.finished.wait()
    return rate(here.ends, uid, together)


def _ended(here: World, uid: str) -> int:
    return sum(1 for _, owner, _ in here.ends if owner == uid)


async def ours(here: World, number: int, jobs: int, together: int, algorithm: str) -> str:
    """A run of so many one-step Jobs, to its end; its uid."""
    name = f"ours-{number}"
    uid = await here.start(
        tuning_run(
            name, budget={"maxSteps": jobs}, parallelism=together,
            optimizer={"algorithm": algorithm, "seed": number},
        )
    )  # fmt: skip
    await here.complete(name)
    return uid


def model_of(job: Object) -> Object:
    """A Job of ours without what belongs to it alone."""
    labels = dict(job["metadata"]["labels"])
    spec = copy.deepcopy(job["spec"])
    for name in ("selector", "manualSelector", "ttlSecondsAfterFinished"):
        spec.pop(name, None)
    spec["template"]["metadata"]["labels"] = {
        name: value
        for name, value in spec["template"]["metadata"]["labels"].items()
        if "controller-uid" not in name and "job-name" not in name
    }
    metadata = {"labels": labels, "annotations": job["metadata"].get("annotations", {})}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def latencies(here: World, uid: str) -> list[float]:
    """From each end of a step to the next creation of a Job of the same run, in seconds."""
    made = [at for at, owner, _ in here.made if owner == uid]
    ends = [at for at, owner, component in here.ends if owner == uid and component == "step"]
    found = []
    for at in ends:
        later = next((creation for creation in made if creation > at), None)
        if later is not None:
            found.append(later - at)
    return found


async def measure(arguments: argparse.Namespace) -> bool:
    """All figures; whether every bound holds."""
    async with world() as here:
        here.start_operator()
        await here.leader()
        quiet = await ours(here, 0, arguments.quiet_steps, 1, arguments.algorithm)
        jobs = await here.api.page(
            JOBS, "default", selector=f"quicktune.dev/run-uid={quiet}", limit=500
        )
        model = model_of(
            next(
                j
                for j in jobs["items"]
                if j["metadata"]["labels"]["app.kubernetes.io/component"] == "step"
            )
        )
        bare_rates, our_rates, writes = [], [], dict[str, int]()
        for number in range(1, arguments.rounds + 1):
            bare_rates.append(await bare(here, model, number, arguments.jobs, arguments.together))
            await asyncio.sleep(10)  # the last Jobs of one loop must not slow the other
            since = now_text()
            uid = await ours(here, number, arguments.jobs, arguments.together, arguments.algorithm)
            our_rates.append(rate(here.ends, uid, arguments.together))
            for what, count in writes_of_ours(since).items():
                writes[what] = writes.get(what, 0) + count
            await asyncio.sleep(10)
        steps = arguments.rounds * arguments.jobs
        waits = latencies(here, quiet)
    ratio = sum(our_rates) / sum(bare_rates)
    print(f"bare loop {_short(bare_rates)}, ours {_short(our_rates)} steps/s")
    print(f"writes of ours in {steps} steps: {dict(sorted(writes.items(), key=lambda w: -w[1]))}")
    print(f"end -> next Job, {len(waits)} steps one at a time: p90 {percentile(waits, 0.9):.3f} s")
    return all(
        [
            verdict("steps/s, ours : a bare loop of Job creations", ratio, 0.95, least=True),
            verdict("API writes of ours per step", sum(writes.values()) / steps, 3.0),
            verdict("trainer ended -> next Job created, p50", percentile(waits, 0.5), 0.3, " s"),
        ]
    )


def _short(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def main() -> None:
    """Boot, measure, print; exit 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=200, help="Jobs of each loop in each round")
    parser.add_argument("--together", type=int, default=32, help="Jobs that are open at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--quiet-steps", type=int, default=20, help="steps that are timed one by one"
    )
    parser.add_argument("--algorithm", default="Random")
    arguments = parser.parse_args()
    inside()
    began = time.monotonic()
    holds = asyncio.run(measure(arguments))
    print(f"took {time.monotonic() - began:.0f} s")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()

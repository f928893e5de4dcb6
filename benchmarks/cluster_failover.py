"""The leader is killed: how long until the next step is opened by the other process.

    python benchmarks/cluster_failover.py          # about 2 minutes, boots its own cluster

Two operator processes on one machine; `kill -9` hits the leader while its run goes on. Counted is
the time to the first Job that appears after the kill. The baseline is the Lease's duration, 12 s:
nobody may act before it has run out.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from cluster_world import World, inside, tuning_run, verdict, world

from qtt_operator.settings import OperatorSettings


async def kill_leader(here: World) -> float:
    """Kill the leader, start a new standby; seconds from the kill to the next Job."""
    leader = await here.leader()
    before = len(here.made)
    while len(here.made) == before:  # in the middle of its work
        await asyncio.sleep(0.05)
    made = len(here.made)
    leader.process.kill()
    killed = time.monotonic()
    leader.process.wait()
    while len(here.made) == made or here.made[-1][0] < killed + 1.0:
        await asyncio.sleep(0.05)  # a request that was under way when it died does not count
    opened = next(at for at, *_ in here.made[made:] if at >= killed + 1.0)
    here.start_operator()
    return opened - killed


async def measure(arguments: argparse.Namespace) -> bool:
    """All figures; whether the bound holds."""
    async with world() as here:
        for _ in range(2):
            here.start_operator()
        await here.leader()
        await here.start(tuning_run("fails-over", budget={"maxSteps": 100_000}, parallelism=4))
        while len(here.ends) < 5:
            await asyncio.sleep(0.1)
        waits = []
        for _ in range(arguments.kills):
            waits.append(await kill_leader(here))
            await asyncio.sleep(arguments.pause)
    lease = OperatorSettings().lease_seconds
    print(f"leader killed -> next step opened: {[round(wait, 1) for wait in waits]} s")
    print(f"  the worst : the Lease's {lease:g} s = {max(waits) / lease:.2f}")
    return verdict("leader killed -> next step opened, the worst", max(waits), 20.0, " s")


def main() -> None:
    """Boot, measure, print; exit 1 if the bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--pause", type=float, default=25.0, help="for the next standby to be warm")
    arguments = parser.parse_args()
    inside()
    sys.exit(0 if asyncio.run(measure(arguments)) else 1)


if __name__ == "__main__":
    main()

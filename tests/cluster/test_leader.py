"""Who leads, on an API server in memory, with a clock that moves only when told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from qtt_operator.cluster import LEASES
from qtt_operator.leader import Leader, LeadershipLostError
from tests.cluster.fake_cluster import FakeCluster


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def leader(cluster: FakeCluster, name: str, clock: Callable[[], float], highest: int = 0) -> Leader:
    async def epoch() -> int:
        return highest

    return Leader(
        cluster, namespace="default", name="lease", identity=name,  # type: ignore[arg-type]
        highest_epoch=epoch, lease_seconds=0.06, now=clock,
    )  # fmt: skip


def test_the_first_one_leads_and_the_second_waits() -> None:
    async def main() -> None:
        cluster, clock = FakeCluster(), Clock()
        first, second = leader(cluster, "a", clock), leader(cluster, "b", clock)
        assert await first.acquire() == 1
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await second.acquire()
        assert first.leads
        assert not second.leads

    asyncio.run(main())


def test_a_holder_that_is_silent_for_a_lease_is_followed_with_a_higher_epoch() -> None:
    async def main() -> None:
        cluster, clock = FakeCluster(), Clock()
        first, second = leader(cluster, "a", clock), leader(cluster, "b", clock)
        await first.acquire()
        waiting = asyncio.create_task(second.acquire())
        await asyncio.sleep(0.05)
        clock.now += 1.0
        assert await waiting == 2
        with pytest.raises(LeadershipLostError):
            first.check()
        with pytest.raises(LeadershipLostError):
            await first.keep()

    asyncio.run(main())


def test_a_lease_that_was_deleted_does_not_bring_old_epochs_back() -> None:
    """The store has seen epoch 7; a new Lease alone would start at 1 and be refused for ever."""

    async def main() -> None:
        cluster, clock = FakeCluster(), Clock()
        assert await leader(cluster, "a", clock, highest=7).acquire() == 8
        lease = await cluster.get(LEASES, "default", "lease")
        assert lease is not None
        assert lease["spec"]["leaseTransitions"] == 8

    asyncio.run(main())


def test_a_lease_that_was_let_go_is_taken_at_once() -> None:
    async def main() -> None:
        cluster, clock = FakeCluster(), Clock()
        first = leader(cluster, "a", clock)
        await first.acquire()
        await first.release()
        assert await leader(cluster, "b", clock).acquire() == 2

    asyncio.run(main())


def test_two_that_try_at_once_never_both_lead() -> None:
    async def main() -> None:
        cluster, clock = FakeCluster(), Clock()
        both = [leader(cluster, name, clock) for name in "ab"]
        tasks = [asyncio.create_task(one.acquire()) for one in both]
        await asyncio.sleep(0.1)
        assert sum(one.leads for one in both) == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("status", [0, 500, 409])
def test_a_renewal_that_fails_once_is_no_loss(status: int) -> None:
    async def main() -> None:
        cluster, clock = FakeCluster(), Clock()
        one = leader(cluster, "a", clock)
        await one.acquire()
        cluster.faults.append(("PUT", "leases", status))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await one.keep()
        assert not cluster.faults
        assert one.leads

    asyncio.run(main())

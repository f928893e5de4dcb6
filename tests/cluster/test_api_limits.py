"""How the operator behaves towards the API server: its own rate, and the server's wish to wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from qtt_core.errors import ClusterError, ClusterUnavailableError
from qtt_operator.cluster import JOBS, Cluster, Tokens
from tests.cluster.fake_cluster import FakeCluster
from tests.cluster.http_cluster import HttpCluster

JOB = {"metadata": {"name": "a", "namespace": "default"}, "spec": {"completions": 1}}


def play(scenario: Callable[[Cluster, HttpCluster], Awaitable[None]], **options: float) -> None:
    async def main() -> None:
        server = HttpCluster(FakeCluster())
        async with server.serve(**options) as api:
            await scenario(api, server)

    asyncio.run(main())


def test_a_burst_is_free_and_then_calls_come_at_the_rate() -> None:
    now = [0.0]
    tokens = Tokens(20.0, 40, lambda: now[0])

    delays = [tokens.delay() for _ in range(60)]
    now[0] = 100.0

    assert delays[:40] == [0.0] * 40
    assert delays[40:] == pytest.approx([0.05 * (n + 1) for n in range(20)])
    assert tokens.delay() == 0.0


def test_calls_over_the_rate_wait_and_the_wait_is_counted() -> None:
    async def scenario(api: Cluster, server: HttpCluster) -> None:
        began = time.monotonic()
        await asyncio.gather(*(api.get(JOBS, "default", "none") for _ in range(3)))
        assert time.monotonic() - began >= 0.3
        assert api.throttled_seconds > 0.0
        assert len(server.requests) == 3

    play(scenario, qps=5.0, burst=1)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_to_wait_is_asked_again_after_that(status: int) -> None:
    async def scenario(api: Cluster, server: HttpCluster) -> None:
        server.answers = [(status, {"Retry-After": "1"})]
        began = time.monotonic()
        made = await api.create(JOBS, "default", JOB)
        assert made["metadata"]["uid"]
        assert time.monotonic() - began >= 1.0
        assert len(server.requests) == 2

    play(scenario)


def test_a_server_that_asks_to_wait_again_and_again_is_left_alone() -> None:
    async def scenario(api: Cluster, server: HttpCluster) -> None:
        server.answers = [(429, {"Retry-After": "0"})] * 9
        with pytest.raises(ClusterUnavailableError):
            await api.create(JOBS, "default", JOB)
        assert len(server.requests) == 3

    play(scenario)


def test_a_date_to_wait_for_is_no_error() -> None:
    async def scenario(api: Cluster, server: HttpCluster) -> None:
        server.answers = [(503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})]
        assert await api.get(JOBS, "default", "none") is None

    play(scenario)


def test_a_refusal_without_a_wish_to_wait_is_not_repeated() -> None:
    async def scenario(api: Cluster, server: HttpCluster) -> None:
        await api.create(JOBS, "default", JOB)
        with pytest.raises(ClusterError) as conflict:
            await api.create(JOBS, "default", JOB)
        server.answers = [(500, {})]
        with pytest.raises(ClusterUnavailableError):
            await api.get(JOBS, "default", "a")
        assert conflict.value.status == 409
        assert len(server.requests) == 3

    play(scenario)


def test_nothing_is_written_once_the_lease_is_lost() -> None:
    async def scenario(api: Cluster, server: HttpCluster) -> None:
        def forbid() -> None:
            raise ClusterError("not the leader")

        api.guard = forbid
        with pytest.raises(ClusterError, match="not the leader"):
            await api.create(JOBS, "default", JOB)
        await api.get(JOBS, "default", "a")
        assert [method for method, _ in server.requests] == ["GET"]

    play(scenario)

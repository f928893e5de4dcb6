"""A store that came back without its newest writes, while Jobs that it recorded still lie there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from qtt_core.ledger.events import Event, Retry
from qtt_operator.cluster import RUNS, Object
from qtt_operator.cluster_backend import JOB_OF_POD, ClusterBackend, is_recorded
from qtt_operator.store import EmbeddedStore
from tests.cluster.fake_cluster import FakeCluster, document_of
from tests.cluster.fake_operator import FakeOperator, manifest
from tests.cluster.test_reconcile import (
    complete,
    events_of,
    keys_of,
    only_once,
    preempted,
    put_back,
    steps_of,
)

Scenario = Callable[[FakeCluster, FakeOperator, str], Awaitable[None]]


def play(store: EmbeddedStore, scenario: Scenario) -> list[Event]:
    """One run, one Job at a time; `scenario` is also told the run's uid."""
    cluster = FakeCluster()

    async def main() -> list[Event]:
        run = await cluster.create(RUNS, "default", manifest(parallelism=1))
        operator = FakeOperator(cluster, store)
        async with operator.running():
            await scenario(cluster, operator, run["metadata"]["uid"])
        return await events_of(store, run)

    return asyncio.run(main())


def test_a_retry_that_the_store_lost_is_followed_by_the_attempt_that_was_made(
    redis_store: EmbeddedStore,
) -> None:
    """Both attempts had ended and were recorded; the store waits for the first one again."""
    kept: dict[str, bytes] = {}

    async def scenario(cluster: FakeCluster, operator: FakeOperator, uid: str) -> None:
        def answer(pod: Object) -> tuple[int, str] | None:
            command, document = document_of(pod)
            if command != "step" or document.attempt or steps_of(operator):
                return cluster.succeed(pod)
            kept.update(keys_of(redis_store, uid))  # the first attempt is open
            return preempted(pod)

        cluster.answer = answer
        await operator.until(lambda: steps_of(operator) >= 1)
        cluster.answer = lambda _: None
        put_back(redis_store, uid, kept)
        await operator.until(lambda: len(cluster.jobs()) == 4)
        cluster.answer = cluster.succeed
        await complete(cluster, operator)

    events = play(redis_store, scenario)

    only_once(events)
    assert [(e.reason, e.a) for e in events if isinstance(e, Retry)] == [("preempted", 1)]


def test_an_end_that_was_lost_before_anybody_read_it_is_recorded_once_more(
    redis_store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process cannot notice: the newest event that it has read is still there."""
    kept: dict[str, bytes] = {}
    lost: list[str] = []
    forget = ClusterBackend.forget

    async def scenario(cluster: FakeCluster, operator: FakeOperator, uid: str) -> None:
        async def forgets(backend: ClusterBackend, job: str) -> None:
            await forget(backend, job)
            if job in lost and len(lost) < 3:  # not yet recorded, then recorded
                put_back(redis_store, uid, kept)
                lost.append(job)

        def answer(pod: Object) -> tuple[int, str] | None:
            if document_of(pod)[0] == "step" and not kept:
                kept.update(keys_of(redis_store, uid))
                lost.append(pod["metadata"]["labels"][JOB_OF_POD])
            return cluster.succeed(pod)

        monkeypatch.setattr(ClusterBackend, "forget", forgets)
        cluster.answer = answer
        await operator.until(lambda: len(lost) == 3)
        await complete(cluster, operator)

    only_once(play(redis_store, scenario))
    assert len(lost) == 3


def test_a_job_of_a_lost_decision_that_a_person_gave_up_holds_nothing_up(
    redis_store: EmbeddedStore,
) -> None:
    """It may stand behind one that is gone too, so that nothing can follow from it."""

    kept: dict[str, bytes] = {}
    known: set[str] = set()

    async def scenario(cluster: FakeCluster, operator: FakeOperator, uid: str) -> None:
        def answer(pod: Object) -> tuple[int, str] | None:
            if document_of(pod)[0] == "step" and not kept:
                kept.update(keys_of(redis_store, uid))
                known.update(job["metadata"]["name"] for job in cluster.jobs())
            return cluster.succeed(pod)

        def far_ahead() -> list[str]:
            recorded = filter(is_recorded, cluster.jobs())
            ahead = [job for job in recorded if document_of(job)[1].fidelity_from >= 2]
            return [job["metadata"]["name"] for job in ahead]

        cluster.answer = answer
        await operator.until(lambda: bool(far_ahead()))
        cluster.answer = lambda _: None
        for job in cluster.jobs():
            if job["metadata"]["name"] not in {*known, *far_ahead()}:
                cluster.remove(job, "jobs")
        put_back(redis_store, uid, kept)
        await operator.until(
            lambda: operator.condition("StoreAvailable").get("reason") == "DataRegressed"
        )
        note = {"metadata": {"annotations": {"quicktune.dev/retry": "go-on"}}}
        await cluster.patch(RUNS, "default", "toy", note)
        cluster.answer = cluster.succeed
        await complete(cluster, operator)

    events = play(redis_store, scenario)

    only_once(events)

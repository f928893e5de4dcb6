"""A recorded Job has a time to live, whoever takes it away."""

from __future__ import annotations

import pytest

from qtt_operator.cluster_backend import is_recorded
from qtt_operator.store import EmbeddedStore
from tests.cluster.fake_cluster import FakeCluster
from tests.cluster.fake_operator import FakeOperator
from tests.cluster.test_reconcile import complete, only_once, play


def without_its_time(cluster: FakeCluster) -> str:
    """A person removes it from the first recorded Job; that Job's name."""
    job = next(job for job in cluster.jobs() if is_recorded(job))
    spec = {k: v for k, v in job["spec"].items() if k != "ttlSecondsAfterFinished"}
    cluster.change({**job, "spec": spec}, "jobs")
    return str(job["metadata"]["name"])


def has_its_time(cluster: FakeCluster, name: str) -> bool:
    """Whether the Job of this name, if it is still there, has it."""
    return all(is_recorded(job) for job in cluster.jobs() if job["metadata"]["name"] == name)


@pytest.mark.parametrize("delay", [0.0, 0.05], ids=["at-once", "once-redis-has-synced"])
def test_a_time_to_live_that_was_taken_away_is_given_again(
    redis_store: EmbeddedStore, delay: float
) -> None:
    """While the run is at work: its next steps are held back until the Job has it again."""

    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        operator.reconciler.commit_delay_seconds = delay
        held: set[str] = set()
        cluster.answer = lambda pod: None if held else cluster.succeed(pod)
        await operator.until(lambda: sum(map(is_recorded, cluster.jobs())) >= 3)
        held.add("every pod")
        name = without_its_time(cluster)

        await operator.until(lambda: has_its_time(cluster, name), 5.0)

        held.clear()
        await complete(cluster, operator)

    _, events = play(redis_store, scenario)

    only_once(events)


def test_a_run_that_is_over_gives_it_again_too(redis_store: EmbeddedStore) -> None:
    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        await complete(cluster, operator)
        await operator.until(lambda: not operator.reconciler.active)
        name = without_its_time(cluster)

        await operator.until(lambda: has_its_time(cluster, name), 5.0)

        await complete(cluster, operator)

    _, events = play(redis_store, scenario)

    only_once(events)


def test_a_time_to_live_that_the_server_refused_later_is_given_in_another_turn(
    redis_store: EmbeddedStore,
) -> None:
    """Where Redis syncs once a second nobody waits for the patch."""

    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        operator.reconciler.commit_delay_seconds = 0.05
        cluster.faults += [("PATCH", "jobs", 500)] * 2
        await complete(cluster, operator)
        await operator.until(lambda: all(map(is_recorded, cluster.jobs())), 10.0)
        assert not cluster.faults

    _, events = play(redis_store, scenario)

    only_once(events)

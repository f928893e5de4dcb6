"""What becomes of keys and claims of a run that is gone: a real Redis, an API server in memory."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from qtt_core.ledger.events import Close, Done, Open, Run
from qtt_operator.cluster import CLAIMS, RUNS
from qtt_operator.farewell import KEPT_SECONDS, Farewell
from qtt_operator.names import RUN_UID_LABEL
from qtt_operator.redis_client import find_runs
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.store import EmbeddedStore
from tests.cluster.fake_cluster import FakeCluster
from tests.cluster.fake_operator import manifest

Scene = Callable[[FakeCluster, Redis, Farewell], Awaitable[None]]


def play(store: EmbeddedStore, scene: Scene, *, install: str | None = None) -> None:
    """A scene of an install of its own: the store is shared by all tests."""
    name = uuid.uuid4().hex if install is None else install

    async def main() -> None:
        cluster, client = FakeCluster(), store.client()
        farewell = Farewell(
            cluster, client, lambda uid: RedisLedger(client, uid, 5), name  # type: ignore[arg-type]
        )  # fmt: skip
        try:
            await scene(cluster, client, farewell)
        finally:
            await client.aclose()

    asyncio.run(main())


async def started(
    cluster: FakeCluster, client: Redis, farewell: Farewell, **spec: Any
) -> dict[str, Any]:
    """A TuningRun with a claim and every key a run can have."""
    name = f"r{uuid.uuid4().hex[:8]}"
    run = await cluster.create(RUNS, "default", manifest(name, **spec))
    uid = run["metadata"]["uid"]
    ledger = RedisLedger(client, uid, 5)
    await ledger.describe(farewell.facts(run))
    event = Run(name=name, spec_hash="s", seed=1, algorithm="Random", version="1", space_hash="x")
    await ledger.note(event, key="run")
    await ledger.open(Open(c="3", frm=0, to=1, h="h", res=1.0), config={"lr": 1}, job="j")
    await ledger.commit(Done(c="3", to=1, a=0, state="ok", epochs=((1, 0.5, 1.0),), dev=1.0))
    await ledger.open(Open(c="4", frm=0, to=1, h="h", res=1.0), config={"lr": 2}, job="j")
    stream_id = (await ledger.read())[-1].id
    await ledger.save_snapshot(stream_id, b"state", version="1")
    claim = {
        "metadata": {"name": f"{name}-checkpoints", "namespace": "default",
                     "labels": {RUN_UID_LABEL: uid}},
    }  # fmt: skip
    await cluster.create(CLAIMS, "default", claim)
    return run


async def lifetimes(client: Redis, uid: str) -> dict[str, int]:
    keys = [key async for key in client.scan_iter(f"qtt:{{{uid}}}:*")]
    return {key.rpartition("}:")[2]: await client.ttl(key) for key in keys}


ALL_KEYS = {"meta", "log", "cfg", "open", "done", "head", "top", "snap", "curve:3"}


def claims(cluster: FakeCluster) -> list[str]:
    """Claims that the operator made: not the data set's."""
    kinds = [(plural, name) for plural, _, name in cluster.objects]
    return [name for plural, name in kinds if plural == "persistentvolumeclaims" and name != "data"]


def test_retain_lets_every_key_expire_and_leaves_the_claim(redis_store: EmbeddedStore) -> None:
    async def scene(cluster: FakeCluster, client: Redis, farewell: Farewell) -> None:
        uid = (await started(cluster, client, farewell))["metadata"]["uid"]
        before = await lifetimes(client, uid)
        assert before == dict.fromkeys(ALL_KEYS, -1)  # a living run's keys stay

        await farewell.say(uid, "default", "Retain")

        after = await lifetimes(client, uid)
        assert after.keys() == ALL_KEYS
        assert all(KEPT_SECONDS - 60 < left <= KEPT_SECONDS for left in after.values())
        assert len(claims(cluster)) == 1

    play(redis_store, scene)


def test_delete_removes_keys_and_our_claims_of_this_run_alone(redis_store: EmbeddedStore) -> None:
    async def scene(cluster: FakeCluster, client: Redis, farewell: Farewell) -> None:
        uid = (await started(cluster, client, farewell))["metadata"]["uid"]
        other = (await started(cluster, client, farewell))["metadata"]["uid"]

        await farewell.say(uid, "default", "Delete")

        assert await lifetimes(client, uid) == {}
        assert uid not in {entry.uid for entry in await find_runs(client)}
        assert (await lifetimes(client, other)).keys() == ALL_KEYS
        assert len(claims(cluster)) == 1

    play(redis_store, scene)


@pytest.mark.parametrize("policy", ["Retain", "Delete"])
def test_a_run_that_vanished_unseen_is_swept(redis_store: EmbeddedStore, policy: str) -> None:
    async def scene(cluster: FakeCluster, client: Redis, farewell: Farewell) -> None:
        run = await started(cluster, client, farewell, deletionPolicy=policy)
        living = await started(cluster, client, farewell)
        cluster.remove(run, "tuningruns")

        assert await farewell.sweep({living["metadata"]["uid"]}) == 1
        assert await farewell.sweep({living["metadata"]["uid"]}) == 0

        left = await lifetimes(client, run["metadata"]["uid"])
        assert set(left) == (ALL_KEYS if policy == "Retain" else set())
        assert all(seconds > 0 for seconds in left.values())
        assert set((await lifetimes(client, living["metadata"]["uid"])).values()) == {-1}

    play(redis_store, scene)


@pytest.mark.parametrize(
    "why", ["another install", "no cluster", "refused", "there", "no install of ours"]
)
def test_whose_run_it_is_must_be_sure_before_it_is_swept(
    redis_store: EmbeddedStore, why: str
) -> None:
    async def scene(cluster: FakeCluster, client: Redis, farewell: Farewell) -> None:
        run = await started(cluster, client, farewell)
        uid = run["metadata"]["uid"]
        ledger = RedisLedger(client, uid, 5)
        if why != "there":
            cluster.remove(run, "tuningruns")
        if why == "another install":
            await ledger.describe({**farewell.facts(run), "install": "theirs"})
        if why == "no cluster":  # a local run on a shared Redis
            await client.hdel(ledger.key("meta"), "install", "namespace")
        if why == "refused":
            cluster.faults.append(("GET", "tuningruns", 403))

        assert await farewell.sweep(()) == 0

        assert set((await lifetimes(client, uid)).values()) == {-1}

    play(redis_store, scene, install="" if why == "no install of ours" else None)


def test_keys_of_a_run_that_is_there_after_all_are_kept(redis_store: EmbeddedStore) -> None:
    async def scene(cluster: FakeCluster, client: Redis, farewell: Farewell) -> None:
        run = await started(cluster, client, farewell)
        uid = run["metadata"]["uid"]
        await farewell.say(uid, "default", "Retain")

        await farewell.sweep({uid})
        assert set((await lifetimes(client, uid)).values()) == {-1}

        await farewell.say(uid, "default", "Retain")
        await RedisLedger(client, uid, 5).describe(farewell.facts(run))
        assert set((await lifetimes(client, uid)).values()) == {-1}
        await RedisLedger(client, uid, 5).note(Close(reason="Stopped"), key="close")
        assert set((await lifetimes(client, uid)).values()) == {-1}

    play(redis_store, scene)


def test_an_overtaken_leader_lets_nothing_expire(redis_store: EmbeddedStore) -> None:
    async def scene(cluster: FakeCluster, client: Redis, farewell: Farewell) -> None:
        uid = (await started(cluster, client, farewell))["metadata"]["uid"]
        await RedisLedger(client, uid, 6).fence()

        await farewell.say(uid, "default", "Delete")

        assert (await lifetimes(client, uid)).keys() == ALL_KEYS
        assert claims(cluster)

    play(redis_store, scene)

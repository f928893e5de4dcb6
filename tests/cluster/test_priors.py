"""A TuningRun that names a prior: chosen once, recorded, said once, refused if it is not there."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtt_core.catalogue import SHIPPED
from qtt_core.ledger.events import Event, Open, Run
from qtt_operator.cluster import RUNS
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.store import EmbeddedStore
from tests.cluster.fake_cluster import FakeCluster
from tests.cluster.fake_operator import SETTINGS, FakeOperator, manifest

QUICKTUNE = {"algorithm": "QuickTune", "seed": 1, "costAware": False}
"""Decides by scores alone, so that two runs can be compared."""


def searching(portfolio: str) -> dict[str, Any]:
    search = {"space": "native", "hub": "tiny", "portfolio": portfolio, "poolSize": 8}
    budget = {"maxSteps": 4}
    return manifest(search=search, optimizer=QUICKTUNE, budget=budget, parallelism=1)


def said(cluster: FakeCluster) -> list[str]:
    events = [found for (kind, *_), found in cluster.objects.items() if kind == "events"]
    return [event["message"] for event in events if event["reason"] == "PriorChosen"]


async def recorded(store: EmbeddedStore, uid: str) -> list[Event]:
    client = store.client()
    try:
        return await RedisLedger.reader(client, uid).read()
    finally:
        await client.aclose()


def play(
    store: EmbeddedStore, portfolio: str, *, leaders: int = 1, priors: str = ""
) -> tuple[FakeCluster, list[Event]]:
    """A whole run, one leader after the other."""
    cluster = FakeCluster()

    async def main() -> list[Event]:
        run = await cluster.create(RUNS, "default", searching(portfolio))
        uid = run["metadata"]["uid"]
        for epoch in range(1, leaders + 1):
            settings = replace(SETTINGS, priors_folder=priors)
            operator = FakeOperator(cluster, store, epoch=epoch, settings=settings)
            async with operator.running():
                if epoch < leaders:
                    await operator.until(lambda n=epoch: len(cluster.jobs()) >= 2 * n)
                else:
                    await operator.until(lambda o=operator: o.is_true("Complete"))
        return await recorded(store, uid)

    return cluster, asyncio.run(main())


def decisions(events: list[Event]) -> list[tuple[str, int, str]]:
    return [(e.c, e.to, e.why.get("rule", "")) for e in events if isinstance(e, Open)]


def test_a_named_prior_is_recorded_told_once_and_outlives_a_leader(
    redis_store: EmbeddedStore,
) -> None:
    cluster, events = play(redis_store, "mini")
    _, again = play(redis_store, "mini", leaders=2)

    (run,) = (event for event in events if isinstance(event, Run))
    assert run.prior.startswith("mtlbm/micro@")
    (line,) = said(cluster)
    assert "in place of mtlbm/mini" in line
    status = cluster.objects[("tuningruns", "default", "toy")]["status"]
    assert status["prior"] == "mtlbm/micro"
    assert decisions(again) == decisions(events)


def test_a_run_without_a_prior_records_and_says_nothing(redis_store: EmbeddedStore) -> None:
    cluster, events = play(redis_store, "None")

    (run,) = (event for event in events if isinstance(event, Run))
    assert run.prior == ""
    assert said(cluster) == []
    assert "prior" not in cluster.objects[("tuningruns", "default", "toy")]["status"]


def test_a_prior_that_is_not_on_the_volume_is_named_until_it_is_there(
    redis_store: EmbeddedStore, tmp_path: Path
) -> None:
    (tmp_path / "fish").mkdir()
    shutil.copy(SHIPPED / "micro" / "card.json", tmp_path / "fish")
    cluster = FakeCluster()

    async def main() -> list[Event]:
        run = await cluster.create(RUNS, "default", searching("birds"))
        settings = replace(SETTINGS, priors_folder=str(tmp_path), resync_seconds=0.2)
        operator = FakeOperator(cluster, redis_store, settings=settings)
        async with operator.running():
            await operator.until(lambda: operator.condition("Accepted") != {})
            accepted = operator.condition("Accepted")
            assert (accepted["status"], accepted["reason"]) == ("False", "InvalidSearchSpace")
            for word in ("spec.search.portfolio", "'birds'", "fish", "micro", "qtt metatrain"):
                assert word in accepted["message"]
            shutil.copytree(SHIPPED / "micro", tmp_path / "birds")
            await operator.until(lambda: operator.is_true("Complete"))
        return await recorded(redis_store, run["metadata"]["uid"])

    events = asyncio.run(main())

    (run,) = (event for event in events if isinstance(event, Run))
    assert run.prior.startswith("own/birds@")


def test_a_prior_that_changes_under_a_run_is_a_drift(
    redis_store: EmbeddedStore, tmp_path: Path
) -> None:
    shutil.copytree(SHIPPED / "micro", tmp_path / "birds")
    cluster, card = FakeCluster(), tmp_path / "birds" / "card.json"

    async def main() -> None:
        await cluster.create(RUNS, "default", searching("birds"))
        settings = replace(SETTINGS, priors_folder=str(tmp_path))
        first = FakeOperator(cluster, redis_store, epoch=1, settings=settings)
        async with first.running():
            await first.until(lambda: len(cluster.jobs()) >= 2)
        card.write_text(card.read_text() + "\n")
        second = FakeOperator(cluster, redis_store, epoch=2, settings=settings)
        async with second.running():
            await second.until(lambda: second.condition("Accepted").get("reason") == "SpecDrift")
            assert "prior of spec.search.portfolio" in second.condition("Accepted")["message"]

    asyncio.run(main())

"""A cluster run's ledger, read whole from the operator's Redis: nothing else is needed to learn."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from qtt_core.experience import from_ledgers
from qtt_core.hub import load_hub
from qtt_core.ledger.file import Ledger, parse_ledger
from qtt_operator.cluster import CONFIG_MAPS, RUNS
from qtt_operator.ledger_transfer import find_run_in, read_whole
from qtt_operator.store import EmbeddedStore
from tests.cluster.fake_cluster import FakeCluster
from tests.cluster.fake_operator import FakeOperator, manifest

CARDS = [card for card in load_hub("tiny").to_json()["cards"] if card["name"] != "mini_vit"]


def exported(store: EmbeddedStore, **search: Any) -> Ledger:
    """A whole run by the fake operator, then its ledger by its name."""
    cluster = FakeCluster()
    cards = {"metadata": {"name": "mine", "namespace": "default"}}

    async def main() -> Ledger:
        await cluster.create(CONFIG_MAPS, "default", {**cards, "data": {"cards.json": CONTENT}})
        run = await cluster.create(RUNS, "default", manifest(search=search))
        operator = FakeOperator(cluster, store)
        async with operator.running():
            await operator.until(lambda: operator.is_true("Complete"))
        client = store.client()
        try:
            uid = run["metadata"]["uid"]
            assert await find_run_in(client, uid) == uid
            return await read_whole(client, uid)
        finally:
            await client.aclose()

    return asyncio.run(main())


CONTENT = json.dumps({"cards": CARDS})


def test_a_run_on_a_hub_of_its_own_is_exported_with_it(redis_store: EmbeddedStore) -> None:
    hub_ref = {"name": "mine", "key": "cards.json"}
    ledger = exported(redis_store, space="native", hubRef=hub_ref, portfolio="None", poolSize=16)

    again = parse_ledger(ledger.lines(), "x")
    meta = from_ledgers([again])

    assert again == ledger
    assert meta.hub is not None
    assert [card.name for card in meta.hub.cards] == [card["name"] for card in CARDS]
    assert len(meta.configs) > 0

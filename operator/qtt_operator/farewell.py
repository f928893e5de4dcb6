"""What becomes of a run's keys and claims when its TuningRun is gone (30-kubernetes 1.3, 5.7).

`deletionPolicy: Retain` lets the ledger expire after 30 days and leaves every claim; `Delete`
removes both now. A sweep does the same for runs that vanished while no operator was there: only
those that this install worked on and that the API server says are gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from redis.asyncio import Redis

from qtt_core.errors import ClusterError, ClusterUnavailableError
from qtt_core.ledger.reply import Reply
from qtt_operator.cluster import CLAIMS, RUNS, Cluster, Object
from qtt_operator.names import RUN_UID_LABEL
from qtt_operator.redis_client import RunEntry, find_runs, forget_run
from qtt_operator.redis_ledger import RedisLedger

log = logging.getLogger(__name__)

KEPT_SECONDS = 30 * 24 * 3600
"""How long the ledger of a deleted run stays under `Retain`."""

PAGE = 500


class Farewell:
    """`install`: which operator's runs these are; empty switches the sweep off."""

    def __init__(
        self, cluster: Cluster, store: Redis, ledger_of: Callable[[str], RedisLedger], install: str
    ) -> None:
        self._cluster, self._store, self._ledger_of = cluster, store, ledger_of
        self._install = install

    def facts(self, found: Object) -> dict[str, str]:
        """What the ledger notes of a TuningRun, so that a later sweep knows what to do."""
        return {
            "namespace": found["metadata"]["namespace"],
            "name": found["metadata"]["name"],
            "install": self._install,
            "deletionPolicy": found["spec"].get("deletionPolicy", "Retain"),
        }

    async def say(self, uid: str, namespace: str, policy: str) -> None:
        """Part with a run whose TuningRun is gone. Raises: StoreUnavailableError, ClusterError."""
        ledger, wiped = self._ledger_of(uid), policy == "Delete"
        reply = await ledger.set_lifetime(0 if wiped else KEPT_SECONDS)
        if reply is Reply.STALE:
            return  # a newer leader will do it
        if wiped:
            await self._delete_claims(uid, namespace)
            await forget_run(self._store, uid)
        log.info("%s: gone; its ledger %s", uid, "is deleted" if wiped else "expires in 30 days")

    async def sweep(self, alive: Collection[str]) -> int:
        """Part with runs that vanished unseen, keep the keys of `alive` ones; how many went.

        Raises: StoreUnavailableError; ClusterUnavailableError.
        """
        gone = 0
        for entry in await find_runs(self._store):
            if not self._install or entry.facts.get("install") != self._install:
                continue
            if entry.uid in alive:
                if entry.expires:
                    await self._ledger_of(entry.uid).set_lifetime(None)
            elif not entry.expires and await self._is_gone(entry):
                await self.say(
                    entry.uid, entry.facts["namespace"], entry.facts.get("deletionPolicy", "")
                )
                gone += 1
        return gone

    async def _is_gone(self, entry: RunEntry) -> bool:
        """Whether the API server says so; a refusal is no answer."""
        namespace = entry.facts.get("namespace", "")
        if not (namespace and entry.name):
            return False
        try:
            found = await self._cluster.get(RUNS, namespace, entry.name)
        except ClusterUnavailableError:
            raise
        except ClusterError as error:
            log.debug("%s/%s: %s", namespace, entry.name, error)
            return False
        return found is None or found["metadata"]["uid"] != entry.uid

    async def _delete_claims(self, uid: str, namespace: str) -> None:
        """Claims we made; those that were owned by the TuningRun are on their way already."""
        for claim in await claims_of(self._cluster, namespace, uid):
            metadata = claim["metadata"]
            if "deletionTimestamp" not in metadata:
                await self._cluster.delete(
                    CLAIMS, namespace, metadata["name"], uid=metadata["uid"], foreground=False
                )


async def claims_of(cluster: Cluster, namespace: str, uid: str) -> list[Object]:
    """Every claim that carries a run's label. Raises: ClusterError."""
    found: list[Object] = []
    token = ""
    while True:
        page = await cluster.page(
            CLAIMS, namespace, selector=f"{RUN_UID_LABEL}={uid}", limit=PAGE, token=token
        )
        found += page.get("items") or ()
        token = page["metadata"].get("continue") or ""
        if not token:
            return found

"""The store of a local run: a server of our own, or somebody else's by `--redis-url`.

Opens it, says when its settings risk the ledger, and brings it back after a failed turn.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis

from qtt_core.errors import StoreUnavailableError, VolumeError
from qtt_operator.redis_client import check_store, connect
from qtt_operator.store import EmbeddedStore

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
"""How long a store that went away is waited for; results wait with their jobs meanwhile."""

RESTARTS = 5
"""Of our own server in one run; more of them mean that something is wrong with the machine."""


class LocalStore:
    """A client and, if it is ours, the server behind it."""

    def __init__(self, client: Redis, embedded: EmbeddedStore | None) -> None:
        self.client = client
        self._embedded = embedded
        self._restarts = 0
        self._lost_at: float | None = None

    def is_well(self) -> None:
        """A turn has succeeded: forget earlier trouble."""
        self._lost_at = None

    async def recover(self, error: StoreUnavailableError) -> None:
        """After a failed turn: restart our server, or wait for somebody else's.

        Raises: VolumeError if our server ended because it cannot write; the error once restarts or
        patience are used up; what the restart raises.
        """
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
            log.warning("%s", error)
        if self._embedded is not None and not self._embedded.is_alive():
            failure = self._embedded.failure()
            if isinstance(failure, VolumeError):  # the next one would end in the same way
                raise failure from error
            self._restarts += 1
            if self._restarts > RESTARTS:
                raise error
            self._embedded.restart()
        elif now - self._lost_at > PATIENCE_SECONDS:
            raise error
        else:
            await asyncio.sleep(min(10.0, 0.5 + (now - self._lost_at)))


@asynccontextmanager
async def open_store(
    state_dir: Path, url: str | None
) -> AsyncIterator[tuple[LocalStore, list[str]]]:
    """The store, and advice on its settings.

    Raises: StoreUnavailableError if nobody answers there; what `EmbeddedStore.start` raises.
    """
    if url is not None:
        try:
            client = await connect(url)
        except StoreUnavailableError as error:
            remedy = (
                "start it or correct --redis-url; without the option a server of our own is used"
            )
            raise StoreUnavailableError(f"{error}; {remedy}") from error
        try:
            yield LocalStore(client, None), await check_store(client)
        finally:
            await client.aclose()
        return
    with EmbeddedStore(state_dir) as embedded:
        client = embedded.client()
        try:
            yield LocalStore(client, embedded), []
        finally:
            await client.aclose()

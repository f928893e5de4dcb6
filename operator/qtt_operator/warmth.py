"""Optimizer workers are started with the first unfinished TuningRun and ended after the last.

On the leader and on standby processes alike: a new leader must not wait seconds for torch before it
opens its first step. An operator without work is its main process alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from qtt_core.errors import ClusterError
from qtt_operator.cluster import RUNS, Cluster
from qtt_operator.cluster_status import ended

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
LINGER_SECONDS = 600.0
"""From the end of the last run to the end of the workers."""

PAGE = 50


class Workers(Protocol):
    """What is kept warm."""

    async def warm(self) -> None:
        """Start what does not run."""

    async def idle(self) -> None:
        """End what nobody uses."""


class Warmth:
    """`unfinished` tells whether any TuningRun is not over."""

    def __init__(
        self,
        workers: Workers,
        unfinished: Callable[[], Awaitable[bool]],
        *,
        look_seconds: float = LOOK_SECONDS,
        linger_seconds: float = LINGER_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers, self._unfinished, self._now = workers, unfinished, now
        self._look, self._linger = look_seconds, linger_seconds
        self._needed_at: float | None = None

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            try:
                await self.look()
            except (ClusterError, OSError) as error:
                log.warning("optimizer workers: %s", error)
            await asyncio.sleep(self._look)

    async def look(self) -> None:
        """Start or end the workers, if it is time. Raises: ClusterError, OSError."""
        if await self._unfinished():
            self._needed_at = self._now()
            await self._workers.warm()
        elif self._needed_at is not None and self._now() - self._needed_at >= self._linger:
            self._needed_at = None
            log.info("no unfinished run: the optimizer workers end")
            await self._workers.idle()


async def any_unfinished(cluster: Cluster, namespaces: Sequence[str]) -> bool:
    """Ask the server page by page until a TuningRun is found that is not over.

    For a standby, which keeps no copy of them. Raises: ClusterError.
    """
    for namespace in namespaces or ("",):
        token = ""
        while True:
            page = await cluster.page(RUNS, namespace, selector="", limit=PAGE, token=token)
            if not all(ended(found) for found in page.get("items") or ()):
                return True
            token = page["metadata"].get("continue") or ""
            if not token:
                break
    return False

"""A queue of keys: each key is handled by one task at a time, as often as needed and no oftener.

A key that is added while it is handled is handled again afterwards. A key that fails is tried again
later and later; a key may also be added for a later moment. The earliest moment wins.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from qtt_core.errors import QuickTuneError

log = logging.getLogger(__name__)

Key = TypeVar("Key", bound=tuple[str, ...])

FIRST_BACKOFF, LAST_BACKOFF = 0.5, 60.0


def backoff_seconds(failures: int) -> float:
    """Wait after so many failures in a row: 0.5, 1, 2 … 60 s."""
    return float(min(LAST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(failures - 1, 20)))


class WorkQueue(Generic[Key]):
    """Runs `handle(key)`; what it returns is when to come back (seconds), None = when told."""

    def __init__(
        self,
        handle: Callable[[Key], Awaitable[float | None]],
        *,
        workers: int = 8,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handle, self._workers, self._now = handle, workers, now
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._busy: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()
        self._count = 0

    def add(self, key: Key, after: float = 0.0) -> None:
        """Handle the key after so many seconds, or earlier if it is already due earlier."""
        due = self._now() + after
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._count += 1  # equal times come in order, keys need no order
            heapq.heappush(self._heap, (due, self._count, key))
            self._changed.set()

    def forget(self, key: Key) -> None:
        """Drop a key's plans and its failures."""
        self._due.pop(key, None)
        self._failures.pop(key, None)

    @property
    def depth(self) -> int:
        """Keys that are due now and wait for a worker."""
        now = self._now()
        return sum(1 for key, due in self._due.items() if due <= now and key not in self._busy)

    @property
    def oldest_seconds(self) -> float:
        """How long the most patient of them has waited."""
        now = self._now()
        waits = [now - due for key, due in self._due.items() if key not in self._busy]
        return max([0.0, *waits])

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            slots = asyncio.Semaphore(self._workers)
            while True:
                await slots.acquire()
                key = await self._next()
                self._busy.add(key)
                group.create_task(self._serve(key, slots))

    async def _next(self) -> Key:
        """The key that has waited longest, once it is due and nobody handles it."""
        while True:
            self._changed.clear()
            key, wait = self._first()
            if key is not None:
                return key
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _first(self) -> tuple[Key | None, float | None]:
        """(a key that may be handled now, or None; seconds until the next one is due)."""
        blocked = []
        found: Key | None = None
        wait: float | None = None
        while self._heap:
            due, count, key = heapq.heappop(self._heap)
            if self._due.get(key) != due:
                continue  # forgotten, or due earlier by a later entry
            if key in self._busy:
                blocked.append((due, count, key))
            elif due <= self._now():
                del self._due[key]
                found = key
                break
            else:
                heapq.heappush(self._heap, (due, count, key))
                wait = due - self._now()
                break
        for entry in blocked:
            heapq.heappush(self._heap, entry)
        return found, wait

    async def _serve(self, key: Key, slots: asyncio.Semaphore) -> None:
        try:
            after = await self._handle(key)
            self._failures.pop(key, None)
        except Exception as error:  # the top of a turn: log, count, go on
            self._failures[key] = self._failures.get(key, 0) + 1
            after = backoff_seconds(self._failures[key])
            trace = None if isinstance(error, QuickTuneError) else error
            log.error("%s failed, again in %.1f s: %s", "/".join(key), after, error, exc_info=trace)
        finally:
            self._busy.discard(key)
            slots.release()
            self._changed.set()
        if after is not None:
            self.add(key, after)

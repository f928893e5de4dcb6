"""How many Jobs all runs of an install may have open together (`max_open_jobs`), and one of them
at most (`max_parallelism`).

Turns of several runs go on at once: the room that one is given is held for it until its turn ends,
so that the limit is never passed. A run that got less than it wants is woken when there is room
again, the one that has waited longest first.
"""

from __future__ import annotations

from collections.abc import Callable

Key = tuple[str, str]


class JobLimit:
    """`wake` is called with the key of a run that may open more."""

    def __init__(self, most: int, each: int, wake: Callable[[Key], None]) -> None:
        self._most, self._each, self._wake = most, each, wake
        self._held: dict[Key, int] = {}
        self._total = 0
        self._waiting: dict[Key, None] = {}

    def room(self, key: Key, wanted: int) -> int:
        """Jobs that a run may have open until it settles, those it has included."""
        mine, wanted = self._held.get(key, 0), min(wanted, self._each)
        room = min(self._each, max(0, self._most - (self._total - mine)))
        self._hold(key, max(mine, min(wanted, room)))
        self._waiting.pop(key, None)
        if room < wanted:
            self._waiting[key] = None
        return room

    def settle(self, key: Key, count: int) -> None:
        """The turn is over: the run has so many open decisions or Jobs."""
        self._hold(key, count)
        waiting = next((other for other in self._waiting if other != key), None)
        if self._total < self._most and waiting is not None:
            del self._waiting[waiting]
            self._wake(waiting)

    def forget(self, key: Key) -> None:
        """The run is active no more."""
        self._waiting.pop(key, None)
        self.settle(key, 0)
        del self._held[key]

    def _hold(self, key: Key, count: int) -> None:
        self._total += count - self._held.get(key, 0)
        self._held[key] = count

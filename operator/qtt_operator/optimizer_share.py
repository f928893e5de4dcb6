"""A few optimizer worker processes shared by many runs: each call borrows one.

A worker holds one run's optimizer. A run goes back to the worker that still knows it, else takes
the one that was idle longest and replays its own events there. Implements `turn.OptimizerPort`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from qtt_core.errors import QuickTuneError
from qtt_core.steps import (
    BudgetView,
    OptimizerEvent,
    OptimizerSetup,
    Proposal,
    Recommendation,
)
from qtt_operator.optimizer_pool import Answer, OptimizerClient, SpaceIdentity

Pairs = list[tuple[str, OptimizerEvent]]


@dataclass(slots=True, eq=False)
class _Slot:
    """A worker and the run it holds."""

    client: OptimizerClient
    holder: SharedOptimizer | None = None
    busy: bool = False
    used: int = 0


class OptimizerShare:
    """At most `workers` processes; they start with the first call and end with `close`."""

    def __init__(self, workers: int, *, timeout_seconds: float = 60.0) -> None:
        self._slots = [
            _Slot(OptimizerClient(timeout_seconds=timeout_seconds)) for _ in range(workers)
        ]
        self._free = asyncio.Condition()
        self._count = 0

    def port(self) -> SharedOptimizer:
        """One run's optimizer."""
        return SharedOptimizer(self)

    async def close(self) -> None:
        """End every process."""
        for slot in self._slots:
            slot.holder = None
            await slot.client.close()

    async def idle(self) -> None:
        """End the processes that nobody uses now; a later call starts them again."""
        for slot in self._slots:
            if not slot.busy:
                slot.holder = None
                await slot.client.close()

    def drop(self, port: SharedOptimizer) -> None:
        """A run has ended: its worker is free for others."""
        for slot in self._slots:
            if slot.holder is port:
                slot.holder = None

    @contextlib.asynccontextmanager
    async def borrow(self, port: SharedOptimizer) -> AsyncIterator[_Slot]:
        """A worker for one call, the one that holds this run if it is free."""
        async with self._free:
            while (slot := self._choose(port)) is None:
                await self._free.wait()
            slot.busy = True
            self._count += 1
            slot.used = self._count
        try:
            yield slot
        finally:
            async with self._free:
                slot.busy = False
                self._free.notify_all()

    def _choose(self, port: SharedOptimizer) -> _Slot | None:
        held = [slot for slot in self._slots if slot.holder is port]
        if held:
            return None if held[0].busy else held[0]
        free = [slot for slot in self._slots if not slot.busy]
        return min(free, key=lambda slot: (slot.holder is not None, slot.used), default=None)


class SharedOptimizer:
    """One run's optimizer: what it was told is kept here, so that any worker can be taught."""

    def __init__(self, share: OptimizerShare) -> None:
        self._share = share
        self._setup: OptimizerSetup | None = None
        self._events: Pairs = []

    async def describe(self, setup: OptimizerSetup) -> SpaceIdentity:
        """Name and digest of a setup's space. Raises: SpecError, OptimizerError."""
        async with self._share.borrow(self) as slot:
            return await slot.client.describe(setup)

    async def load(
        self, setup: OptimizerSetup, events: Sequence[tuple[str, OptimizerEvent]]
    ) -> None:
        """Build the optimizer and replay (stream id, event) pairs."""
        self._setup, self._events = setup, list(events)
        self._share.drop(self)
        async with self._taught():
            pass

    async def tell(self, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        """Feed further events, in ledger order."""
        async with self._taught() as client:
            await client.tell(events)
        self._events.extend(events)

    async def ask(self, n: int, budget: BudgetView) -> Answer:
        """At most n proposals of distinct configurations."""
        async with self._taught() as client:
            return await client.ask(n, budget)

    async def recommend(self) -> Recommendation | None:
        """The incumbent, None before the first score."""
        async with self._taught() as client:
            return await client.recommend()

    async def explain(self, proposal: Proposal) -> str:
        """One sentence: why this proposal."""
        async with self._taught() as client:
            return await client.explain(proposal)

    @contextlib.asynccontextmanager
    async def _taught(self) -> AsyncIterator[OptimizerClient]:
        """A worker that knows all this run was told."""
        assert self._setup is not None  # load comes first
        async with self._share.borrow(self) as slot:
            if slot.holder is not self:
                slot.holder = None
                await slot.client.load(self._setup, self._events)
                slot.holder = self
            try:
                yield slot.client
            except QuickTuneError:
                slot.holder = None
                raise

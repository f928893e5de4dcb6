"""A few optimizer worker processes shared by many runs: each call borrows one.

A worker holds one run's optimizer. A run goes back to the worker that still knows it, else takes
the one that was idle longest and replays its own events there. Where the optimizer fails again and
again, its run goes on with random proposals for a while. Implements `turn.OptimizerPort`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from qtt_core.errors import QuickTuneError
from qtt_core.steps import BudgetView, OptimizerSetup, Proposal, Recommendation, Why
from qtt_operator.optimizer_pool import (
    COMMAND,
    Answer,
    OptimizerClient,
    OptimizerLostError,
    Pairs,
    SpaceIdentity,
    Told,
    WorkerNews,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

FALLBACK = "FreezeThawRandom"
"""Needs no model of anything, goes on with configurations it knows, and stops at full fidelity."""

FALLBACK_RULE = "fallback-random"
"""`why.rule` of a decision that was made in the optimizer's place."""

REST_SECONDS = 600.0
"""How long an optimizer that was lost three times in a row is not tried again."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A worker and the run it holds."""

    client: OptimizerClient
    holder: SharedOptimizer | None = None
    busy: bool = False
    used: int = 0


class ShareNews(WorkerNews):
    """Told of what the workers do, and of asks that no optimizer answered."""

    def fell_back(self) -> None:
        """An ask was answered at random."""


class OptimizerShare:
    """At most `workers` processes; they start with `warm` or the first call, end with `idle`."""

    def __init__(
        self,
        workers: int,
        *,
        news: ShareNews | None = None,
        command: tuple[str, ...] = COMMAND,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.news, self.now = news or ShareNews(), now
        self._slots = [
            _Slot(OptimizerClient(command=command, news=self.news)) for _ in range(workers)
        ]
        self._free = asyncio.Condition()
        self._count = 0

    def port(self, timeout_seconds: float = 60.0) -> SharedOptimizer:
        """One run's optimizer; `timeout_seconds`: of each of its calls."""
        return SharedOptimizer(self, timeout_seconds)

    async def warm(self) -> None:
        """Start every process that does not run; each loads its libraries while it waits."""
        for slot in self._slots:
            if not slot.busy:
                await slot.client.warm()

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
        slot.client.timeout_seconds = port.timeout_seconds
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

    def __init__(self, share: OptimizerShare, timeout_seconds: float) -> None:
        self._share, self.timeout_seconds = share, timeout_seconds
        self._setup: OptimizerSetup | None = None
        self._told = Told()
        self._rests_until = 0.0
        self.trouble: tuple[str, str] | None = None
        """Reason and message of the condition OptimizerHealthy while all is not well."""

    async def describe(self, setup: OptimizerSetup) -> SpaceIdentity:
        """Name and digest of a setup's space. Raises: SpecError, OptimizerError."""
        async with self._share.borrow(self) as slot:
            return await slot.client.describe(setup)

    async def load(self, setup: OptimizerSetup, events: Pairs) -> None:
        """Build the optimizer and replay (stream id, event) pairs."""
        told = Told()
        await told.add(events)
        self._setup, self._told, self._rests_until = setup, told, 0.0
        self._share.drop(self)
        await self._call(_nothing)

    async def tell(self, events: Pairs) -> None:
        """Feed further events, in ledger order."""
        try:
            await self._with(self._setup_now(), lambda client: client.tell(events))
        except OptimizerLostError as error:
            if not self._rests:
                self._give_up(error)
            await self._told.add(events)  # whoever is taught next hears them

    async def ask(self, n: int, budget: BudgetView) -> Answer:
        """At most n proposals of distinct configurations."""
        answer = await self._call(lambda client: client.ask(n, budget))
        if not self._rests:
            return answer
        self._share.news.fell_back()
        honest = (replace(x, why=Why(rule=FALLBACK_RULE)) for x in answer.proposals)
        return replace(answer, proposals=tuple(honest))

    async def recommend(self) -> Recommendation | None:
        """The incumbent, None before the first score."""
        return await self._call(lambda client: client.recommend())

    async def explain(self, proposal: Proposal) -> str:
        """One sentence: why this proposal."""
        return await self._call(lambda client: client.explain(proposal))

    # --- one call ----------------------------------------------------------------------------

    async def _call(self, work: Callable[[OptimizerClient], Awaitable[T]]) -> T:
        """Ask the run's own optimizer, and the fallback where that is lost three times."""
        try:
            return await self._with(self._setup_now(), work)
        except OptimizerLostError as error:
            if self._rests:
                raise
            self._give_up(error)
            return await self._with(self._setup_now(), work)

    @property
    def _rests(self) -> bool:
        return self._share.now() < self._rests_until

    def _setup_now(self) -> OptimizerSetup:
        assert self._setup is not None  # load comes first
        return replace(self._setup, algorithm=FALLBACK) if self._rests else self._setup

    def _give_up(self, error: OptimizerLostError) -> None:
        self._rests_until = self._share.now() + REST_SECONDS
        minutes = REST_SECONDS / 60
        text = f"{error.reason}: {error}; proposals are random for {minutes:.0f} minutes"
        self.trouble = ("FallbackRandom", text)
        log.error("optimizer: %s", text)

    async def _with(
        self, setup: OptimizerSetup, work: Callable[[OptimizerClient], Awaitable[T]]
    ) -> T:
        """Let a worker that knows all this run was told do some work."""
        async with self._share.borrow(self) as slot:
            client, losses = slot.client, slot.client.losses
            try:
                if slot.holder is not self or client.setup != setup:
                    slot.holder = None
                    await client.teach(setup, self._told)
                    slot.holder = self
                result = await work(client)
            except QuickTuneError:
                slot.holder = None
                raise
            self._note_losses(client, losses)
            return result

    def _note_losses(self, client: OptimizerClient, before: int) -> None:
        """A worker that was lost and built again is said until a call goes well."""
        if client.losses > before:
            text = "a worker was lost, started again and taught all it knew"
            self.trouble = (client.last_loss, text)
        elif not self._rests:
            self.trouble = None


async def _nothing(_client: OptimizerClient) -> None:
    """Being taught is all."""

"""The ledger in memory keeps the contract."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from qtt_core.testing.ledger import MemoryLedger, MemoryStore
from qtt_core.testing.ledger_contract import LedgerContract, Writer, opening, play_in_loop


class TestMemoryLedger(LedgerContract):
    def play(self, scenario: Callable[[Writer], Awaitable[None]]) -> None:
        play_in_loop(scenario, MemoryLedger().writer)


def test_ids_follow_the_clock_and_never_go_back() -> None:
    times = iter([100.0, 100.0, 99.0, 101.5])
    ledger = MemoryLedger(clock=lambda: next(times))

    async def write() -> list[str]:
        return [(await ledger.open(opening(str(c)), config=None, job="j"))[1] for c in range(4)]

    assert asyncio.run(write()) == ["100000-0", "100000-1", "100000-2", "101500-0"]


def test_two_runs_share_nothing() -> None:
    assert MemoryStore().log is not MemoryStore().log

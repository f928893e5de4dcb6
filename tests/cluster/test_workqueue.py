"""The queue of runs: one task a key, nothing lost, failures wait longer and longer."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from qtt_operator.workqueue import WorkQueue, backoff_seconds

Key = tuple[str, ...]


def serve(queue: WorkQueue[Key], seconds: float = 0.1) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await queue.run()

    asyncio.run(main())


def test_a_key_added_often_is_handled_once() -> None:
    seen = Counter[Key]()

    async def handle(key: Key) -> None:
        seen[key] += 1

    queue: WorkQueue[Key] = WorkQueue(handle)
    for _ in range(5):
        queue.add(("a",))
    serve(queue)

    assert seen == {("a",): 1}


def test_a_key_added_while_it_is_handled_is_handled_again_and_never_twice_at_once() -> None:
    running, most, count = 0, 0, 0

    async def handle(key: Key) -> None:
        nonlocal running, most, count
        running, count = running + 1, count + 1
        most = max(most, running)
        if count < 3:
            queue.add(key)
        await asyncio.sleep(0.01)
        running -= 1

    queue: WorkQueue[Key] = WorkQueue(handle)
    queue.add(("a",))
    serve(queue)

    assert (most, count) == (1, 3)


def test_a_slow_key_does_not_hold_up_the_others() -> None:
    seen: list[Key] = []

    async def handle(key: Key) -> None:
        await asyncio.sleep(10 if key == ("slow",) else 0)
        seen.append(key)

    queue: WorkQueue[Key] = WorkQueue(handle, workers=2)
    for key in (("slow",), ("a",), ("b",)):
        queue.add(key)
    serve(queue)

    assert seen == [("a",), ("b",)]


def test_the_earlier_moment_wins() -> None:
    seen: list[Key] = []

    async def handle(key: Key) -> None:
        seen.append(key)

    queue: WorkQueue[Key] = WorkQueue(handle)
    queue.add(("a",), after=60)
    queue.add(("a",), after=0.01)
    queue.add(("a",), after=30)
    serve(queue)

    assert seen == [("a",)]


def test_a_key_that_fails_is_tried_again_later(caplog: pytest.LogCaptureFixture) -> None:
    count = 0

    async def handle(_key: Key) -> None:
        nonlocal count
        count += 1
        raise RuntimeError("no")

    queue: WorkQueue[Key] = WorkQueue(handle)
    queue.add(("a",))
    serve(queue)

    assert count == 1
    assert "again in 0.5 s" in caplog.text


def test_waits_double_up_to_a_minute() -> None:
    assert [backoff_seconds(n) for n in (1, 2, 3, 8, 50)] == [0.5, 1.0, 2.0, 60.0, 60.0]


def test_what_a_turn_returns_is_when_it_comes_back() -> None:
    count = 0

    async def handle(_key: Key) -> float | None:
        nonlocal count
        count += 1
        return 0.0 if count < 4 else None

    queue: WorkQueue[Key] = WorkQueue(handle)
    queue.add(("a",))
    serve(queue)

    assert count == 4

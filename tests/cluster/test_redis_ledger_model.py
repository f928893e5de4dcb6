"""Random histories played on Redis and on the ledger in memory: they never differ."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtt_core.history import best_so_far, histories
from qtt_core.ledger.events import (
    Cancel,
    Close,
    Done,
    Event,
    Fail,
    Note,
    Open,
    Prepared,
    Reopen,
    Retry,
    Run,
    is_pseudo,
)
from qtt_core.ledger.fold import fold
from qtt_core.ledger.reply import Reply
from qtt_core.testing.ledger import MemoryLedger, OpenRow
from qtt_core.testing.ledger_contract import AnyLedger
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.store import EmbeddedStore

NAMES = st.sampled_from(["0", "1", "2", "prepare", "eval-a"])
CONFIGS = st.sampled_from([{"model": "a"}, {"model": "b"}])
Operation = Callable[[AnyLedger], Awaitable[object]]


def small(draw: st.DrawFn, likely: int, low: int = 0, high: int = 6) -> int:
    """Mostly the number that the ledger expects, else any."""
    return likely if draw(st.integers(0, 7)) else draw(st.integers(low, high))


@st.composite
def operation(draw: st.DrawFn, memory: MemoryLedger) -> tuple[str, Operation]:
    """One call that has a fair chance to be accepted, and its kind."""
    kind = draw(st.sampled_from(["open", "open", "done", "done", "end", "retry", "note"]))
    c = draw(st.sampled_from(sorted(memory.store.open) or ["0"]) | NAMES)
    row = memory.store.open.get(c, OpenRow(frm=0, to=1, attempt=0, job="", decision=""))
    if kind == "open":
        return kind, draw(opening(memory, draw(NAMES)))
    if kind == "note":
        return kind, draw(noting(row))
    to, attempt = small(draw, row.to, 1), small(draw, row.attempt, 0, 2)
    cost = {"dev": draw(st.integers(0, 9000)) / 1000, "q": draw(st.sampled_from([0.0, 1.5]))}
    event: Done | Fail | Retry | Cancel
    if kind == "retry":
        event = Retry(c=c, to=to, a=attempt + 1, reason="timeout", **cost)
    elif kind == "done" and not is_pseudo(c):
        last = draw(st.just(to) | st.integers(row.frm, max(row.frm, to)))
        first = draw(st.integers(1, row.frm + 1))
        epochs = tuple((e, draw(st.integers(0, 8)) / 8, 0.5) for e in range(first, last + 1))
        state = "ok" if epochs and last == to else "diverged"
        event = Done(c=c, to=to, a=attempt, state=state, epochs=epochs, ov=0.25, **cost)
    elif draw(st.booleans()) and not is_pseudo(c):
        event = Fail(c=c, to=to, a=attempt, state="oom", **cost)
    else:
        event = Cancel(c=c, to=to, a=attempt, reason="x", retire=draw(st.booleans()), **cost)
    return event.kind, lambda ledger: ledger.commit(event, job="next")


@st.composite
def opening(draw: st.DrawFn, memory: MemoryLedger, c: str) -> Operation:
    frm = small(draw, memory.store.head.get(c, 0))
    to = frm + 1 if is_pseudo(c) else frm + draw(st.integers(1, 4))
    config = None if is_pseudo(c) else {"model": c} if draw(st.integers(0, 9)) else draw(CONFIGS)
    event = Open(c=c, frm=frm, to=to, h="h", res=draw(st.integers(0, 100)) / 8)
    return lambda ledger: ledger.open(event, config=config, job="j")


@st.composite
def noting(draw: st.DrawFn, row: OpenRow) -> Operation:
    a = small(draw, row.attempt, 0, 2)
    event: Event = draw(
        st.sampled_from(
            [
                Note(what="budget", new="9"),
                Prepared(fingerprint="f", n_train=1, n_val=1, classes=2, to=row.to, a=a, dev=0.5),
                Note(what="evaluation", c="eval-a", to=row.to, a=a),
                Close(reason="Stopped"),
                Reopen(reason="again"),
            ]
        )
    )
    key = f"{event.kind}-{draw(st.integers(0, 4))}"
    return lambda ledger: ledger.note(event, key=key)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data(), st.integers(1, 3))
def test_redis_and_memory_answer_alike(
    redis_store: EmbeddedStore, data: st.DataObject, step_epochs: int
) -> None:
    """Same words, same stream, same counters; and the stream always folds."""
    run = Run(
        name="r", spec_hash="", seed=0, algorithm="", version="", space_hash="",
        spec={"fidelity": {"max": 50, "step": step_epochs}},
    )  # fmt: skip

    async def scenario() -> None:
        client, uid = redis_store.client(), uuid.uuid4().hex
        memory = MemoryLedger()
        try:
            await play(memory, lambda epoch: RedisLedger(client, uid, epoch))
        finally:
            await client.aclose()

    async def play(memory: MemoryLedger, writer: Callable[[int], RedisLedger]) -> None:
        epoch = 1
        await memory.note(run, key="run")
        await writer(1).note(run, key="run")
        for _ in range(data.draw(st.integers(1, 30))):
            epoch = max(1, epoch + data.draw(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, -1])))
            kind, call = data.draw(operation(memory))
            ours, theirs = await call(memory.writer(epoch)), await call(writer(epoch))
            assert isinstance(ours, tuple)
            assert isinstance(theirs, tuple)
            assert ours[0] is theirs[0], kind
            assert bool(ours[1]) == bool(theirs[1]) == (ours[0] is Reply.OK)
        await compare(memory, writer(epoch))

    asyncio.run(scenario())


async def compare(memory: MemoryLedger, ledger: RedisLedger) -> None:
    """Everything that can be read, ids aside: each store numbers its own."""
    ours, theirs = await memory.read(), await ledger.read()
    assert [replace(event, id="") for event in ours] == [replace(event, id="") for event in theirs]
    configs, counters = await memory.configs(), await memory.counters()
    assert await ledger.configs() == configs
    assert await ledger.counters() == counters
    assert set(await ledger.client.hkeys(ledger.key("done"))) == set(memory.store.done)
    heads = await ledger.client.hgetall(ledger.key("head"))
    assert {c: int(head) for c, head in heads.items()} == memory.store.head
    assert set(await ledger.client.hkeys(ledger.key("open"))) == set(memory.store.open)

    state = fold(theirs)
    assert {c: (e.frm, e.to, e.attempt) for c, e in state.open.items()} == {
        c: (row.frm, row.to, row.attempt) for c, row in memory.store.open.items()
    }
    assert state.steps == counters.get("steps", 0)
    assert round(state.charged_seconds * 1000) == counters.get("charged_ms", 0)
    records = histories(theirs, configs)
    assert sum(record.steps for record in records.values()) == state.steps
    assert {str(c): r.fidelity for c, r in records.items() if r.epochs} == state.heads
    points = best_so_far(theirs)
    assert not points or points[-1].steps == state.steps
    assert await ledger.client.zcard(ledger.key("top")) == len(state.heads)

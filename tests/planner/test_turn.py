"""Whole runs through the real turn: MemoryLedger, simulated back end, a real optimizer, crashes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from qtt_core import plan as p
from qtt_core.errors import OptimizerError, StaleEpochError
from qtt_core.hub import load_hub, select
from qtt_core.ledger.events import Done, Event, Open
from qtt_core.ledger.fold import fold
from qtt_core.optimizer import Optimizer, build
from qtt_core.spec import Budget, Dataset, Fidelity, RunSpec, Search, Trainer
from qtt_core.spec import Optimizer as OptimizerSpec
from qtt_core.steps import (
    BudgetView,
    OptimizerEvent,
    OptimizerSetup,
    Proposal,
    Recommendation,
)
from qtt_core.testing.ledger import MemoryLedger
from qtt_core.testing.simulation import SimulatedBackend, VirtualClock
from qtt_operator.documents import Places, RunContents, optimizer_setup
from qtt_operator.turn import RunContext, moved, pause_seconds, run_turn

HUB = select(load_hub("timm24"), models=("edgenext_small", "mobilevit_xs", "dla46x_c"))
IDENTITY = p.Identity(
    uid="u1", name="birds", seed=3, space_id="native", space_sha="s", spec_hash="h", version="0"
)


class CrashError(Exception):
    """The process died here."""


@dataclass(slots=True)
class Answer:
    proposals: Sequence[Proposal]
    finished: str | None
    position: str = ""


@dataclass(slots=True)
class InProcessOptimizer:
    """The worker's rules without a worker: fed in order, asked after a retract."""

    optimizer: Optimizer | None = None
    fed: list[OptimizerEvent] = field(default_factory=list)

    async def load(
        self, setup: OptimizerSetup, events: Sequence[tuple[str, OptimizerEvent]]
    ) -> None:
        self.optimizer = build(setup)
        await self.tell(events)

    async def tell(self, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        assert self.optimizer is not None
        for _, event in events:
            self.fed.append(event)
            self.optimizer.feed(event)

    async def ask(self, n: int, budget: BudgetView) -> Answer:
        assert self.optimizer is not None
        self.optimizer.retract()
        return Answer(self.optimizer.ask(n, budget), self.optimizer.finished)

    async def recommend(self) -> Recommendation | None:
        assert self.optimizer is not None
        return self.optimizer.recommend()

    async def explain(self, proposal: Proposal) -> str:
        assert self.optimizer is not None
        return self.optimizer.explain(proposal)


class Crashing:
    """Wraps a port; the n-th call over all wrapped ports dies before or after taking effect."""

    def __init__(self, port: Any, fuse: Fuse) -> None:
        self._port, self._fuse = port, fuse

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self._fuse.before()
            result = await method(*args, **kwargs)
            self._fuse.after()
            return result

        return call


@dataclass(slots=True)
class Fuse:
    """Counts calls down; at zero it raises, before the call (even) or after it (odd)."""

    left: int
    late: bool

    def before(self) -> None:
        self.left -= 1
        if self.left == 0 and not self.late:
            raise CrashError

    def after(self) -> None:
        if self.left == 0 and self.late:
            raise CrashError


def make_spec(**changes: Any) -> RunSpec:
    base: dict[str, Any] = {
        "dataset": Dataset(claim_name="d"),
        "budget": Budget(max_steps=12),
        "search": Search(pool_size=16),
        "fidelity": Fidelity(max=6, steps_per_job=1),
        "optimizer": OptimizerSpec(algorithm="FreezeThawRandom", cost_aware=False),
    }
    return RunSpec(**(base | changes))


def make_context(
    ledger: Any, backend: Any, clock: VirtualClock, spec: RunSpec, optimizer: Any = None
) -> RunContext:
    run = RunContents(spec=spec, identity=IDENTITY, hub=HUB, places=Places(data="/d", root="/r"))
    return RunContext(
        run=run,
        setup=lambda state: optimizer_setup(run, state),
        ledger=ledger,
        backend=backend,
        optimizer=optimizer or InProcessOptimizer(),
        clock=clock,
    )


async def drive(context: RunContext, backend: SimulatedBackend, turns: int = 2000) -> None:
    """Turns until the run is closed; virtual time jumps to the next end or timer."""
    clock = backend.clock
    for _ in range(turns):
        plan = await run_turn(context)
        while context.call is not None and not context.call.done():
            await asyncio.wait({context.call})
        if context.call is not None and context.call.done():
            call, context.call = context.call, None
            call.result()
            continue
        if moved(plan):
            continue
        if context.state.closed is not None:
            return
        until = [clock.now + pause_seconds(plan)]
        end = backend.next_end()
        clock.now = min([*until, *([end] if end is not None else [])])
    raise AssertionError(f"not closed after {turns} turns: {context.state}")


def results(events: Sequence[Event]) -> list[tuple[str, int, float]]:
    """(config, epoch, score) in ledger order."""
    return [(e.c, t, s) for e in events if isinstance(e, Done) for t, s, _ in e.epochs]


async def undisturbed(spec: RunSpec) -> tuple[list[Event], SimulatedBackend]:
    clock = VirtualClock()
    backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
    await drive(make_context(ledger, backend, clock, spec), backend)
    return await ledger.read(), backend


def test_a_run_goes_from_nothing_to_complete() -> None:
    events, backend = asyncio.run(undisturbed(make_spec()))

    state = fold(events)
    assert state.closed is not None
    assert state.closed.reason == "BudgetExhausted"
    assert (state.steps, state.open) == (12, {})
    assert backend.jobs == {}
    assert [e.kind for e in events[:3]] == ["run", "open", "prepared"]


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_never_more_jobs_open_than_the_parallelism(workers: int) -> None:
    events, _ = asyncio.run(undisturbed(make_spec(parallelism=workers)))

    running, most = 0, 0
    for event in events:
        running += isinstance(event, Open) and event.c.isdigit()
        running -= isinstance(event, Done)
        most = max(most, running)
    assert most == workers
    assert fold(events).steps == 12


def test_seconds_are_overshot_by_at_most_one_job_a_worker() -> None:
    spec = make_spec(budget=Budget(max_gpu_seconds=30.0), parallelism=3)
    events, _ = asyncio.run(undisturbed(spec))

    assert 30.0 <= fold(events).charged_seconds <= 30.0 + 3 * 3.0


async def crashed(spec: RunSpec, nth: int, *, late: bool, lose_jobs: bool) -> list[Event] | None:
    """A run whose process dies at its n-th call and is started again; None = it never got there."""
    clock = VirtualClock()
    backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
    fuse = Fuse(left=nth, late=late)
    first = make_context(Crashing(ledger, fuse), Crashing(backend, fuse), clock, spec)
    try:
        await drive(first, backend)
    except CrashError:
        if first.call is not None:
            first.call.cancel()
    else:
        return None
    if lose_jobs:
        backend.forget_everything()
    second = make_context(ledger.writer(2), backend, clock, spec)
    await drive(second, backend)
    return await ledger.read()


async def interrupted(spec: RunSpec, nth: int, *, late: bool) -> list[Event] | None:
    """A run whose n-th call to the store fails, and which goes on in the same process."""
    clock = VirtualClock()
    backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
    fuse = Fuse(left=nth, late=late)
    context = make_context(Crashing(ledger, fuse), backend, clock, spec)
    try:
        await drive(context, backend)
    except CrashError:
        await drive(context, backend)
        return await ledger.read()
    return None


@pytest.mark.parametrize("late", [False, True], ids=["not written", "answer lost"])
def test_a_store_that_fails_at_any_call_changes_no_result(late: bool) -> None:
    """A write whose answer was lost is found by the next read, its configuration included."""
    spec = make_spec(budget=Budget(max_steps=3), search=Search(pool_size=6))
    expected = results(asyncio.run(undisturbed(spec))[0])

    reached = 0
    for nth in range(1, 400):
        events = asyncio.run(interrupted(spec, nth, late=late))
        if events is None:
            break
        reached = nth
        assert results(events) == expected, f"call {nth}"
        assert fold(events).steps == 3
    assert reached > 20


@dataclass(slots=True)
class Ailing(InProcessOptimizer):
    """Fails the first calls of each kind, as a worker that is killed again and again."""

    failures: dict[str, int] = field(default_factory=dict)

    def _fail(self, call: str) -> None:
        if self.failures.get(call, 0) > 0:
            self.failures[call] -= 1
            raise OptimizerError(f"no answer to {call}")

    async def load(
        self, setup: OptimizerSetup, events: Sequence[tuple[str, OptimizerEvent]]
    ) -> None:
        self._fail("load")
        await InProcessOptimizer.load(self, setup, events)

    async def tell(self, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        self._fail("tell")
        await InProcessOptimizer.tell(self, events)

    async def ask(self, n: int, budget: BudgetView) -> Answer:
        self._fail("ask")
        return await InProcessOptimizer.ask(self, n, budget)


def test_an_optimizer_that_fails_rests_and_the_run_goes_on() -> None:
    """It used to be held for ever after a failed ask, and to be loaded again without a pause."""
    spec = make_spec(budget=Budget(max_steps=3), search=Search(pool_size=6))

    async def scenario() -> tuple[list[Event], float]:
        clock = VirtualClock()
        began = clock.now
        backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
        ailing = Ailing(failures={"load": 2, "ask": 2, "tell": 1})
        await drive(make_context(ledger, backend, clock, spec, ailing), backend)
        return await ledger.read(), clock.now - began

    events, seconds = asyncio.run(scenario())
    assert results(events) == results(asyncio.run(undisturbed(spec))[0])
    assert seconds >= 5 * 60


def test_a_proposal_that_is_not_opened_is_no_word_to_the_optimizer() -> None:
    """It forgets by itself before the next ask; a word without a stream id has no place there."""

    async def scenario() -> list[str]:
        clock = VirtualClock()
        backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
        optimizer = InProcessOptimizer()
        context = make_context(ledger, backend, clock, make_spec(), optimizer)
        while not context.view.proposals:
            if not moved(await run_turn(context)) and context.call is None:
                clock.now = backend.next_end() or clock.now
            if context.call is not None:
                await context.call
                context.call = None
        context.run = replace(context.run, spec=replace(context.run.spec, suspend=True))
        plan = await run_turn(context)
        assert any(isinstance(action, p.Abandon) for action in plan.actions)
        assert context.view.proposals == ()
        return [type(event).__name__ for event in optimizer.fed]

    assert "Abandon" not in asyncio.run(scenario())


def test_an_answer_that_a_suspension_threw_away_does_not_end_the_run() -> None:
    """Nothing open and nothing proposed looked like an empty space; resumed, the run ended."""

    async def scenario() -> list[Event]:
        clock = VirtualClock()
        backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
        context = make_context(ledger, backend, clock, make_spec())
        while not context.view.proposals:
            if not moved(await run_turn(context)) and context.call is None:
                clock.now = backend.next_end() or clock.now
            if context.call is not None:
                await context.call
                context.call = None
        going = context.run
        context.run = replace(going, spec=replace(going.spec, suspend=True))
        await run_turn(context)
        context.run = going
        await drive(context, backend)
        return await ledger.read()

    assert fold(asyncio.run(scenario())).steps == 12


def test_the_optimizer_is_told_the_seconds_it_proposed_on_any_number_of_devices() -> None:
    """The ledger reserves device-seconds; the optimizer speaks of seconds of a Job."""
    spec = make_spec(
        budget=Budget(max_steps=4), trainer=Trainer(custom=True, devices=4), gpu_share=0.5
    )

    async def scenario() -> tuple[list[float], list[float]]:
        clock = VirtualClock()
        backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
        optimizer = InProcessOptimizer()
        await drive(make_context(ledger, backend, clock, spec, optimizer), backend)
        told = [e.expected_seconds for e in optimizer.fed if isinstance(e, Proposal)]
        opened = [e for e in await ledger.read() if isinstance(e, Open) and e.c.isdigit()]
        return told, [event.res for event in opened]

    told, reserved = asyncio.run(scenario())
    assert len(told) >= 3
    assert told == pytest.approx([seconds / 2.0 for seconds in reserved[: len(told)]])


@pytest.mark.parametrize("lose_jobs", [False, True], ids=["jobs survive", "jobs die too"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_crash_at_any_call_changes_no_result(late: bool, lose_jobs: bool) -> None:
    spec = make_spec(budget=Budget(max_steps=3), search=Search(pool_size=6))
    expected = results(asyncio.run(undisturbed(spec))[0])

    reached = 0
    for nth in range(1, 400):
        events = asyncio.run(crashed(spec, nth, late=late, lose_jobs=lose_jobs))
        if events is None:
            break
        reached = nth
        assert results(events) == expected, f"crash at call {nth}"
        assert fold(events).steps == 3
    assert reached > 30


def test_no_decision_is_taken_by_a_writer_that_was_replaced() -> None:
    async def scenario() -> list[Event]:
        clock = VirtualClock()
        backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
        old = make_context(ledger, backend, clock, make_spec())
        await run_turn(old)
        await ledger.writer(2).fence()
        before = await ledger.read()
        with pytest.raises(StaleEpochError):
            await run_turn(old)
        assert await ledger.read() == before
        return before

    assert asyncio.run(scenario())


def test_a_suspended_run_opens_nothing_and_goes_on_when_resumed() -> None:
    async def scenario() -> tuple[int, int]:
        clock = VirtualClock()
        backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
        context = make_context(ledger, backend, clock, make_spec())
        while not backend.started or not any(n.startswith("birds-c") for n in backend.started):
            plan = await run_turn(context)
            if context.call is not None:
                await context.call
            if not moved(plan) and backend.next_end() is not None:
                clock.now = backend.next_end() or clock.now
        context.run = replace(context.run, spec=replace(context.run.spec, suspend=True))
        for _ in range(20):
            clock.now = backend.next_end() or clock.now
            await run_turn(context)
        paused = len(backend.started)
        context.run = replace(context.run, spec=replace(context.run.spec, suspend=False))
        await drive(context, backend)
        return paused, len(backend.started)

    paused, finished = asyncio.run(scenario())
    assert (paused, finished) == (2, 13)

"""One run through a world of faults, drawn from a seed: `play(seed)` says what broke, if anything.

For a while calls fail, processes die, leaders overtake each other, jobs are lost, people edit; then
the world is calm and the run has to end by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qtt_core import plan as p
from qtt_core.errors import LedgerError, StaleEpochError, StoreUnavailableError
from qtt_core.hub import load_hub, select
from qtt_core.ledger.events import Cancel, Done, Event, Fail, Retry
from qtt_core.ledger.fold import fold
from qtt_core.planner import decide
from qtt_core.spec import Budget, Dataset, FailurePolicy, Fidelity, RunSpec
from qtt_core.testing.ledger import MemoryLedger
from qtt_operator.documents import Places, RunContents
from qtt_operator.turn import RunContext, act, gather, moved, pause_seconds, run_turn, tell_the_rest
from tests.planner.fuzz_world import (
    CONFIGS,
    EPOCH,
    OVERHEAD,
    CrashError,
    Frail,
    Watched,
    Wisdom,
    World,
)

HUB = select(load_hub("tiny"), models=("mini_resnet",))
IDENTITY = p.Identity(
    uid="u1", name="fuzz", seed=3, space_id="native", space_sha="s", spec_hash="h", version="0"
)
FAULTY_TURNS, CALM_TURNS = 50, 400
WRITES = (p.Commit, p.OpenStep, p.RecordNote)
REPEATS = 4
"""Equal plans that move nothing, one after the other, before a run counts as stuck."""


def draw_spec(rng: random.Random) -> RunSpec:
    """A small run."""
    full = rng.randint(2, 5)
    seconds = rng.choice([None, None, 20.0, 60.0])
    steps = rng.randint(2, 9) if seconds is None or rng.random() < 0.5 else None
    return RunSpec(
        dataset=Dataset(claim_name="d"),
        budget=Budget(max_steps=steps, max_gpu_seconds=seconds),
        fidelity=Fidelity(max=full, step=rng.randint(1, 2)),
        parallelism=rng.randint(1, 4),
        failure_policy=FailurePolicy(
            max_infra_retries_per_step=rng.choice([0, 2, 6]),
            max_app_failures_per_config=rng.randint(0, 1),
            pending_timeout=1000.0,
            max_failed_configs=rng.choice([3, 10]),
        ),
    )


@dataclass(slots=True, kw_only=True)
class Story:
    """One seed's run; `facts` counts what was done to it."""

    seed: int
    rng: random.Random
    world: World
    spec: RunSpec
    facts: Counter[str] = field(default_factory=Counter)
    epoch: int = 0
    context: RunContext = field(init=False)
    wisdom: Wisdom = field(init=False)
    zombie: tuple[RunContext, p.Plan | None] | None = None
    token: int = 0
    widest: tuple[int, float, int] = (0, 0.0, 0)
    """The largest maxSteps, seconds and parallelism there ever were."""
    kept: tuple[Any, int] | None = None
    """The store as it was, and how often an end had been forgotten by then."""
    repeated: tuple[p.Plan | None, int] = (None, 0)

    async def begin(self) -> None:
        """A new process: it takes the run over and reads everything anew."""
        self.epoch += 1
        self.repeated = (None, 0)  # every process loads the optimizer, however soon it dies
        self.world.seen = None  # it lists all jobs before its first turn
        ledger = Watched(self.world, lambda: self.spec, epoch=self.epoch)
        await ledger.fence()
        epochs = self.spec.fidelity
        self.wisdom = Wisdom(rng=self.rng, world=self.world, step=epochs.step, full=epochs.max)
        identity = replace(IDENTITY, raw_spec={"fidelity": {"step": epochs.step}})
        run = RunContents(
            spec=self.spec, identity=identity, hub=HUB, places=Places(data="/d", root="/r")
        )
        self.context = RunContext(
            run=run, setup=lambda _state: None,  # type: ignore[arg-type,return-value]
            ledger=Frail(ledger, self.world), backend=Frail(self.world, self.world),
            optimizer=self.wisdom, clock=self.world.clock,
        )  # fmt: skip
        self.context.retry_token = str(self.token or "")
        self.widen()

    def widen(self) -> None:
        """The spec is now this: it acts from the next turn on."""
        budget = self.spec.budget
        steps, seconds, workers = self.widest
        self.widest = (
            max(steps, budget.max_steps or 10**6), max(seconds, budget.max_gpu_seconds or 10.0**9),
            max(workers, self.spec.parallelism),
        )  # fmt: skip
        self.context.run = replace(self.context.run, spec=self.spec)

    # --- one turn -----------------------------------------------------------------------------

    async def turn(self) -> p.Plan | None:
        """One turn, whatever hits it; time moves on when nothing else does."""
        world = self.world
        try:
            plan = await run_turn(self.context)
            await self._let_work()
        except StoreUnavailableError:
            self.facts["store away"] += 1
            return None
        except LedgerError:
            if not world.has_forgotten:
                raise
            await self._die("read anew")
            return None
        except CrashError:
            await self._die("crash")
            return None
        if not moved(plan):
            until = world.clock.now + pause_seconds(plan)
            ahead = world.next_event()
            busy = self.context.call is not None
            if not busy:
                world.clock.now = until if ahead is None else min(until, ahead)
        elif not world.calm:
            world.clock.now += self.rng.choice([0.0, 0.01, 1.0])
        self._count_repeats(plan)
        return plan

    async def _let_work(self) -> None:
        """Give the optimizer's call its turn; keep it only while it runs."""
        await asyncio.sleep(0)
        call = self.context.call
        if call is not None and call.done():
            self.context.call = None
            call.result()

    async def _die(self, word: str) -> None:
        self.facts[word] += 1
        await _end_call(self.context)
        await self.begin()

    def _count_repeats(self, plan: p.Plan) -> None:
        known, count = self.repeated
        same = moved(plan) and plan == known
        self.repeated = (plan, count + 1 if same else 0)
        if self.repeated[1] >= REPEATS:
            self.world.broken.append(f"again and again: {plan.actions}")

    # --- faults -------------------------------------------------------------------------------

    async def trouble(self) -> None:
        """Perhaps something happens before the next turn."""
        name = self.rng.choice(TROUBLES)
        if name is not None:
            self.facts[name.__name__] += 1
            await name(self)

    async def store_fails(self) -> None:
        """One of the next calls gets no answer; it may have been heard."""
        self.world.fuse, self.world.fault = self.rng.randint(1, 8), StoreUnavailableError

    async def process_dies(self) -> None:
        """At one of the next calls, before or after it took effect."""
        self.world.fuse, self.world.fault = self.rng.randint(1, 12), CrashError

    async def machine_dies(self) -> None:
        """The process and everything it ran."""
        self.world.lose_jobs("", 1.0)
        await self._die("restart")

    async def node_lost(self) -> None:
        """Running jobs end without a word."""
        self.world.lose_jobs(p.Cause.NODE_LOST, 0.6)

    async def jobs_deleted(self) -> None:
        """By hand."""
        self.world.lose_jobs(p.Cause.VANISHED, 0.4)

    async def leader_overtaken(self) -> None:
        """A second process takes over; the first was asleep in the middle of a turn."""
        old, plan = self.context, None
        if self.rng.random() < 0.7:
            self.world.fuse = 0
            with contextlib.suppress(*[LedgerError] * self.world.has_forgotten):
                plan = decide(await gather(old))
        self.zombie = (old, plan)
        await self.begin()

    async def zombie_wakes(self) -> None:
        """The first process goes on with what it had decided: nothing of it may be recorded."""
        if self.zombie is None:
            return
        (old, plan), self.zombie = self.zombie, None
        before, self.world.fuse, stopped = len(self.world.store.log), 0, False
        try:
            if plan is not None:
                await act(old, plan)
            await run_turn(old)
        except StaleEpochError:
            self.facts["stale writer stopped"] += 1
            stopped = True
        except LedgerError:
            stopped = self.world.has_forgotten
        if plan is not None and any(isinstance(a, WRITES) for a in plan.actions) and not stopped:
            self.world.broken.append("a leader that was replaced was refused and went on")
        if len(self.world.store.log) != before:
            self.world.broken.append("a leader that was replaced wrote to the ledger")
        await _end_call(old)

    async def tail_lost(self) -> None:
        """The store restarts without its newest events, as far as jobs still witness them."""
        if self.kept is None or self.kept[1] != self.world.forgotten:
            self.kept = (copy.deepcopy(self.world.store), self.world.forgotten)
            return
        (kept, _), self.kept = self.kept, None
        store = self.world.store
        self.facts["events lost"] += len(store.log) - len(kept.log)
        kept.epoch, self.world.has_forgotten = store.epoch, True
        for item in fields(kept):
            setattr(store, item.name, getattr(kept, item.name))
        if self.rng.random() < 0.5:
            await self._die("restart")

    async def edited(self) -> None:
        """A person changes their mind."""
        rng, spec = self.rng, self.spec
        budget = Budget(
            max_steps=spec.budget.max_steps and rng.randint(1, 14),
            max_gpu_seconds=spec.budget.max_gpu_seconds and rng.choice([5.0, 40.0, 90.0]),
        )
        self.spec = rng.choice([
            replace(spec, suspend=not spec.suspend, suspend_policy=rng.choice(["Drain", "Evict"])),
            replace(spec, budget=budget),
            replace(spec, parallelism=rng.randint(0, 5)),
        ])  # fmt: skip
        self.widen()

    async def stopped(self) -> None:
        """A person has enough; rarely."""
        if self.rng.random() < 0.1:
            self.spec = replace(self.spec, stop=True)
            self.widen()

    async def retried(self) -> None:
        """A person asks to go on after failures."""
        self.token += 1
        self.context.retry_token = str(self.token)

    # --- the end ------------------------------------------------------------------------------

    async def finish(self) -> None:
        """No more faults, and a person who wants a result: the run has to end."""
        world = self.world
        world.calm, world.fuse, world.fault = True, 0, CrashError
        self.spec = replace(self.spec, suspend=False, parallelism=max(1, self.spec.parallelism))
        self.widen()
        for _ in range(CALM_TURNS):
            plan = await self.turn()
            if plan is None or moved(plan) or self.context.call is not None:
                continue
            if plan.held is not None and self.context.state.closed is None:
                await self.retried()
            if self.context.state.closed is not None and not self._is_at_work():
                break
        else:
            state = self.context.state
            held = plan.held if plan is not None else None
            world.broken.append(f"not closed: {held}, {dict(state.open)}, {state.steps} steps")
        await self._catch_up()

    def _is_at_work(self) -> bool:
        """Whether a job is left that nobody has recorded, or a decision that awaits its end."""
        seen = self.context.observed.jobs
        return any(job.phase is not p.JobPhase.ENDED for job in seen) or bool(
            self.context.state.open
        )

    async def _catch_up(self) -> None:
        """Tell the optimizer the rest, a new one everything."""
        if not self.context.view.loaded:
            return
        while self.context.view.busy:
            await asyncio.sleep(0)
        await tell_the_rest(self.context)


TROUBLES: list[Any] = [None] * 24 + [
    Story.store_fails, Story.store_fails, Story.process_dies, Story.process_dies,
    Story.machine_dies, Story.node_lost, Story.jobs_deleted, Story.leader_overtaken,
    Story.zombie_wakes, Story.zombie_wakes, Story.tail_lost, Story.tail_lost, Story.tail_lost,
    Story.tail_lost, Story.edited, Story.edited, Story.stopped, Story.retried,
]  # fmt: skip


async def play(seed: int) -> Story:
    """The story of a seed; `world.broken` says what must not be."""
    rng = random.Random(seed)
    world = World(rng=rng)
    story = Story(seed=seed, rng=rng, world=world, spec=draw_spec(rng))
    try:
        await story.begin()
        for _ in range(rng.randint(10, FAULTY_TURNS)):
            await story.trouble()
            await story.turn()
        await story.finish()
        events = await MemoryLedger(store=world.store).read()
        world.broken += wrong(story, events)
    except LedgerError as error:
        world.broken.append(f"the ledger contradicts itself: {error}")
    return story


async def _end_call(context: RunContext) -> None:
    """Cancel the optimizer's call under way; it has begun."""
    if context.call is not None:
        await asyncio.sleep(0)
        context.call.cancel()
        await asyncio.gather(context.call, return_exceptions=True)


# --- what must be true ------------------------------------------------------------------------


def wrong(story: Story, events: list[Event]) -> list[str]:
    """What a finished ledger says that no faults excuse."""
    return [*_told_twice(events), *_charged(story, events), *_overshot(story, events),
            *_unlike(story, events)]  # fmt: skip


def _told_twice(events: list[Event]) -> list[str]:
    heads: Counter[str] = Counter()
    found = []
    for event in events:
        for epoch, _, _ in event.epochs if isinstance(event, Done) else ():
            if epoch != heads[event.c] + 1:
                found.append(f"{event.c}: epoch {epoch} after {heads[event.c]}")
            heads[event.c] = epoch
    return found


def _charged(story: Story, events: list[Event]) -> list[str]:
    """Every attempt ends once and is charged what one of its incarnations held."""
    found, seen = [], set()
    for event in events:
        if not isinstance(event, Done | Fail | Retry | Cancel):
            continue
        attempt = event.a - isinstance(event, Retry)
        if (event.c, event.to, attempt) in seen:
            found.append(f"{event.c} -> {event.to}, attempt {attempt} ended twice")
        seen.add((event.c, event.to, attempt))
        job = story.context.job_name(event.c, event.to, attempt)
        if event.dev and round(event.dev, 3) not in story.world.ends.get(job, set()):
            found.append(f"{job} was charged {event.dev}, it held {story.world.ends.get(job)}")
    total = sum(getattr(event, "dev", 0.0) for event in events)
    if abs(total - fold(events).charged_seconds) > 1e-6:
        found.append(f"{fold(events).charged_seconds} s charged, the events say {total}")
    return found


def _overshot(story: Story, events: list[Event]) -> list[str]:
    state, (steps, seconds, workers) = fold(events), story.widest
    found = []
    if state.steps > steps:
        found.append(f"{state.steps} steps, never more than {steps} were allowed")
    longest = OVERHEAD + EPOCH * story.spec.fidelity.max + 1.0
    if state.charged_seconds > seconds + workers * longest:
        found.append(f"{state.charged_seconds} s charged, {seconds} allowed, {workers} workers")
    if state.open:
        found.append(f"open at the end: {sorted(state.open)}")
    full, heads = story.spec.fidelity.max, state.heads
    free = [c for c in map(str, range(CONFIGS)) if c not in state.failed and heads.get(c, 0) < full]
    if state.closed is not None and state.closed.reason == "SpaceExhausted" and free:
        found.append(f"closed as exhausted, and {free} were free")
    return found


def _unlike(story: Story, events: list[Event]) -> list[str]:
    """The optimizer was told what the ledger holds: no more, no less, in its order."""
    if not story.context.view.loaded:
        return []
    told = [(o.config_id, o.fidelity, len(o.scores)) for o in story.wisdom.told]
    heads: Counter[str] = Counter()
    held = []
    for event in events:
        if isinstance(event, Done):
            last = event.last_epoch or 0
            fidelity = last if event.state == "ok" else max(last, heads[event.c]) + 1
            held.append((int(event.c), fidelity, max(0, last - heads[event.c])))
            heads[event.c] = max(heads[event.c], last)
        elif isinstance(event, Fail):
            held.append((int(event.c), event.to, 0))
    return [f"told {told}, recorded {held}"] if told != held else []

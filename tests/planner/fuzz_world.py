"""A world that does to a run what clusters and stores do: jobs, an optimizer, ports that fail.

`fuzz_story` plays a run against it. Planner, turn, observer and reference ledger are the real ones.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qtt_core import plan as p
from qtt_core.errors import OptimizerError
from qtt_core.jobs import JobDocument
from qtt_core.ledger.events import Open
from qtt_core.ledger.reply import Reply
from qtt_core.limits import steps_of
from qtt_core.results import EXIT_CODES, Epoch, State, StepResult
from qtt_core.spec import RunSpec
from qtt_core.steps import (
    Abandon,
    BudgetView,
    Observation,
    OptimizerEvent,
    Outcome,
    Proposal,
    Recommendation,
    Why,
)
from qtt_core.testing.ledger import MemoryLedger, MemoryStore
from qtt_core.testing.simulation import VirtualClock, toy_score

CONFIGS = 5
OVERHEAD, EPOCH = 1.0, 2.0
"""Seconds of a job besides its epochs, and of an epoch."""

ENDS = ["ok"] * 12 + [
    "diverged", "oom", "infeasible", "internal", "silent", "stale", "preempted", "timeout",
    "moved", "disk_full", "infra_gpu", "weights_corrupt", "checkpoint_corrupt", "invalid_config",
    "dataset_changed", "OOMKilled", "NodeLost", "Evicted", "Vanished", "killed after its result",
]  # fmt: skip
"""How a job may end; most end well."""


class CrashError(Exception):
    """The process died here."""


# --- jobs ---------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Life:
    """One job: when it starts and ends by itself, and how."""

    job: p.ObservedJob
    document: JobDocument
    starts_at: float
    ends_at: float
    end: p.JobEnd
    was_late: bool = False
    put_aside: bool = False


@dataclass(slots=True, kw_only=True)
class World:
    """Jobs, store and faults of one seed; a `turn.Backend`."""

    rng: random.Random
    clock: VirtualClock = field(default_factory=VirtualClock)
    store: MemoryStore = field(default_factory=MemoryStore)
    calm: bool = False
    lives: dict[str, Life] = field(default_factory=dict)
    late: dict[str, Life] = field(default_factory=dict)
    volume: set[tuple[int, int]] = field(default_factory=set)
    openings: dict[tuple[str, int], p.OpenStep] = field(default_factory=dict)
    ends: dict[str, set[float]] = field(default_factory=dict)
    """Job -> device-seconds it may be charged, one value an incarnation."""
    seen: p.Observed | None = None
    broken: list[str] = field(default_factory=list)
    fuse: int = 0
    fault: type[Exception] = CrashError
    forgotten: int = 0
    has_forgotten: bool = False
    """Whether the store once came back without its newest events."""

    async def observe(self) -> p.Observed:
        """Every job that is known; sometimes what was known a moment ago, as informers do."""
        if self.seen is not None and not self.calm and self.rng.random() < 0.1:
            return self.seen
        now = self.clock.now
        self.lives |= {n: x for n, x in self.late.items() if x.ends_at <= now}
        self.late = {n: x for n, x in self.late.items() if x.ends_at > now}
        jobs = tuple(self._look(life) for _, life in sorted(self.lives.items()))
        self.seen = p.Observed(jobs=jobs, synced_at=now)
        return self.seen

    async def create(self, job: p.CreateJob, name: str, document: JobDocument) -> None:
        """Start an attempt; a job of that name is adopted."""
        if name in self.lives:
            return
        now, draw = self.clock.now, self.rng
        waits = 0.0 if self.calm or draw.random() < 0.6 else draw.choice([1.0, 5.0, 1e9])
        end, held = self._end("ok" if self.calm else draw.choice(ENDS), document)
        seen = p.ObservedJob(
            name=name, kind=job.kind, c=job.c, to=job.to, attempt=job.attempt,
            phase=p.JobPhase.PENDING, created_at=now, pending_since=now,
            opening=self.openings.get((job.c, job.to)),
        )  # fmt: skip
        self.lives[name] = Life(
            job=seen, document=document, starts_at=now + waits, ends_at=now + waits + held, end=end
        )
        self.ends.setdefault(name, set()).add(round(held, 3))
        self.seen = None  # a creation is seen by the one who created

    async def kill(self, job: str, reason: str) -> None:
        """End a job now, unless its end was faster."""
        life = self.lives.get(job)
        if life is None or (life.ends_at <= self.clock.now and not life.put_aside):
            return
        if life.put_aside:
            life.put_aside, life.starts_at = False, self.clock.now
        held = max(0.0, self.clock.now - life.starts_at)
        life.end = p.JobEnd(exit_code=None, signal=9, reason=reason, device_seconds=held)
        life.ends_at = self.clock.now
        self.ends[job].add(round(held, 3))

    async def suspend(self, job: str) -> None:
        """Put a job aside, unless it has ended: what it did since its start is lost."""
        life = self.lives.get(job)
        if life is not None and not life.put_aside and life.ends_at > self.clock.now:
            life.put_aside, life.starts_at, life.ends_at = True, 0.0, life.ends_at - life.starts_at

    async def resume(self, job: str) -> None:
        """Start it anew."""
        life, now = self.lives.get(job), self.clock.now
        if life is not None and life.put_aside:
            life.put_aside, life.starts_at, life.ends_at = False, now, now + life.ends_at

    async def forget(self, job: str) -> None:
        """Its end is recorded; one that was given up may come back later, with a result."""
        life, self.seen = self.lives.pop(job, None), None
        self.forgotten += life is not None
        if life is not None and not (life.was_late or self.calm) and self.rng.random() < 0.3:
            document = life.document
            span = range(document.fidelity_from + 1, document.fidelity_to + 1)
            life.end = p.JobEnd(exit_code=0, message=_fine(document, span).encode())
            life.ends_at = self.clock.now + self.rng.choice([0.0, 5.0, 60.0])
            life.was_late, self.late[job] = True, life

    def next_event(self) -> float | None:
        """When a job next starts or ends."""
        lives = [x for x in self.lives.values() if not x.put_aside]
        times = [t for x in lives for t in (x.starts_at, x.ends_at)]
        return min((t for t in times if t > self.clock.now), default=None)

    def lose_jobs(self, reason: str, share: float) -> None:
        """Jobs that have not ended end together: a node, or the processes of a local run."""
        for name, life in list(self.lives.items()):
            lives = life.ends_at > self.clock.now and not life.put_aside
            if lives and self.rng.random() < share:
                if reason:
                    held = max(0.0, self.clock.now - life.starts_at)
                    life.end = p.JobEnd(exit_code=None, reason=reason, device_seconds=held)
                    life.ends_at = self.clock.now
                    self.ends[name].add(round(held, 3))
                else:
                    del self.lives[name]

    def _look(self, life: Life) -> p.ObservedJob:
        now = self.clock.now
        if life.put_aside:
            return replace(life.job, phase=p.JobPhase.QUEUED, put_aside=True)
        if now >= life.ends_at:
            return replace(life.job, phase=p.JobPhase.ENDED, end=life.end)
        if now >= life.starts_at:
            return replace(life.job, phase=p.JobPhase.RUNNING, started_at=life.starts_at)
        return life.job

    def _end(self, word: str, document: JobDocument) -> tuple[p.JobEnd, float]:
        """How a job ends by itself, and the seconds it runs."""
        span = range(document.fidelity_from + 1, document.fidelity_to + 1)
        fresh = [e for e in span if (document.config_id, e) not in self.volume]
        held = round(OVERHEAD + EPOCH * len(fresh) + self.rng.random(), 3)
        if word in set(p.Cause):
            return p.JobEnd(exit_code=None, signal=9, reason=word, device_seconds=held), held
        if word in FINE:
            self.volume |= {(document.config_id, e) for e in span}
            result = _fine(document, span)
            result = replace(result, nonce="0" * 16) if word == "stale" else result
            message = "" if word == "silent" else result.encode()
            if word == "killed after its result":
                evicted = p.Cause.EVICTED
                end = p.JobEnd(exit_code=None, signal=9, reason=evicted, message=message)
            else:
                end = p.JobEnd(exit_code=0, message=message)
            return replace(end, device_seconds=held), held
        state = State("timeout" if word == "moved" else word)
        kept = span[: self.rng.randrange(max(1, len(span)))] if word == "diverged" else span[:0]
        result = StepResult(
            attempt=document.attempt, nonce=document.nonce, state=state,
            epochs=_epochs(document, kept), timing={"progress": 3.0 if word == "moved" else 0.0},
        )  # fmt: skip
        code = EXIT_CODES[state]
        return p.JobEnd(exit_code=code, message=result.encode(), device_seconds=held), held


FINE = frozenset({"ok", "silent", "stale", "killed after its result"})
"""Ends of a trainer that finished; its words may still be lost or another attempt's."""

FACTS = {"fingerprint": "f", "n_train": 100, "n_val": 50, "classes": 5, "metafeatures": {}}


def _fine(document: JobDocument, span: Sequence[int]) -> StepResult:
    result = StepResult(attempt=document.attempt, nonce=document.nonce, state=State.OK)
    if document.config_id < 0:
        return replace(result, prepared=FACTS)
    return replace(result, epochs=_epochs(document, span), checkpoint_sha256="0" * 64)


def _epochs(document: JobDocument, span: Sequence[int]) -> tuple[Epoch, ...]:
    return tuple(Epoch(epoch=e, value=toy_score(document, e), seconds=EPOCH) for e in span)


# --- the optimizer ------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Wisdom:
    """An `OptimizerPort` that promotes whatever is free, and notes all it is told."""

    rng: random.Random
    world: World
    step: int
    full: int
    heads: dict[int, int] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)
    told: list[Observation] = field(default_factory=list)

    async def load(self, _setup: Any, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        await self._work()
        self.heads, self.pending, self.closed, self.told = {}, set(), set(), []
        self._feed(events)

    async def tell(self, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        self._feed(events)

    async def ask(self, n: int, _budget: BudgetView) -> Answer:
        await self._work()
        free = [c for c in range(CONFIGS) if c not in self.pending | self.closed]
        free = [c for c in free if self.heads.get(c, 0) < self.full]
        picked = self.rng.sample(free, min(n, len(free)))
        ended = None if free or self.pending else "exhausted"
        return Answer(proposals=[self._proposal(c) for c in picked], finished=ended)

    async def recommend(self) -> Recommendation | None:
        return None

    async def explain(self, proposal: Proposal) -> str:
        return proposal.why.rule

    async def _work(self) -> None:
        if self.world.calm:
            return
        if self.rng.random() < 0.03:
            raise OptimizerError("the worker was killed three times")
        for _ in range(self.rng.choice([0, 0, 2, 6])):  # an answer may take several turns
            await asyncio.sleep(0)

    def _proposal(self, c: int) -> Proposal:
        head = self.heads.get(c, 0)
        to = min(self.full, head + self.step * self.rng.randint(1, 3))
        return Proposal(
            config_id=c, config={"model": "mini_resnet", "lr": 0.001 * (c + 1)},
            fidelity_from=head, fidelity_to=to, why=Why(rule="fuzz"),
            expected_seconds=OVERHEAD + EPOCH * (to - head),
        )  # fmt: skip

    def _feed(self, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        for _, event in events:
            if isinstance(event, Proposal):
                self.pending.add(event.config_id)
            elif isinstance(event, Abandon):
                self.pending.discard(event.config_id)
                self.closed |= {event.config_id} if event.retire else set()
            elif isinstance(event, Observation):
                self.pending.discard(event.config_id)
                self.told.append(event)
                self.heads[event.config_id] = event.fidelity
                if event.outcome is not Outcome.OK:
                    self.closed.add(event.config_id)


@dataclass(slots=True, kw_only=True)
class Answer:
    """As `turn.AskAnswer`."""

    proposals: Sequence[Proposal]
    finished: str | None
    position: str = ""


# --- a port that fails --------------------------------------------------------------------------


class Frail:
    """A ledger or back end whose calls fail, before or after they took effect."""

    def __init__(self, port: Any, world: World) -> None:
        self._port, self._world = port, world

    def __getattr__(self, name: str) -> Any:
        method, world = getattr(self._port, name), self._world

        async def call(*args: Any, **kwargs: Any) -> Any:
            world.fuse -= 1
            if world.fuse == 0 and world.rng.random() < 0.5:
                raise world.fault("injected")
            result = await method(*args, **kwargs)
            if world.fuse == 0:
                raise world.fault("injected")
            return result

        return call


class Watched(MemoryLedger):
    """The reference ledger; keeps decisions for their jobs, and looks at each admission."""

    def __init__(self, world: World, spec: Callable[[], RunSpec], *, epoch: int) -> None:
        super().__init__(epoch=epoch, store=world.store, clock=world.clock)
        self._world, self._spec = world, spec

    async def open(self, event: Open, *, config: Any, job: str) -> tuple[Reply, str]:
        """Record a decision."""
        world, again = self._world, (event.c, event.to) in self._world.openings
        reply = await super().open(event, config=config, job=job)
        if reply[0] is Reply.OK and event.c.isdigit():
            opening = p.OpenStep(event=replace(event, id="", ep=0), config=config)
            world.openings[event.c, event.to] = opening
            if not (again and world.has_forgotten):
                world.broken += self._overshoot(event)
        return reply

    def _overshoot(self, event: Open) -> list[str]:
        """What a decision just recorded exceeds."""
        spec, rows = self._spec(), [r for c, r in self.store.open.items() if c.isdigit()]
        promised = sum(steps_of(row.frm, row.to, self.store.step) for row in rows)
        steps = self.store.counters.get("steps", 0) + promised
        found = []
        if steps > (spec.budget.max_steps or math.inf):
            found.append(f"{event.c} -> {event.to}: {steps} steps of {spec.budget.max_steps}")
        if len(rows) > spec.parallelism:
            found.append(f"{len(rows)} open, {spec.parallelism} allowed")
        return found

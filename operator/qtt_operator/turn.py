"""One turn of a run: gather -> decide -> act, the same for a cluster and for one machine.

`turn` reads the ledger's tail, the back end's jobs and the optimizer's answers, lets the pure
`qtt_core.planner.decide` choose, and carries its actions out in order against three small
Protocols. It imports neither kopf, kubernetes nor redis.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from qtt_core import plan as p
from qtt_core.errors import (
    LedgerError,
    ObservationError,
    OptimizerError,
    SpecError,
    StaleEpochError,
    UnknownConfigurationError,
)
from qtt_core.history import optimizer_events
from qtt_core.jobs import JobDocument
from qtt_core.ledger.events import Cancel, Done, Event, Fail, Open, Retry
from qtt_core.ledger.fold import LedgerState, fold
from qtt_core.ledger.reply import Reply as Reply  # re-exported
from qtt_core.planner import decide
from qtt_core.steps import (
    BudgetView,
    Config,
    OptimizerEvent,
    OptimizerSetup,
    Proposal,
    Recommendation,
)
from qtt_core.wishes import wants_candidates
from qtt_operator.documents import RunContents, job_document
from qtt_operator.failpoints import reached
from qtt_operator.names import job_name
from qtt_operator.observe import classify

log = logging.getLogger(__name__)

REST_SECONDS = 60.0
"""How long a failed optimizer is left alone; its own three tries lie behind it."""


class Ledger(Protocol):
    """The run's stream. Every write is atomic, fenced by the writer's epoch and durable on return.

    Raises: StoreUnavailableError when the store cannot be reached.
    """

    async def read(self, after: str = "0-0") -> list[Event]:
        """Events behind a stream id, in order. Raises: LedgerError if that event is gone."""

    async def configs(self) -> dict[str, Config]:
        """Config id -> canonical configuration of every opened configuration."""

    async def open(self, event: Open, *, config: Config | None, job: str) -> tuple[Reply, str]:
        """Record a decision; (reply, stream id or "")."""

    async def commit(
        self, event: Done | Fail | Retry | Cancel, *, job: str = ""
    ) -> tuple[Reply, str]:
        """Record an end exactly once; `event.a` of a Retry is the new attempt, `job` its Job."""

    async def note(self, event: Event, *, key: str) -> tuple[Reply, str]:
        """Record run, prepared, weights, note, close or reopen once per deduplication key."""


class Backend(Protocol):
    """Where steps run: Jobs on a cluster, child processes on one machine."""

    async def observe(self) -> p.Observed:
        """Every job this back end knows of for the run, ended ones included until `forget`."""

    async def create(self, job: p.CreateJob, name: str, document: JobDocument) -> None:
        """Start an attempt as the planner ordered it; a job of that name is adopted."""

    async def kill(self, job: str, reason: str) -> None:
        """End a job now; it is observed as ended with this reason."""

    async def suspend(self, job: str) -> None:
        """Take the job's device away; it is observed as put aside, or ends as `Stopped`."""

    async def resume(self, job: str) -> None:
        """Let a job run that was put aside."""

    async def forget(self, job: str) -> None:
        """The job's end is durably recorded: its second witness may go."""


class AskAnswer(Protocol):
    """What an ask returned."""

    @property
    def proposals(self) -> Sequence[Proposal]:
        """At most as many as were asked for."""

    @property
    def finished(self) -> str | None:
        """Why nothing is left to propose, None while something may be."""

    @property
    def position(self) -> str:
        """Stream id of the last event the answer rests on."""


class OptimizerPort(Protocol):
    """A supervised optimizer in another process. Raises: OptimizerError after its retries.

    `ask` first forgets earlier proposals that were never told as opened.
    """

    async def load(
        self, setup: OptimizerSetup, events: Sequence[tuple[str, OptimizerEvent]]
    ) -> None:
        """Build the optimizer and replay (stream id, event) pairs."""

    async def tell(self, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        """Feed further events, in ledger order."""

    async def ask(self, n: int, budget: BudgetView) -> AskAnswer:
        """At most n proposals of distinct configurations; none = nothing useful now."""

    async def recommend(self) -> Recommendation | None:
        """The incumbent, None before the first score."""

    async def explain(self, proposal: Proposal) -> str:
        """One sentence: why this proposal."""


# --- the state a turn carries to the next: a cache, never the truth ------------------------------


async def _logged(event: p.EmitEvent) -> None:
    log.debug("%s: %s", event.reason, event.message)  # on one machine the log tells it anyway


@dataclass(slots=True, kw_only=True)
class RunContext:
    """One run in this process. Everything here but the ports can be rebuilt from the ledger."""

    run: RunContents
    setup: Callable[[LedgerState], OptimizerSetup]
    """Builds the optimizer's setup once `prepared` is known (metafeatures are its input)."""
    ledger: Ledger
    backend: Backend
    optimizer: OptimizerPort
    garbage: Callable[[RunContext, str], tuple[str, ...]] = lambda _context, _config: ()
    """Checkpoint folders the next job of a configuration may delete."""
    clock: Callable[[], float] = time.time
    retry_token: str = ""
    finetune: str = ""
    evaluate: str = ""
    """The values of the annotations `quicktune.dev/retry`, `…/finetune` and `…/evaluate`."""
    candidates: Callable[[RunContext], tuple[p.Candidate, ...]] = lambda _context: ()
    """Configurations with a score, best first, for a wish to choose from."""
    counted_steps: int = 0
    """Steps that the status had counted when this process began."""
    say: Callable[[p.EmitEvent], Awaitable[None]] = _logged
    """Tells people; on a cluster an Event."""
    decisions: set[str] = field(default_factory=set)
    """Hashes of every decision in the ledger."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    state: LedgerState = field(default_factory=LedgerState)
    events: list[Event] = field(default_factory=list)
    configs: dict[str, Config] = field(default_factory=dict)
    observed: p.Observed = field(default_factory=p.Observed)
    view: p.OptimizerView = field(default_factory=p.OptimizerView)
    told_heads: Mapping[str, int] = field(default_factory=dict)
    told_count: int = 0
    answered_at: str = ""
    recommendation: Recommendation | None = None
    last_ask_seconds: float = 0.0
    call: asyncio.Task[None] | None = None

    def job_name(self, c: str, to: int, attempt: int) -> str:
        """The deterministic name of an attempt's job."""
        return job_name(self.run.identity.name, c, to, attempt)


async def run_turn(context: RunContext) -> p.Plan:
    """One gather -> decide -> act.

    Raises: StoreUnavailableError, StaleEpochError, LedgerError, VolumeError; nothing recorded is
    lost, the same call later goes on.
    """
    plan = decide(await gather(context))
    await act(context, plan)
    return plan


def moved(plan: p.Plan) -> bool:
    """Whether the plan changed something, so that another turn is worth taking at once."""
    waits = p.Ask | p.Kill | p.SuspendJob | p.ResumeJob | p.Requeue
    return any(not isinstance(action, waits) for action in plan.actions)


def pause_seconds(plan: p.Plan) -> float:
    """How long to wait for a wake-up after a plan that changed nothing."""
    return min((a.after for a in plan.actions if isinstance(a, p.Requeue)), default=5.0)


async def gather(context: RunContext) -> p.PlannerInput:
    """Read the ledger's tail, the jobs and the optimizer's answers."""
    tail = await context.ledger.read(context.state.last_id)
    opened = {event.c for event in tail if isinstance(event, Open) and event.c.isdigit()}
    if not opened <= context.configs.keys():  # a new process, or a write whose answer was lost
        context.configs = await context.ledger.configs()
    waiting = tuple(x for x in context.view.proposals if str(x.config_id) not in opened)
    context.view = replace(context.view, proposals=waiting)
    context.events.extend(tail)
    context.decisions |= {event.h for event in tail if isinstance(event, Open)}
    context.state = fold(tail, context.state)
    context.observed = _with_verdicts(context, await context.backend.observe())
    view = replace(context.view, answered=context.answered_at == context.view.told)
    wishes = p.Wishes(
        retry=context.retry_token, finetune=context.finetune, evaluate=context.evaluate
    )
    wanted = wants_candidates(context.state, wishes, context.run.spec.fidelity.max)
    return p.PlannerInput(
        spec=context.run.spec,
        identity=context.run.identity,
        ledger=context.state,
        observed=context.observed,
        optimizer=view,
        now=context.clock(),
        wishes=wishes,
        candidates=context.candidates(context) if wanted else (),
        counted_steps=context.counted_steps,
        supply=context.run.supply,
    )


def _with_verdicts(context: RunContext, observed: p.Observed) -> p.Observed:
    jobs = []
    for job in observed.jobs:
        entry = context.state.open.get(job.c)
        if job.end is not None and entry is not None and entry.attempt == job.attempt:
            job = replace(job, verdict=classify(job.end, entry, context.run.spec.metric))
        jobs.append(job)
    return replace(observed, jobs=tuple(jobs))


async def act(context: RunContext, plan: p.Plan) -> None:
    """Carry a plan out in order; stop at the first write the ledger did not take."""
    for action in plan.actions:
        if not await _act(context, action):
            return


async def _act(context: RunContext, action: p.Action) -> bool:  # noqa: C901 - one case an action
    match action:
        case p.RecordNote():
            reply, _ = await context.ledger.note(action.event, key=action.key)
            reached("noted")
            return _accepted(reply, action.event)
        case p.Commit():
            reached("ended")
            reply, _ = await context.ledger.commit(
                action.event, job=_next_job(context, action.event)
            )
            reached("retried" if isinstance(action.event, Retry) else "committed")
            return _accepted(reply, action.event)
        case p.OpenStep():
            return await _open(context, action)
        case p.CreateJob():
            await _create(context, action)
        case p.Forget():
            await context.backend.forget(action.job)
            reached("forgotten")
        case p.Kill():
            await context.backend.kill(action.job, action.reason)
        case p.SuspendJob():
            await context.backend.suspend(action.job)
        case p.ResumeJob():
            await context.backend.resume(action.job)
        case p.LoadOptimizer():
            _start_call(context, _load(context))
        case p.Tell():
            return await _guarded(context, _tell(context))
        case p.Abandon():
            _abandon(context, action.config_id)
        case p.Ask():
            _start_call(context, _ask(context, action))
        case p.EmitEvent():
            await context.say(action)
        case p.Requeue():
            pass
    return True


def _accepted(reply: Reply, event: Event) -> bool:
    """OK and DUP go on, a stale writer must stop; else the ledger moved: gather again."""
    if reply is Reply.STALE:
        raise StaleEpochError("another process has taken this run over; this one stops")
    if reply not in {Reply.OK, Reply.DUP}:
        log.warning("ledger refused %s: %s", event.kind, reply.value)
        return False
    return True


def _next_job(context: RunContext, event: Done | Fail | Retry | Cancel) -> str:
    return context.job_name(event.c, event.to, event.a)


async def _open(context: RunContext, action: p.OpenStep) -> bool:
    event = action.event
    job = context.job_name(event.c, event.to, event.a)
    reply, _ = await context.ledger.open(event, config=action.config, job=job)
    reached("opened")
    if event.c.isdigit():
        kept = tuple(x for x in context.view.proposals if str(x.config_id) != event.c)
        context.view = replace(context.view, proposals=kept)
        context.answered_at = ""  # taken: an answer with nothing left is no last word
    if not _accepted(reply, event):
        return False
    if action.config is not None:
        context.configs[event.c] = action.config
    log.info(
        "opened %s -> epoch %d: %s", context.job_name(event.c, event.to, 0), event.to, event.why
    )
    return True


async def _create(context: RunContext, action: p.CreateJob) -> None:
    config = context.configs.get(action.c)
    if action.c.isdigit() and config is None:
        raise LedgerError(f"configuration {action.c} was opened but its values are not recorded")
    gc = context.garbage(context, action.c) if action.c.isdigit() else ()
    document = job_document(context.run, action, context.state, config, gc)
    name = context.job_name(action.c, action.to, action.attempt)
    await context.backend.create(action, name, document)
    reached("created")


# --- the optimizer: one call at a time, its answer is input of a later turn ---------------------


def _start_call(context: RunContext, work: Coroutine[None, None, None]) -> None:
    context.view = replace(context.view, busy=True, error="")

    async def call() -> None:
        try:
            await _guarded(context, work)
        finally:
            context.view = replace(context.view, busy=False)
            context.wake.set()

    context.call = asyncio.create_task(call())


async def _guarded(context: RunContext, work: Coroutine[None, None, None]) -> bool:
    """Await a call; whether it worked. A failure is kept for the planner, which lets it rest."""
    try:
        await work
    except (OptimizerError, SpecError, ObservationError, UnknownConfigurationError) as error:
        retry_at = context.clock() + REST_SECONDS
        fault = error.reason if isinstance(error, OptimizerError) else "Failed"
        context.view = replace(context.view, error=str(error), fault=fault, retry_at=retry_at)
        log.warning("optimizer: %s", error)
        return False
    context.view = replace(context.view, error="", retry_at=0.0)
    return True


async def _load(context: RunContext) -> None:
    last = context.state.last_id
    history = optimizer_events(
        context.events, context.configs, charged_devices=context.run.spec.charged_devices
    )
    heads, count = context.state.heads, len(context.events)
    await context.optimizer.load(context.setup(context.state), history)
    context.recommendation = await context.optimizer.recommend()
    context.told_heads, context.told_count = heads, count
    context.view = replace(context.view, loaded=True, told=last)


async def _tell(context: RunContext) -> None:
    """Feed what is behind `told`, in the ledger's order, live as on replay."""
    tail = context.events[context.told_count :]
    fresh = optimizer_events(
        tail, context.configs, told=context.told_heads,
        charged_devices=context.run.spec.charged_devices,
    )  # fmt: skip
    if fresh:
        await context.optimizer.tell(fresh)
        reached("told")
        if not all(isinstance(event, Proposal) for _, event in fresh):
            context.recommendation = await context.optimizer.recommend()
    context.told_heads, context.told_count = context.state.heads, len(context.events)
    context.view = replace(context.view, told=context.state.last_id)


async def tell_the_rest(context: RunContext) -> None:
    """Feed a loaded, idle optimizer what it was not told, so that its recommendation knows all.

    For the end of a run: the planner tells only before it asks. Raises: OptimizerError.
    """
    if context.view.loaded and not context.view.busy and context.view.told != context.state.last_id:
        await _tell(context)


async def _ask(context: RunContext, action: p.Ask) -> None:
    started = time.monotonic()
    told = context.view.told
    answer = await context.optimizer.ask(action.n, action.budget)
    reached("asked")
    context.last_ask_seconds = time.monotonic() - started
    context.answered_at = told
    context.view = replace(
        context.view, proposals=tuple(answer.proposals), finished=answer.finished
    )


def _abandon(context: RunContext, config_id: int) -> None:
    """Drop a proposal. The optimizer forgets by itself what was not opened before the next ask.

    The answer no longer tells what it would do: asked again, it may well propose something.
    """
    kept = tuple(x for x in context.view.proposals if x.config_id != config_id)
    context.view = replace(context.view, proposals=kept)
    context.answered_at = ""

"""A whole run on one machine: `qtt run`.

Owns what a run needs here (lock, store, trainer parents, optimizer worker) and takes turns until
the run has ended, the user stops it, or nothing can move. Decides nothing: that is the planner's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from qtt_core.errors import Fault, OptimizerError, SpecError, StoreUnavailableError
from qtt_core.ledger.events import is_evaluation
from qtt_core.ledger.fold import LedgerState, fold
from qtt_core.plan import Identity, JobPhase, Plan
from qtt_operator import local_start
from qtt_operator.command_child import CommandChild
from qtt_operator.documents import RunContents, optimizer_setup
from qtt_operator.housekeeping import Housekeeping
from qtt_operator.local_backend import LocalBackend
from qtt_operator.local_setup import LocalOptions, LocalSetup, check_drift, prepare_local
from qtt_operator.local_store import LocalStore, open_store
from qtt_operator.narrate import Narrator
from qtt_operator.optimizer_pool import OptimizerClient
from qtt_operator.prior_choice import choose_prior
from qtt_operator.redis_ledger import RedisLedger, next_epoch
from qtt_operator.run_folder import RunFolder, write_atomically
from qtt_operator.serve_child import ServeChild
from qtt_operator.snapshot import Snapshot
from qtt_operator.stopping import (
    Ending,
    Stopper,
    Urgency,
    disk_full,
    ending_of,
    held_ending,
    signals_to,
    suspended_ending,
)
from qtt_operator.store import RunLock
from qtt_operator.timings import Trace
from qtt_operator.turn import RunContext, moved, pause_seconds, run_turn, tell_the_rest

REFRESH_SECONDS = 0.5


class View(Protocol):
    """Shows a run to a person."""

    def note(self, text: str) -> None:
        """Something to know before the start, or out of the ordinary."""

    def line(self, text: str) -> None:
        """A decision or a result."""

    def show(self, snapshot: Snapshot) -> None:
        """The run as it is now; called about twice a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A run that stands still: why, and what reports are made of."""

    ending: Ending
    setup: LocalSetup
    context: RunContext
    backend: LocalBackend


@asynccontextmanager
async def run_local(options: LocalOptions, view: View) -> AsyncIterator[Finished]:
    """Run until the end, a stop or trouble; inside the context, back end and store still live.

    The same call later goes on where this one stopped. Raises: SpecError, SpecDriftError,
    RunLockedError, StoreError, VolumeError; `exits` says which exit code each one is.
    """
    setup = prepare_local(options)
    if options.fresh:
        _set_aside(setup.folder, view)
    with RunLock(setup.folder.path):
        _refuse_record(setup.folder)
        uid = setup.folder.draw_uid()
        async with open_store(setup.folder.path, options.redis_url) as (store, advice):
            for note in (*setup.notes, *advice):
                view.note(note)
            ledger = RedisLedger(store.client, uid, await next_epoch(store.client))
            await ledger.fence()
            state = fold(await ledger.read())
            if state.run is not None:
                check_drift(state.run, setup.run, setup.files)
                if state.run.space_hash != setup.space_sha:
                    view.note("the search space differs from the recorded one: newer code")
            choice = choose_prior(setup.run, setup.hub, state, setup.priors)
            if choice.line:
                view.note(choice.line)
            setup = replace(setup, prior=choice.prior)
            known = local_start.facts(setup, uid, embedded=options.redis_url is None)
            write_atomically(setup.folder.facts_file, json.dumps(known, indent=1))
            runner = _Runner(options, setup, ledger, store, view)
            try:
                yield await runner.run(state)
            finally:
                await runner.close()


def _set_aside(folder: RunFolder, view: View) -> None:
    """`--fresh`: keep the old state under another name, unless somebody is running it."""
    if not folder.path.exists():
        return
    with RunLock(folder.path):
        kept = folder.set_aside(time.time())
    view.note(f"starting over; the old state is kept in {kept}")


def _refuse_record(folder: RunFolder) -> None:
    """Raises: SpecError for an imported run: its checkpoints are not here."""
    if folder.read_facts().get("imported"):
        remedy = f"{folder.path} is an import, to read and learn from; use another name, or --fresh"
        raise SpecError([Fault("metadata.name", folder.path.name, remedy)])


class _Runner:
    """The turns of one run in this process."""

    def __init__(
        self,
        options: LocalOptions,
        setup: LocalSetup,
        ledger: RedisLedger,
        store: LocalStore,
        view: View,
    ) -> None:
        self._setup, self._ledger, self._store, self._view = setup, ledger, store, view
        self._trace = Trace(setup.folder.trace_file)
        self._backend = LocalBackend(
            setup.slots,
            state_dir=setup.folder.path,
            command=options.trainer or options.serve,
            child=CommandChild if options.trainer else ServeChild,
            trace=self._trace,
        )
        self._optimizer = OptimizerClient(timeout_seconds=setup.spec.optimizer.timeout)
        self._stopper = Stopper(self._backend.changed)
        self._house = Housekeeping(setup.folder.status_file)
        self._narrator = Narrator(metric=setup.spec.metric, budget=setup.spec.budget)
        self._told = 0
        self._plan: Plan | None = None

    async def run(self, state: LedgerState) -> Finished:
        """Turns until the run stands still."""
        with signals_to(self._stopper.press):
            again = local_start.started_again(state)
            if again is not None:
                await self._ledger.note(again[0], key=again[1])
                state = fold(await self._ledger.read(state.last_id), state)
            seed = secrets.randbits(31)
            identity = local_start.identity_of(
                self._setup, state, self._ledger.uid, fresh_seed=seed
            )
            if local_start.is_over(self._setup, state, identity, time.time()):
                return await self._as_it_ended(identity)
            context = self._context(identity)
            left = local_start.orphans(identity.name, state, self._setup.spec.metric)
            self._backend.adopt(left, local_start.run_dir(self._setup.places, identity.uid))
            self._backend.warm()
            await self._optimizer.start()  # imports torch while the data set is read
            ending = await self._until_still(context)
        return self._finished(context, ending)

    async def close(self) -> None:
        """End every process of the run."""
        await self._backend.close()
        await self._optimizer.close()
        self._trace.close()

    # --- before the first turn ---------------------------------------------------------------

    def _contents(self, identity: Identity) -> RunContents:
        setup = self._setup
        return RunContents(
            spec=setup.spec,
            identity=identity,
            hub=setup.hub,
            places=setup.places,
            space_definition=setup.space_definition,
            priors=setup.priors,
        )

    def _context(self, identity: Identity) -> RunContext:
        contents = self._contents(identity)
        return RunContext(
            run=contents,
            setup=lambda state: optimizer_setup(contents, state),
            ledger=self._ledger,
            backend=self._backend,
            optimizer=self._optimizer,
            garbage=self._house.garbage,
            wake=self._backend.changed,
        )

    async def _as_it_ended(self, identity: Identity) -> Finished:
        """A run that is over: read, nothing is started."""
        context = self._context(identity)
        context.events = await self._ledger.read()
        context.configs = await self._ledger.configs()
        context.state = fold(context.events)
        self._told = len(context.events)
        closed = context.state.closed
        assert closed is not None  # is_over has seen it
        return self._finished(context, ending_of(closed))

    def _finished(self, context: RunContext, ending: Ending) -> Finished:
        return Finished(ending=ending, setup=self._setup, context=context, backend=self._backend)

    # --- turns -------------------------------------------------------------------------------

    async def _until_still(self, context: RunContext) -> Ending:
        """Turns, with the view refreshed beside them."""
        refresh = asyncio.create_task(self._refresh(context))
        try:
            return await self._turns(context)
        finally:
            refresh.cancel()
            await asyncio.gather(refresh, return_exceptions=True)
            if context.call is not None:
                context.call.cancel()
                await asyncio.gather(context.call, return_exceptions=True)
            with contextlib.suppress(OptimizerError):  # the recommendation is then an older one
                await tell_the_rest(context)
            self._show(context)

    async def _turns(self, context: RunContext) -> Ending:
        while True:
            context.wake.clear()
            plan = await self._turn(context)
            if plan is None:
                continue
            self._plan = plan
            self._narrate(context)
            await self._stop_if_asked(context)
            ending = None if moved(plan) else self._ending(context, plan)
            if ending is not None:
                return ending
            if not moved(plan):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_seconds(plan)):
                        await context.wake.wait()

    async def _turn(self, context: RunContext) -> Plan | None:
        """One turn; None after the store was brought back."""
        began = time.monotonic()
        try:
            plan = await run_turn(context)
        except StoreUnavailableError as error:
            await self._store.recover(error)
            return None
        self._store.is_well()
        kinds = [type(action).__name__ for action in plan.actions]
        self._trace("turn", {"seconds": round(time.monotonic() - began, 6), "actions": kinds})
        return plan

    async def _stop_if_asked(self, context: RunContext) -> None:
        """Draining is the planner's suspension; the second signal ends the running jobs."""
        fresh = [e for e in context.events[self._told :] if e.ep == self._ledger.epoch]
        full = disk_full(fresh)  # an earlier runner's is no reason: space may have been made
        if full is not None:
            self._stopper.drain(full)
        self._told = len(context.events)
        if self._stopper.urgency is Urgency.GO_ON:
            return
        spec = context.run.spec
        if not spec.suspend:
            self._view.note("draining: running steps end, nothing new starts; Ctrl-C ends them now")
            context.run = replace(context.run, spec=replace(spec, suspend=True))
            context.wake.set()
        if self._stopper.urgency is Urgency.STOP:
            for job in context.observed.jobs:
                await self._backend.kill(job.name, "Stopped")

    def _ending(self, context: RunContext, plan: Plan) -> Ending | None:
        """Why the run stands still after a plan that changed nothing, or None while it does not."""
        live = [job for job in context.observed.jobs if job.phase is not JobPhase.ENDED]
        if live:
            return None
        if context.state.closed is not None:  # not before the planner has parted with what was open
            waiting = [c for c in context.state.open if not is_evaluation(c)]
            return None if waiting else ending_of(context.state.closed)
        if self._stopper.ending is not None:
            return self._stopper.ending if context.run.spec.suspend else None
        if context.run.spec.suspend:
            return suspended_ending()
        if plan.held is not None and not context.view.busy and not context.state.open:
            return held_ending(*plan.held)
        return None

    # --- telling -----------------------------------------------------------------------------

    def _narrate(self, context: RunContext) -> None:
        """One line for every event that is new, and one for all that an earlier runner wrote."""
        first, lines = self._narrator.count == 0, []
        for event in context.events[self._narrator.count :]:
            text = self._narrator.line(event, context.configs)
            if text and event.ep == self._ledger.epoch:
                lines.append(text)
        if first and self._narrator.steps:
            lines.insert(0, self._narrator.so_far())
        for text in lines:
            self._view.line(text)

    async def _refresh(self, context: RunContext) -> None:
        while True:
            self._show(context)
            await asyncio.sleep(REFRESH_SECONDS)

    def _show(self, context: RunContext) -> None:
        if self._plan is None:
            return
        self._house.write_status(context, self._plan)
        view = context.view
        doing = "asking the optimizer" if view.busy and view.loaded else ""
        self._view.show(
            Snapshot(
                name=context.run.identity.name,
                spec=context.run.spec,
                phase=self._plan.phase,
                state=context.state,
                histories=self._house.histories(context),
                running=self._backend.running(),
                recommendation=context.recommendation,
                now=context.clock(),
                slots=len(self._setup.slots),
                models=len(self._setup.hub.cards),
                doing="loading the optimizer" if view.busy and not view.loaded else doing,
                draining=self._stopper.urgency is not Urgency.GO_ON,
                trouble=": ".join(self._plan.held) if self._plan.held else "",
            )
        )

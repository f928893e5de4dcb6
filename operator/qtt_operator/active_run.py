"""A TuningRun that this process works on: parsed, resolved, fenced and given its ports.

Everything here is a cache: built from the TuningRun and the ledger, dropped at any time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import qtt_core
from qtt_core.errors import SpecDriftError, StaleEpochError
from qtt_core.fields import raise_faults
from qtt_core.ledger.events import PREPARE, Open
from qtt_core.ledger.fold import LedgerState, fold
from qtt_core.plan import CreateJob, EmitEvent, Identity, JobPhase, Wishes
from qtt_core.spec import changed_immutable_fields, immutable_digest, parse_manifest
from qtt_core.steps import decision_hash, digest
from qtt_operator.cluster import Cluster, Object
from qtt_operator.cluster_backend import ClusterBackend, Copies
from qtt_operator.documents import RunContents, job_document, optimizer_setup
from qtt_operator.housekeeping import Housekeeping
from qtt_operator.names import EVALUATE_ANNOTATION, FINETUNE_ANNOTATION, RETRY_ANNOTATION
from qtt_operator.optimizer_share import OptimizerShare, SharedOptimizer
from qtt_operator.owner import RunObject
from qtt_operator.pod_rules import refused
from qtt_operator.prior_choice import choose_prior
from qtt_operator.redis_client import refuse_eviction
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.references import places, require_claims, resolve
from qtt_operator.settings import OperatorSettings
from qtt_operator.supplies import build_weights_claim, supply_of
from qtt_operator.turn import Reply, RunContext

Key = tuple[str, str]
"""Namespace and name of a TuningRun."""

CHECK_SECONDS = 3600.0
"""Time limit of the Pod that is only tried out on the server."""


@dataclass(slots=True, kw_only=True)
class ActiveRun:
    """One run's ports and caches."""

    key: Key
    uid: str
    generation: int
    context: RunContext
    ledger: RedisLedger
    backend: ClusterBackend
    optimizer: SharedOptimizer
    house: Housekeeping
    status: dict[str, Any] = field(default_factory=dict)
    """As last written."""
    written_at: float = 0.0
    """When (monotonic)."""
    rejected: str = ""
    """The server's words on the Pod that the template makes, empty if it takes it."""
    spent_token: str = ""
    """A `retry` that was there before a loss of data was found: it did not mean this loss."""
    failure: tuple[float, str, str] | None = None
    """Time, reason and message of the last turn that broke."""
    news: str = ""
    """What a person should hear of the prior, said once."""
    swept_closed: int = 0
    """Closed configurations when the volume was last looked at for garbage."""

    @property
    def is_still(self) -> bool:
        """No Job lives and the optimizer is not at work."""
        live = [job for job in self.context.observed.jobs if job.phase is not JobPhase.ENDED]
        return not (live or self.context.state.open or self.context.view.busy)

    def listen(self, found: Object) -> None:
        """Take what a person asks for from the TuningRun's annotations."""
        wishes, context = wishes_of(found), self.context
        context.retry_token = wishes.retry if wishes.retry != self.spent_token else ""
        context.finetune, context.evaluate = wishes.finetune, wishes.evaluate

    async def close(self) -> None:
        """End a call of the optimizer that is under way."""
        if self.context.call is not None:
            self.context.call.cancel()
            await asyncio.gather(self.context.call, return_exceptions=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all runs of a process share. `enqueue`: take a turn of a run after so many seconds."""

    cluster: Cluster
    copies: Copies
    share: OptimizerShare
    settings: OperatorSettings
    epoch: int
    clock: Callable[[], float]
    ledger_of: Callable[[str], RedisLedger]
    enqueue: Callable[[Key, float], None]
    room: Callable[[Key, int], int]
    """Jobs that a run may have open, of those that it wants."""
    commit_delay_seconds: Callable[[], float] = lambda: 0.0
    tell: Callable[[Key, EmitEvent], Awaitable[None]]


class Wake(asyncio.Event):
    """An event that also puts a run's key into the queue."""

    def __init__(self, enqueue: Callable[[], None]) -> None:
        super().__init__()
        self._enqueue = enqueue

    def set(self) -> None:
        """Wake whoever waits, and the queue."""
        super().set()
        self._enqueue()


async def start_run(key: Key, found: Object, around: Surroundings) -> ActiveRun:
    """Parse, resolve, fence, read, and try the Pod on the server.

    Raises: SpecError with every fault; SpecDriftError; StaleEpochError; StoreUnavailableError;
    ClusterError.
    """
    owner = owner_of(found, around.settings)
    run = owner.run
    resolved = await resolve(around.cluster, run)
    ledger = around.ledger_of(owner.uid)
    if (await ledger.fence()) is Reply.STALE:
        raise StaleEpochError(f"epoch {around.epoch} is fenced; a newer leader works")
    state = fold(await ledger.read())
    check_drift(state, owner, resolved.files)
    supply = supply_of(run, resolved.hub, around.settings)
    if state.prepared is None:
        ours = build_weights_claim(owner, supply.claim, around.settings) is not None
        supply = await require_claims(around.cluster, run, supply, ours=ours)
    if state.run is None:
        await refuse_eviction(ledger.client)
    optimizer = around.share.port(run.spec.optimizer.timeout)
    own = around.settings.priors_folder
    choice = choose_prior(run, resolved.hub, state, own)
    identity = replace(_identity(owner, state), files=resolved.files, prior=choice.prior)
    contents = RunContents(
        spec=run.spec, identity=identity, hub=resolved.hub, priors=own,
        places=places(supply), space_definition=resolved.space_definition, supply=supply,
    )  # fmt: skip
    space = await optimizer.describe(optimizer_setup(contents, state))
    identity = replace(identity, space_id=space.space_id, space_sha=space.space_sha)
    active = _assemble(
        key, found, owner, replace(contents, identity=identity), ledger, optimizer, around
    )
    active.news = choice.line
    if active.context.counted_steps > state.steps:
        active.spent_token = wishes_of(found).retry
    if state.prepared is None:
        await check_pod(active)
    return active


def _assemble(
    key: Key,
    found: Object,
    owner: RunObject,
    contents: RunContents,
    ledger: RedisLedger,
    optimizer: SharedOptimizer,
    around: Surroundings,
) -> ActiveRun:
    house = Housekeeping(Path())
    backend = ClusterBackend(
        cluster=around.cluster, copies=around.copies, owner=owner, settings=around.settings,
        epoch=around.epoch, clock=around.clock, weights=contents.supply.claim,
        wake_after=lambda after: around.enqueue(key, after),
        room=lambda wanted: around.room(key, wanted),
        commit_delay_seconds=around.commit_delay_seconds(),
    )  # fmt: skip
    context = RunContext(
        run=contents,
        setup=lambda state: optimizer_setup(context.run, state),
        ledger=ledger,
        backend=backend,
        optimizer=optimizer,
        garbage=house.garbage,
        clock=around.clock,
        wake=Wake(lambda: around.enqueue(key, 0.0)),
        candidates=lambda context: house.candidates(context, _best_folder(active.status)),
        counted_steps=int(((found.get("status") or {}).get("consumed") or {}).get("steps") or 0),
        say=lambda event: around.tell(key, event),
    )
    backend.opened = lambda c: _last_open(context, c)
    backend.attempt_of = lambda c, to: _open_attempt(context, c, to)
    backend.knows = lambda decision: decision in context.decisions
    active = ActiveRun(
        key=key, uid=owner.uid, generation=found["metadata"]["generation"], context=context,
        ledger=ledger, backend=backend, optimizer=optimizer, house=house,
        status=found.get("status") or {},
    )  # fmt: skip
    return active


def apply_spec(run: ActiveRun, found: Object, settings: OperatorSettings) -> None:
    """The spec was edited: mutable fields act from now on. Raises: SpecError, SpecDriftError."""
    owner = owner_of(found, settings)
    check_drift(run.context.state, owner)
    if owner.run.spec.template != run.backend.owner.run.spec.template:
        run.rejected = "the new template was not tried yet"
    run.backend.owner = owner
    run.context.run = replace(run.context.run, spec=owner.run.spec)
    run.generation = found["metadata"]["generation"]


async def check_pod(run: ActiveRun) -> None:
    """Dry-run Job and Pod of the first step this run would start."""
    contents = run.context.run
    decision = decision_hash(
        uid=run.uid, config=PREPARE, fidelity_from=0, fidelity_to=1, config_digest=digest({}),
        space_sha=contents.identity.space_sha, seed=contents.identity.seed, position="0-0",
    )  # fmt: skip
    job = CreateJob(
        kind="prepare", c=PREPARE, frm=0, to=1, attempt=0, decision=decision,
        timeout_seconds=CHECK_SECONDS,
    )  # fmt: skip
    document = job_document(contents, job, run.context.state)
    run.rejected = await run.backend.preflight(job, document)


def owner_of(found: Object, settings: OperatorSettings) -> RunObject:
    """The TuningRun, parsed. Raises: SpecError with every fault, refused pod fields among them."""
    manifest = {name: found[name] for name in ("apiVersion", "kind", "metadata", "spec")}
    run = parse_manifest(manifest)
    raise_faults(refused(run, settings))
    return RunObject(run=run, uid=str(found["metadata"]["uid"]))


def check_drift(
    state: LedgerState, owner: RunObject, files: Mapping[str, str] | None = None
) -> None:
    """Raises: SpecDriftError if the run that was started is another one.

    Old servers ignore CEL, and no server looks into the ConfigMaps (`files`: field -> digest).
    """
    if state.run is not None:
        changed = changed_immutable_fields(state.run.spec, owner.run.raw_spec)
        recorded = state.run.files
        changed += [n for n, sha in (files or {}).items() if recorded.get(n, sha) != sha]
        if changed:
            raise SpecDriftError(changed, "put them back, or start another run")


def wishes_of(found: Object) -> Wishes:
    """What a person asks for in the TuningRun's annotations."""
    notes = found["metadata"].get("annotations") or {}
    return Wishes(
        retry=str(notes.get(RETRY_ANNOTATION, "")),
        finetune=str(notes.get(FINETUNE_ANNOTATION, "")),
        evaluate=str(notes.get(EVALUATE_ANNOTATION, "")),
    )


def _best_folder(status: Mapping[str, Any]) -> str:
    """The recommended checkpoint, which every retention but `None` keeps."""
    return str((status.get("best") or {}).get("checkpoint", ""))


def _identity(owner: RunObject, state: LedgerState) -> Identity:
    """Who the run is; a seed nobody chose comes from its uid, so that it is drawn once."""
    drawn = int(hashlib.sha256(owner.uid.encode()).hexdigest()[:8], 16) & 0x7FFFFFFF
    seed = owner.run.spec.optimizer.seed
    if state.run is not None:
        seed = state.run.seed
    return Identity(
        uid=owner.uid, name=owner.run.name, seed=drawn if seed is None else seed,
        space_id="", space_sha="", spec_hash=immutable_digest(owner.run.raw_spec),
        version=qtt_core.__version__, raw_spec=owner.run.raw_spec,
    )  # fmt: skip


def _open_attempt(context: RunContext, c: str, to: int) -> int | None:
    entry = context.state.open.get(c)
    return entry.attempt if entry is not None and entry.to == to else None


def _last_open(context: RunContext, c: str) -> Open | None:
    """The `open` event of a configuration's newest decision."""
    for event in reversed(context.events):
        if isinstance(event, Open) and event.c == c:
            return event
    return None

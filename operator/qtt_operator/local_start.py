"""What a local run settles before its first turn, from the ledger it finds: pure functions.

Who the run is, whether it is over already, what starting it again means for a failed one, and which
attempts an earlier runner left open.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qtt_core
from qtt_core.ledger.events import Event, Note, Reopen
from qtt_core.ledger.fold import RETRY_NOTE, LedgerState
from qtt_core.limits import may_reopen
from qtt_core.plan import Identity, Observed, OptimizerView, PlannerInput
from qtt_core.spec import immutable_digest
from qtt_core.steps import Metric, nonce
from qtt_operator.documents import Places
from qtt_operator.local_setup import LocalSetup
from qtt_operator.names import COMPLETE_REASONS, job_name
from qtt_operator.recovery import Orphan


def identity_of(setup: LocalSetup, state: LedgerState, uid: str, *, fresh_seed: int) -> Identity:
    """Who the run is. The seed is the recorded one, else the manifest's, else the fresh one."""
    seed = setup.spec.optimizer.seed
    if state.run is not None:
        seed = state.run.seed
    return Identity(
        uid=uid,
        name=setup.run.name,
        seed=fresh_seed if seed is None else seed,
        space_id=setup.space_id,
        space_sha=setup.space_sha,
        spec_hash=immutable_digest(setup.run.raw_spec),
        version=qtt_core.__version__,
        raw_spec=setup.run.raw_spec,
        files=setup.files,
        prior=setup.prior,
    )


def started_again(state: LedgerState) -> tuple[Event, str] | None:
    """What to record (event, key) when a person starts a run again that had failed or was held."""
    closed = state.closed
    if closed is not None:
        failed = closed.reason not in COMPLETE_REASONS
        return (Reopen(reason="Retried"), f"reopen-{closed.id}") if failed else None
    failures = state.cancelled_in_a_row or state.invalid_in_a_row or state.bugs_in_a_row
    if failures or state.dataset_changed:
        return Note(what=RETRY_NOTE, new="started again"), f"{RETRY_NOTE}-{state.last_id}"
    return None


def is_over(setup: LocalSetup, state: LedgerState, identity: Identity, now: float) -> bool:
    """Whether the run is complete and stays so; a raised budget would reopen it."""
    if state.closed is None:
        return False
    i = PlannerInput(
        spec=setup.spec,
        identity=identity,
        ledger=state,
        observed=Observed(),
        optimizer=OptimizerView(),
        now=now,
    )
    return not may_reopen(i)


def orphans(run: str, state: LedgerState, metric: Metric) -> list[Orphan]:
    """Attempts that were open when the earlier runner ended."""
    return [
        Orphan(
            name=job_name(run, entry.c, entry.to, entry.attempt),
            kind="step" if entry.c.isdigit() else entry.c.split("-")[0],
            c=entry.c, frm=entry.frm, to=entry.to, attempt=entry.attempt,
            nonce=nonce(entry.decision, entry.attempt), since=entry.since, metric=metric,
        )
        for entry in state.open.values()
    ]  # fmt: skip


def run_dir(places: Places, uid: str) -> Path:
    """The run's folder of checkpoints, results and logs."""
    return Path(places.root) / "runs" / uid


def facts(setup: LocalSetup, uid: str, *, embedded: bool) -> Mapping[str, Any]:
    """What the reading verbs need to know without the manifest.

    The address of a foreign store may hold a password and is not kept.
    """
    return {
        "name": setup.run.name,
        "uid": uid,
        "root": setup.places.root,
        "data": setup.places.data,
        "weights": setup.places.weights,
        "embedded": embedded,
        "spec": dict(setup.run.raw_spec),
        "hub": setup.hub.to_json(),
        "space_definition": setup.space_definition,
    }

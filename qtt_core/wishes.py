"""What a person asks for beside the manifest: score checkpoints, train the best ones to the end.

An annotation's first word is a token; a new token acts once. The note that the ledger keeps of it
says what became of the wish, so that nothing is written back and a restart repeats nothing. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from qtt_core.ledger.events import EVALUATION_PREFIX, Note, Open
from qtt_core.ledger.fold import EVALUATE_NOTE, FINETUNE_NOTE, RETRY_NOTE, LedgerState
from qtt_core.limits import (
    COMPLETE,
    may_open,
    next_attempt,
    seconds_left,
    slots,
    steps_left,
    steps_of,
    template_hash,
    tuning,
    wished,
)
from qtt_core.plan import (
    Action,
    Candidate,
    EmitEvent,
    Evaluation,
    OpenStep,
    PlannerInput,
    RecordNote,
    Wishes,
)
from qtt_core.steps import MAX_JOB_EPOCHS, Why, decision_hash, digest

EVALUATED_AT_MOST = 10
"""Checkpoints of one evaluation: their scores must fit into one termination message."""

_CLAIM = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


def note_key(what: str, value: str) -> str:
    """The deduplication key of a wish's note."""
    return f"{what}-{digest(_token(value))[:16]}"


def is_new(ledger: LedgerState, what: str, value: str) -> bool:
    """Whether a wish is there and has not acted yet."""
    seen = {_token(note.new) for note in ledger.notes if note.what == what}
    return bool(value.strip()) and _token(value) not in seen


def wants_candidates(ledger: LedgerState, wishes: Wishes, full: int) -> bool:
    """Whether a wish must choose among the configurations."""
    new = is_new(ledger, FINETUNE_NOTE, wishes.finetune) or is_new(
        ledger, EVALUATE_NOTE, wishes.evaluate
    )
    return new or bool(wished(ledger, full))


def unheard(ledger: LedgerState, wishes: Wishes) -> bool:
    """Whether a wish has not acted yet."""
    return (
        is_new(ledger, RETRY_NOTE, wishes.retry)
        or is_new(ledger, FINETUNE_NOTE, wishes.finetune)
        or is_new(ledger, EVALUATE_NOTE, wishes.evaluate)
    )


def evaluation_id(value: str) -> str:
    """The pseudo-configuration of an evaluation: `eval-<7 hex digits of the token's digest>`."""
    return f"{EVALUATION_PREFIX}{digest(_token(value))[:7]}"


# --- evaluate ------------------------------------------------------------------------------------


def evaluate(i: PlannerInput) -> Iterator[Action]:
    """Open an evaluation of the best kept checkpoints; on a run that is over, too."""
    value = i.wishes.evaluate
    waits = i.spec.suspend or (i.ledger.prepared is None and i.ledger.closed is None)
    if waits or not is_new(i.ledger, EVALUATE_NOTE, value):
        return
    if evaluation_id(value) not in i.ledger.open:  # else: opened, and then we died
        try:
            yield _opened_evaluation(i, _evaluation(i, value))
        except ValueError as error:
            yield from _refused(EVALUATE_NOTE, value, str(error))
            return
    yield RecordNote(event=Note(what=EVALUATE_NOTE, new=value), key=note_key(EVALUATE_NOTE, value))


def _evaluation(i: PlannerInput, value: str) -> Evaluation:
    """Raises: ValueError, why it cannot be done."""
    c, (_, *rest) = evaluation_id(value), value.split()
    if (c, 1) in i.ledger.step_keys or (c, 1) in i.ledger.attempts:
        raise ValueError("its token was used before; choose another one")
    if len(rest) > 1:
        raise ValueError(f"{value!r}: write <token> CLAIM[:path], or <token> alone")
    claim, _, path = (rest[0] if rest else "").partition(":")
    inside = PurePosixPath(path)
    if (rest and not _CLAIM.fullmatch(claim)) or inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"{rest[0]!r}: write CLAIM[:path], the path inside the claim")
    kept = [x.checkpoint for x in i.candidates if x.checkpoint][:EVALUATED_AT_MOST]
    if not kept:
        raise ValueError("the run keeps no checkpoint that could be scored")
    return Evaluation(checkpoints=tuple(kept), claim=claim, path=path)


def _opened_evaluation(i: PlannerInput, evaluation: Evaluation) -> OpenStep:
    c, why = evaluation_id(i.wishes.evaluate), evaluation.to_json()
    decision = decision_hash(
        uid=i.identity.uid, config=c, fidelity_from=0, fidelity_to=1, config_digest=digest(why),
        space_sha=i.identity.space_sha, seed=i.identity.seed, position=i.ledger.last_id,
    )  # fmt: skip
    event = Open(
        c=c, frm=0, to=1, a=next_attempt(i, c, 1), h=decision, res=0.0, why=why,
        ver=i.identity.version,
        tpl=template_hash(i.spec),
    )  # fmt: skip
    return OpenStep(event=event, config=None)


# --- finetune ------------------------------------------------------------------------------------


def finetune(i: PlannerInput) -> Iterator[Action]:
    """Choose the best k for full fidelity, once, then open them before anything else."""
    value = i.wishes.finetune
    ready = i.ledger.prepared is not None or i.ledger.closed is not None
    if ready and is_new(i.ledger, FINETUNE_NOTE, value):
        try:
            chosen = _chosen(i, value)
        except ValueError as error:
            yield from _refused(FINETUNE_NOTE, value, str(error))
            return
        ids = json.dumps([x.config_id for x in chosen])
        note = Note(what=FINETUNE_NOTE, old=ids, new=value)
        yield RecordNote(event=note, key=note_key(FINETUNE_NOTE, value))
    elif may_open(i):
        yield from _finetuned(i)


def _finetuned(i: PlannerInput) -> Iterator[Action]:
    known = {str(x.config_id): x for x in i.candidates}
    free, left = slots(i) - len(tuning(i)), steps_left(i)
    for c in wished(i.ledger, i.spec.fidelity.max):
        if free > 0 and left >= 1 and c in known and c not in i.ledger.open:
            event = _to_the_end(i, known[c], left)
            yield OpenStep(event=event, config=None)
            free -= 1
            left -= steps_of(event.frm, event.to, i.spec.fidelity.step)


def _chosen(i: PlannerInput, value: str) -> list[Candidate]:
    """Raises: ValueError, why it cannot be done."""
    _, *rest = value.split()
    if len(rest) != 1 or not rest[0].isdecimal() or int(rest[0]) < 1:
        raise ValueError(f"{value!r}: write <token> <k>, how many of the best to train")
    closed = i.ledger.closed
    if i.spec.stop or (closed is not None and closed.reason not in COMPLETE.values()):
        raise ValueError(f"the run is over: {closed.reason if closed else 'spec.stop is set'}")
    full, delta = i.spec.fidelity.max, i.spec.fidelity.step
    best = [x for x in i.candidates if not x.closed][: int(rest[0])]
    chosen = [x for x in best if x.fidelity < full]
    seconds = sum(_seconds(i, x, x.fidelity, full) for x in chosen)
    steps = sum(steps_of(x.fidelity, full, delta) for x in chosen)
    if not chosen:
        raise ValueError(f"nothing to do: the best {rest[0]} are at epoch {full} already")
    if seconds > seconds_left(i) or steps > steps_left(i):
        raise ValueError(
            f"it needs {steps} steps and about {seconds:.0f} device-seconds; the budget has"
            f" {steps_left(i):.0f} steps and {seconds_left(i):.0f} device-seconds left: raise it"
        )
    return chosen


def _to_the_end(i: PlannerInput, x: Candidate, left: float) -> Open:
    delta, frm = i.spec.fidelity.step, x.fidelity
    most = min(MAX_JOB_EPOCHS // delta, left) * delta
    to = int(min(i.spec.fidelity.max, frm + most))
    c = str(x.config_id)
    decision = decision_hash(
        uid=i.identity.uid, config=x.config_id, fidelity_from=frm, fidelity_to=to,
        config_digest=digest(dict(x.config)), space_sha=i.identity.space_sha,
        seed=i.identity.seed, position=i.ledger.last_id,
    )  # fmt: skip
    return Open(
        c=c, frm=frm, to=to, a=next_attempt(i, c, to), h=decision,
        res=_seconds(i, x, frm, to), why=Why(rule=FINETUNE_NOTE).to_json(), ver=i.identity.version,
        tpl=template_hash(i.spec),
    )  # fmt: skip


def _seconds(i: PlannerInput, x: Candidate, frm: int, to: int) -> float:
    return (to - frm) * x.seconds_per_epoch * i.spec.charged_devices


# --- both ----------------------------------------------------------------------------------------


def _refused(what: str, value: str, problem: str) -> Iterator[Action]:
    refusal: Mapping[str, Any] = {"refused": problem}
    note = Note(what=what, old=json.dumps(refusal), new=value)
    yield RecordNote(event=note, key=note_key(what, value))
    yield EmitEvent(reason=f"{what.capitalize()}Refused", message=problem, warning=True)


def _token(value: str) -> str:
    return value.split()[0] if value.split() else ""

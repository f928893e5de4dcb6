"""What a job's end means: the table of 30-kubernetes 5.3, from raw facts to a `Verdict`. Pure.

This is the edge where native metric values become scores in [0, 1]; past it nothing knows percent
or loss. A message that cannot be trusted is a bug of the trainer, never clamped, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qtt_core.errors import MessageError
from qtt_core.ledger.events import PREPARE, WEIGHTS, is_evaluation
from qtt_core.ledger.fold import OpenEntry
from qtt_core.plan import Cause, Ending, JobEnd, Verdict
from qtt_core.results import (
    EXIT_BAD_DATA,
    EXIT_BAD_JOB,
    EXIT_BUG,
    EXIT_COMMITTED,
    EXIT_RETRY,
    State,
    StepResult,
)
from qtt_core.steps import Metric, nonce

SIGTERM, SIGKILL = 15, 9


def classify(end: JobEnd, entry: OpenEntry, metric: Metric) -> Verdict:
    """The meaning of an end, first match wins.

    A result that was committed counts even when the process was killed right after it: its message
    carries the attempt's nonce.
    """
    try:
        result = _message(end, entry)
    except MessageError as error:
        if end.exit_code in {EXIT_COMMITTED, EXIT_BAD_JOB, EXIT_BAD_DATA, EXIT_BUG, EXIT_RETRY}:
            return _untrusted(end, str(error))
        result = None
    if result is not None and result.state in _COMMITTED:
        return _committed(result, entry, metric)
    if end.reason in set(Cause):
        return Verdict(
            kind=Ending.INFRA, reason=end.reason, message=_text(result, end), result=result
        )
    return _by_exit_code(end, result)


_COMMITTED = frozenset({State.OK, State.DIVERGED, State.OOM, State.INFEASIBLE})

_KINDS = {EXIT_BAD_JOB: Ending.BAD_JOB, EXIT_BAD_DATA: Ending.BAD_DATA, EXIT_RETRY: Ending.INFRA}


def _message(end: JobEnd, entry: OpenEntry) -> StepResult:
    return StepResult.parse(
        end.message, nonce=nonce(entry.decision, entry.attempt), attempt=entry.attempt
    )


def _committed(result: StepResult, entry: OpenEntry, metric: Metric) -> Verdict:
    if entry.c == PREPARE:
        wrong = _wrong_facts(result.prepared)
        if wrong:
            return Verdict(kind=Ending.BUG, reason="badmessage", message=wrong, result=result)
        return Verdict(kind=Ending.PREPARED, reason="ok", state=result.state, result=result)
    if entry.c == WEIGHTS:
        if result.state is State.OK:
            return Verdict(kind=Ending.FETCHED, reason="ok", state=result.state, result=result)
        wrong = f"weights ended {result.state.value}"
        return Verdict(kind=Ending.BUG, reason="badmessage", message=wrong, result=result)
    if is_evaluation(entry.c):
        if result.scores:
            return Verdict(kind=Ending.EVALUATED, reason="ok", state=result.state, result=result)
        return Verdict(kind=Ending.BUG, reason="badmessage", message="it sent no scores")
    try:
        result.check_epochs(metric=metric, fidelity_from=entry.frm, fidelity_to=entry.to)
    except MessageError as error:
        return Verdict(kind=Ending.BUG, reason="badmessage", message=str(error), result=result)
    scores = tuple((e.epoch, metric.to_score(e.value), e.seconds) for e in result.epochs)
    return Verdict(
        kind=Ending.RESULT,
        reason=result.state.value,
        state=result.state,
        result=result,
        scores=scores,
    )


def _wrong_facts(facts: Mapping[str, Any] | None) -> str:
    """What is wrong with the facts of a `prepare`, empty if they can be recorded."""
    if facts is None:
        return "prepare sent no facts"
    for name in ("n_train", "n_val", "classes"):
        if not isinstance(facts.get(name), int) or facts[name] < 1:
            return f"prepare sent {name} {facts.get(name)!r}; a count of at least 1"
    if not isinstance(facts.get("fingerprint"), str) or not facts["fingerprint"]:
        return "prepare sent no fingerprint"
    numbers = facts.get("metafeatures")
    if not isinstance(numbers, Mapping) or not all(
        isinstance(value, int | float) and math.isfinite(value) for value in numbers.values()
    ):
        return f"prepare sent metafeatures {numbers!r}; finite numbers by name"
    return ""


def _untrusted(end: JobEnd, why: str) -> Verdict:
    """An exit code of ours without a message of ours: retried for 75, else a bug."""
    if end.exit_code == EXIT_RETRY:
        return Verdict(kind=Ending.INFRA, reason="unknown", message=why)
    return Verdict(kind=Ending.BUG, reason="badmessage", message=why)


def _by_exit_code(end: JobEnd, result: StepResult | None) -> Verdict:
    if result is not None and end.exit_code in _KINDS:
        return Verdict(
            kind=_KINDS[end.exit_code], reason=result.state.value, message=result.reason,
            state=result.state, result=result,
        )  # fmt: skip
    if end.signal == SIGTERM or end.exit_code == 128 + SIGTERM:
        return Verdict(kind=Ending.INFRA, reason="preempted", message="ended by SIGTERM")
    if end.signal == SIGKILL or end.exit_code == 128 + SIGKILL:
        return Verdict(kind=Ending.INFRA, reason="Killed", message="ended by SIGKILL")
    return Verdict(kind=Ending.BUG, reason="bug", message=_text(result, end), result=result)


def _text(result: StepResult | None, end: JobEnd) -> str:
    if result is not None and result.reason:
        return result.reason
    if end.exit_code is not None:
        return f"exit code {end.exit_code}, no message"
    return f"ended by signal {end.signal}" if end.signal else end.reason or "ended, nobody saw how"

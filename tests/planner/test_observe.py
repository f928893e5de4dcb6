"""From exit codes, signals and messages to a verdict."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from qtt_core.ledger.fold import OpenEntry
from qtt_core.plan import Cause, Ending, JobEnd
from qtt_core.results import Epoch, State, StepResult
from qtt_core.steps import METRICS, nonce
from qtt_operator.observe import classify

ENTRY = OpenEntry(
    c="4", frm=1, to=3, attempt=2, decision="h", reserved=1.0, opened_id="1-0", since=0.0
)
TOP1 = METRICS["top1"]


def message(state: State, *epochs: tuple[int, float], **changes: Any) -> str:
    base: dict[str, Any] = {"attempt": 2, "nonce": nonce("h", 2), "state": state}
    rows = tuple(Epoch(epoch=e, value=v, seconds=1.5) for e, v in epochs)
    return StepResult(**(base | {"epochs": rows} | changes)).encode()


def end(code: int | None, text: str = "", *, signal: int | None = None, reason: str = "") -> JobEnd:
    return JobEnd(exit_code=code, signal=signal, message=text, reason=reason)


@pytest.mark.parametrize(
    ("job_end", "kind", "reason"),
    [
        (end(0, message(State.OK, (2, 0.5), (3, 0.6))), Ending.RESULT, "ok"),
        (end(0, message(State.OK, (1, 0.4), (2, 0.5), (3, 0.6))), Ending.RESULT, "ok"),
        (end(0, message(State.DIVERGED, (2, 0.5))), Ending.RESULT, "diverged"),
        (end(0, message(State.DIVERGED)), Ending.RESULT, "diverged"),
        (end(0, message(State.OOM)), Ending.RESULT, "oom"),
        (end(None, message(State.OK, (2, 0.5), (3, 0.6)), signal=9), Ending.RESULT, "ok"),
        (end(0, message(State.OK, (2, 0.5))), Ending.BUG, "badmessage"),
        (end(0, message(State.OK, (2, 0.5), (3, 1.2))), Ending.BUG, "badmessage"),
        (end(0, message(State.OK, (3, 0.5))), Ending.BUG, "badmessage"),
        (end(0, message(State.OK, (2, 0.5), (3, 0.6), (4, 0.7))), Ending.BUG, "badmessage"),
        (end(0, message(State.OK, (2, 0.5), (3, 0.6), nonce="x")), Ending.BUG, "badmessage"),
        (end(0, message(State.OK, (2, 0.5), (3, 0.6), attempt=1)), Ending.BUG, "badmessage"),
        (end(0), Ending.BUG, "badmessage"),
        (end(0, "Traceback (most recent call last): …"), Ending.BUG, "badmessage"),
        (end(64, message(State.INVALID_CONFIG)), Ending.BAD_JOB, "invalid_config"),
        (end(65, message(State.BAD_DATA, reason="no val")), Ending.BAD_DATA, "bad_data"),
        (end(65, message(State.DATASET_CHANGED)), Ending.BAD_DATA, "dataset_changed"),
        (end(70, message(State.INTERNAL)), Ending.BUG, "bug"),
        (end(75, message(State.DISK_FULL)), Ending.INFRA, "disk_full"),
        (end(75, message(State.TIMEOUT)), Ending.INFRA, "timeout"),
        (end(75), Ending.INFRA, "unknown"),
        (end(None, signal=9), Ending.INFRA, "Killed"),
        (end(137), Ending.INFRA, "Killed"),
        (end(137, reason="OOMKilled"), Ending.INFRA, "OOMKilled"),
        (end(143), Ending.INFRA, "preempted"),
        (end(None, reason="RunnerLost"), Ending.INFRA, "RunnerLost"),
        (end(None, signal=9, reason="DeadlineExceeded"), Ending.INFRA, "DeadlineExceeded"),
        (end(1), Ending.BUG, "bug"),
        (end(139), Ending.BUG, "bug"),
        (end(None, signal=11), Ending.BUG, "bug"),
    ],
)
def test_the_meaning_of_an_end(job_end: JobEnd, kind: Ending, reason: str) -> None:
    verdict = classify(job_end, ENTRY, TOP1)

    assert (verdict.kind, verdict.reason) == (kind, reason), verdict.message


def test_a_loss_becomes_a_score_here_and_only_here() -> None:
    text = message(State.OK, (2, 0.7), (3, 0.5))

    verdict = classify(end(0, text), ENTRY, METRICS["log_loss"])

    assert verdict.scores == ((2, math.exp(-0.7), 1.5), (3, math.exp(-0.5), 1.5))


def test_a_message_with_nan_is_refused() -> None:
    raw = json.loads(message(State.OK, (2, 0.5), (3, 0.6)))
    raw["epochs"][1][1] = float("nan")

    verdict = classify(end(0, json.dumps(raw)), ENTRY, TOP1)

    assert (verdict.kind, verdict.reason) == (Ending.BUG, "badmessage")
    assert "NaN" in verdict.message


def test_prepare_without_facts_is_a_bad_message() -> None:
    entry = replace(ENTRY, c="prepare", frm=0, to=1)

    assert classify(end(0, message(State.OK)), entry, TOP1).reason == "badmessage"
    good = classify(end(0, message(State.OK, prepared=FACTS)), entry, TOP1)
    assert good.kind is Ending.PREPARED


def test_the_message_fits_into_a_pods_limit_with_150_epochs() -> None:
    epochs = [(e, 0.123456) for e in range(2, 152)]
    text = message(State.OK, *epochs, reason="x" * 5000, warnings=("w" * 900,) * 9)

    assert len(text.encode()) <= 4096
    parsed = StepResult.parse(text, nonce=nonce("h", 2), attempt=2)
    assert [e.epoch for e in parsed.epochs] == [e for e, _ in epochs]


FACTS: dict[str, Any] = {
    "fingerprint": "f", "n_train": 8, "n_val": 4, "classes": 2, "metafeatures": {"n_train": 8.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, ""),
        ({"fingerprint": ""}, "fingerprint"),
        ({"n_train": None}, "n_train"),
        ({"n_val": 0}, "n_val"),
        ({"classes": "2"}, "classes"),
        ({"metafeatures": None}, "metafeatures"),
        ({"metafeatures": {"n": "many"}}, "metafeatures"),
    ],
)
def test_facts_of_prepare_that_cannot_be_recorded_are_a_bad_message(
    change: dict[str, Any], word: str
) -> None:
    """A trainer of the user's own may send anything; the run must not stop over a KeyError."""
    entry = replace(ENTRY, c="prepare", frm=0, to=1)
    verdict = classify(end(0, message(State.OK, prepared=FACTS | change)), entry, TOP1)

    assert verdict.kind is (Ending.BUG if word else Ending.PREPARED)
    assert word in verdict.message


@pytest.mark.parametrize("cause", list(Cause))
def test_every_word_of_a_back_end_is_known(cause: Cause) -> None:
    assert classify(end(None, reason=cause.value), ENTRY, TOP1).kind is Ending.INFRA

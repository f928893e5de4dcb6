"""The result file and the message: complete, agreeing, small enough, safe for JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtt_core.results import MESSAGE_BYTES, State, StepResult
from qtt_core.steps import METRICS
from qtt_trainer.report import (
    Header,
    Progress,
    cached_result,
    encode_message,
    message_path,
    step_message,
    step_result,
)


def header(**fields: Any) -> Header:
    return Header(
        **{
            "run_uid": "r",
            "step": "c1-f2",
            "config_id": 1,
            "config": {"lr": 0.1},
            "attempt": 2,
            "nonce": "abc",
            **fields,
        }
    )


def row(epoch: int, top1: float) -> dict[str, Any]:
    values = dict.fromkeys(METRICS, 0.5) | {"top1": top1, "log_loss": 2.0 - top1}
    return {"epoch": epoch, **values, "train_loss": 1.0, "lr": 0.1, "seconds": 12.345678}


def test_the_score_is_the_last_epochs_and_the_best_is_named_beside_it() -> None:
    result = step_result(
        header(), state=State.OK, curve=[row(1, 0.8), row(2, 0.9), row(3, 0.7)], fidelity=3
    )

    assert (result["score"], result["best_score"], result["best_epoch"]) == (0.7, 0.9, 2)
    assert result["status"] is True


def test_of_a_loss_the_best_is_the_smallest() -> None:
    curve = [row(1, 0.8), row(2, 0.9), row(3, 0.7)]

    result = step_result(header(metric="log_loss"), state=State.OK, curve=curve, fidelity=3)

    assert result["best_epoch"] == 2
    assert result["score"] == pytest.approx(1.3)


@pytest.mark.parametrize(("metric", "worst"), [("top1", 0.0), ("log_loss", 30.0)])
def test_a_failed_step_has_the_worst_score_and_keeps_its_curve(metric: str, worst: float) -> None:
    result = step_result(header(metric=metric), state=State.DIVERGED, curve=[row(1, 0.8)])

    assert result["score"] == worst
    assert result["status"] is False
    assert len(result["curve"]) == 1
    assert result["retryable"] is False


def test_the_message_tells_the_epochs_behind_the_jobs_start_and_nothing_twice() -> None:
    facts = {
        "checkpoint": {"dir": "c1/f3", "sha256": "f" * 64, "bytes": 10},
        "timing": {
            "startup": 1.0,
            "data": 0.5,
            "train": 3.0,
            "wait": 1.25,
            "eval": 0.2,
            "checkpoint": 0.1,
        },
        "micro_batch": 8,
        "effective_batch": 16,
        "inert": ["sp_reg"],
        "images_per_second": 123.456,
    }
    result = step_result(
        header(), state=State.OK, curve=[row(1, 0.8), row(2, 0.9), row(3, 0.7)], facts=facts
    )

    message = step_message(result, fidelity_from=1)
    parsed = StepResult.parse(message.encode(), nonce="abc", attempt=2)

    assert [e.epoch for e in parsed.epochs] == [2, 3]
    assert parsed.timing == {"load": 1.5, "train": 3.0, "wait": 1.25, "eval": 0.2, "save": 0.1}
    assert parsed.images_per_second == 123.46
    assert (parsed.micro_batch, parsed.effective_batch, parsed.inert) == (8, 16, ("sp_reg",))
    assert parsed.checkpoint_sha256 == "f" * 64


def test_a_message_of_150_epochs_fits() -> None:
    curve = [row(epoch, 0.123456789) for epoch in range(1, 151)]
    result = step_result(header(nonce="f" * 16), state=State.OK, curve=curve)

    text = encode_message(step_message(result, fidelity_from=0))

    assert len(text.encode()) <= MESSAGE_BYTES
    assert len(json.loads(text)["epochs"]) == 150


def test_a_message_that_cannot_fit_becomes_a_bug_with_its_identity() -> None:
    curve = [row(epoch, 0.123456789) for epoch in range(1, 400)]
    result = step_result(header(), state=State.OK, curve=curve)

    parsed = StepResult.parse(
        encode_message(step_message(result, fidelity_from=0)), nonce="abc", attempt=2
    )

    assert parsed.state is State.INTERNAL
    assert "4096" in parsed.reason


def test_a_long_reason_keeps_its_end_where_the_fault_is() -> None:
    result = step_result(header(), state=State.INTERNAL, reason="x" * 5000 + "ZeroDivisionError")

    text = encode_message(step_message(result, fidelity_from=0))

    assert json.loads(text)["reason"].endswith("ZeroDivisionError")
    assert len(text.encode()) <= MESSAGE_BYTES


def test_a_result_told_again_belongs_to_the_new_attempt_and_costs_nothing() -> None:
    stored = step_result(header(), state=State.OK, curve=[row(1, 0.5)], cost=12.0)

    again = cached_result(stored, header(attempt=5, nonce="new"))

    assert (again["attempt"], again["nonce"], again["cached"], again["cost"]) == (5, "new", True, 0)
    assert again["curve"] == stored["curve"]


def test_the_message_goes_where_the_variable_says(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("QTT_TERMINATION_LOG", str(tmp_path / "log"))

    assert message_path() == tmp_path / "log"


def test_progress_reaches_the_pipe_often_and_the_file_seldom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[Any] = []
    progress = Progress(path=tmp_path / "progress.json", channel=sent.append)

    for update in range(50):
        progress.beat({"update": update})
    progress.epoch({"update": 50})

    assert [line["update"] for line in sent] == [0, 50]
    assert json.loads((tmp_path / "progress.json").read_text())["update"] == 50
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["update"] for line in printed] == [0, 50]


def test_progress_that_cannot_be_written_does_not_end_a_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "progress.json"
    blocked.mkdir()

    Progress(path=blocked).epoch({"update": 1})

    assert json.loads(capsys.readouterr().out)["update"] == 1

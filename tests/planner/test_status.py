"""The status: bounded, in the metric's own unit, conditions that keep their times."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from qtt_core import plan as p
from qtt_core.history import ConfigHistory, Standing
from qtt_core.ledger.events import Close, Note, Run
from qtt_core.ledger.fold import LedgerState
from qtt_core.spec import Budget, Dataset, Objective, RunSpec
from qtt_core.steps import Best, Recommendation
from qtt_operator.status import build_status

IDENTITY = p.Identity(
    uid="u", name="birds", seed=7, space_id="native", space_sha="s", spec_hash="h", version="0"
)
RUN = Run(name="birds", spec_hash="h", seed=7, algorithm="QuickTune", version="0", space_hash="s")


def history(config: int, *scores: float) -> ConfigHistory:
    return ConfigHistory(
        config_id=config, config={"model": f"m{config}"}, standing=Standing.PAUSED,
        epochs=tuple(range(1, len(scores) + 1)), scores=scores, seconds=(2.0,) * len(scores),
        checkpoint_epoch=len(scores), ended_at=1_700_000_000.0,
    )  # fmt: skip


def make_status(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "spec": RunSpec(dataset=Dataset(claim_name="d"), budget=Budget(max_steps=9)),
        "identity": IDENTITY,
        "ledger": LedgerState(last_id="3-0", run=RUN, steps=3, charged_seconds=7.6),
        "histories": {1: history(1, 0.5, 0.7), 2: history(2, 0.6)},
        "observed": p.Observed(),
        "phase": p.Phase.RUNNING,
        "held": None,
        "recommendation": None,
        "now": 1_700_000_100.0,
    }
    return build_status(**(base | changes))


def conditions(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}


def test_a_score_on_held_out_images_stands_beside_the_best() -> None:
    best = Recommendation(
        config_id=1, fidelity=2, score=0.69, n_val=9,
        best_observed=Best(config_id=1, fidelity=2, score=0.7),
    )  # fmt: skip
    rows = [{"config_id": 1, "fidelity": 2, "n": 9, "top1": 0.625, "log_loss": 1.5}]
    note = Note(what="evaluation", c="eval-1", new=json.dumps(rows))
    other = Note(what="evaluation", c="eval-2", new=json.dumps([{**rows[0], "fidelity": 1}]))
    ledger = LedgerState(last_id="3-0", run=RUN, notes=(note, other))

    tested = make_status(ledger=ledger, recommendation=best)["best"]
    untested = make_status(recommendation=best)["best"]

    assert tested["testScore"] == "0.6250"
    assert "testScore" not in untested


def test_counters_and_ranking_come_from_the_ledger() -> None:
    status = make_status()

    assert status["consumed"]["steps"] == 3
    assert status["consumed"]["gpuSeconds"] == 8
    assert [row["configID"] for row in status["top"]] == [1, 2]
    assert status["top"][0] == {
        "configID": 1, "model": "m1", "score": "0.7000", "fidelity": 2, "costSeconds": "4.0",
    }  # fmt: skip


def test_a_log_loss_is_shown_as_a_loss() -> None:
    spec = RunSpec(
        dataset=Dataset(claim_name="d"), budget=Budget(max_steps=9),
        objective=Objective(metric="log_loss"),
    )  # fmt: skip
    status = make_status(spec=spec, histories={1: history(1, 0.6065306597)})

    assert status["top"][0]["score"] == "0.5000"


def test_best_is_the_noise_aware_choice_with_the_best_observed_beside_it() -> None:
    best = Recommendation(
        config_id=1, fidelity=2, score=0.65, n_val=9,
        best_observed=Best(config_id=1, fidelity=2, score=0.7),
    )  # fmt: skip
    status = make_status(recommendation=best)

    assert (status["best"]["score"], status["best"]["observedScore"]) == ("0.6500", "0.7000")
    assert status["best"]["checkpoint"] == "c1/f2"


def test_conditions_follow_the_run_and_exclude_each_other() -> None:
    running = make_status()
    assert conditions(running)["Progressing"] == ("True", "StepsRunning")

    closed = LedgerState(run=RUN, closed=Close(id="9-0", reason="GoalReached", msg="done"))
    ended = conditions(make_status(ledger=closed, phase=p.Phase.COMPLETED))
    assert ended["Complete"] == ("True", "GoalReached")
    assert "Failed" not in ended

    bad = LedgerState(run=RUN, closed=Close(id="9-0", reason="BadData", msg="no val"))
    failed = conditions(make_status(ledger=bad, phase=p.Phase.FAILED))
    assert failed["Failed"] == ("True", "BadData")
    assert failed["Accepted"] == ("False", "BadData")


def test_a_conditions_time_moves_only_with_its_status() -> None:
    first = make_status(now=1_700_000_000.0)
    same = make_status(now=1_700_000_500.0, previous=first["conditions"])
    held = make_status(
        now=1_700_000_500.0, previous=first["conditions"], held=("DiskFull", "no space")
    )

    def since(status: dict[str, Any]) -> str:
        found = [c for c in status["conditions"] if c["type"] == "Progressing"]
        return str(found[0]["lastTransitionTime"])

    assert since(same) == since(first)
    assert since(held) != since(first)


def test_the_status_stays_small_however_long_the_run() -> None:
    many = {i: history(i, *([0.5] * 50)) for i in range(2000)}
    status = make_status(histories=many, ledger=LedgerState(run=RUN, steps=100_000))

    assert len(json.dumps(status)) < 8192


def test_the_template_of_the_next_steps_has_a_short_name() -> None:
    spec = RunSpec(dataset=Dataset(claim_name="d"), budget=Budget(max_steps=9))
    other = replace(spec, template={"spec": {"priorityClassName": "low"}})

    assert "templateHash" not in make_status(spec=spec)
    assert len(make_status(spec=other)["templateHash"]) == 12

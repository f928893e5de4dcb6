"""What a person asks for by annotation, as tables: what is opened, what is refused, and once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from qtt_core import plan as p
from qtt_core.ledger.events import Cancel, Close, Done, Note, Open, Prepared, Run
from qtt_core.ledger.fold import LedgerState, OpenEntry, fold
from qtt_core.planner import decide
from qtt_core.results import State, StepResult
from qtt_core.spec import Budget, Dataset, Fidelity, RunSpec

NOW = 1_000_000.0
IDENTITY = p.Identity(
    uid="u1", name="birds", seed=7, space_id="native", space_sha="s", spec_hash="h", version="0"
)
SPEC = RunSpec(
    dataset=Dataset(claim_name="d"), budget=Budget(max_steps=40), fidelity=Fidelity(max=10),
    parallelism=2,
)  # fmt: skip
RUN = Run(name="birds", spec_hash="h", seed=7, algorithm="QuickTune", version="0", space_hash="s")
PREPARED = Prepared(fingerprint="f", n_train=10, n_val=5, classes=2)
OVER = Close(id="5-0", reason="GoalReached")
LEDGER = LedgerState(
    last_id="5-0", run=RUN, prepared=PREPARED, first_time=NOW - 100, steps=9,
    heads={"1": 4, "2": 10, "3": 2},
)  # fmt: skip


def candidate(config_id: int, fidelity: int, score: float, **changes: Any) -> p.Candidate:
    base: dict[str, Any] = {
        "config": {"model": "m"}, "seconds_per_epoch": 2.0, "checkpoint": f"c{config_id}/f1",
    }  # fmt: skip
    return p.Candidate(config_id=config_id, fidelity=fidelity, score=score, **(base | changes))


CANDIDATES = (candidate(2, 10, 0.9), candidate(1, 4, 0.8), candidate(3, 2, 0.7, checkpoint=""))


def actions(
    wishes: p.Wishes,
    *,
    ledger: LedgerState = LEDGER,
    spec: RunSpec = SPEC,
    jobs: tuple[p.ObservedJob, ...] = (),
) -> tuple[p.Action, ...]:
    view = p.OptimizerView(loaded=True, told=ledger.last_id, answered=True, finished="goal")
    return decide(
        p.PlannerInput(
            spec=spec, identity=IDENTITY, ledger=ledger, optimizer=view, now=NOW, wishes=wishes,
            observed=p.Observed(jobs=jobs, synced_at=NOW), candidates=CANDIDATES,
        )
    ).actions  # fmt: skip


def notes(found: tuple[p.Action, ...]) -> list[Note]:
    events = [action.event for action in found if isinstance(action, p.RecordNote)]
    return [event for event in events if isinstance(event, Note)]


def opened(found: tuple[p.Action, ...]) -> list[Open]:
    return [action.event for action in found if isinstance(action, p.OpenStep)]


def refusal(found: tuple[p.Action, ...]) -> str:
    (note,) = notes(found)
    (told,) = [action for action in found if isinstance(action, p.EmitEvent)]
    assert told.warning
    assert json.loads(note.old)["refused"] == told.message
    assert not opened(found)
    return told.message


# --- evaluate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [None, OVER], ids=["a run that goes on", "one that is over"])
def test_an_evaluation_of_kept_checkpoints_is_opened_before_its_token_is_noted(
    closed: Close | None,
) -> None:
    """A crash in between leaves the token new and the decision open: nothing is lost, or twice."""
    ledger = replace(LEDGER, closed=closed)
    found = actions(p.Wishes(evaluate="t1 held-out:cub/2011"), ledger=ledger)

    (event,) = opened(found)
    assert [type(action).__name__ for action in found] == ["OpenStep", "RecordNote"]
    assert (event.c[:5], len(event.c), event.frm, event.to, event.res) == ("eval-", 12, 0, 1, 0.0)
    assert p.Evaluation.from_json(event.why) == p.Evaluation(
        claim="held-out", path="cub/2011", checkpoints=("c2/f1", "c1/f1")
    )
    half = replace(ledger, open={event.c: entry(event)})
    assert [
        type(a).__name__ for a in actions(p.Wishes(evaluate="t1 held-out:cub/2011"), ledger=half)
    ] == ["RecordNote"]


def entry(event: Open, **changes: Any) -> OpenEntry:
    base: dict[str, Any] = {
        "c": event.c, "frm": event.frm, "to": event.to, "attempt": event.a, "decision": event.h,
        "reserved": event.res, "opened_id": "4-0", "since": NOW - 10, "why": event.why,
    }  # fmt: skip
    return OpenEntry(**(base | changes))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("t1 Not_A_Claim", "CLAIM"),
        ("t1 claim:/etc", "inside the claim"),
        ("t1 claim:a/../../b", "inside the claim"),
        ("t1 claim and more", "write <token>"),
    ],
)
def test_a_malformed_evaluation_is_refused_once(value: str, words: str) -> None:
    found = actions(p.Wishes(evaluate=value))

    assert words in refusal(found)
    noted = replace(LEDGER, notes=(replace(notes(found)[0], id="6-0"),))
    assert not notes(actions(p.Wishes(evaluate=value), ledger=noted))


def evaluation() -> Open:
    return opened(actions(p.Wishes(evaluate="t1")))[0]


@pytest.mark.parametrize("stop", [False, True])
def test_the_job_of_an_evaluation_is_made_and_left_alone_though_the_run_is_over(stop: bool) -> None:
    event = evaluation()
    ledger = replace(LEDGER, closed=OVER, open={event.c: entry(event)})
    spec = replace(SPEC, stop=stop)
    (create,) = [
        a for a in actions(p.Wishes(), ledger=ledger, spec=spec) if isinstance(a, p.CreateJob)
    ]
    assert (create.kind, create.c, create.evaluation) == (
        "evaluate", event.c, p.Evaluation(checkpoints=("c2/f1", "c1/f1")),
    )  # fmt: skip

    job = p.ObservedJob(
        name="e", kind="evaluate", c=event.c, to=1, attempt=0, phase=p.JobPhase.PENDING,
        created_at=NOW,
    )  # fmt: skip
    assert [
        type(a).__name__ for a in actions(p.Wishes(), ledger=ledger, spec=spec, jobs=(job,))
    ] == ["Requeue"]


def test_scores_of_an_evaluation_are_noted_and_end_it() -> None:
    event = evaluation()
    ledger = replace(LEDGER, closed=OVER, open={event.c: entry(event)})
    scores = ({"config_id": 2, "fidelity": 10, "n": 5, "top1": 0.6},)
    result = StepResult(attempt=0, nonce="n", state=State.OK, scores=scores)
    found = actions(p.Wishes(), ledger=ledger, jobs=(ended(event, p.Ending.EVALUATED, result),))

    (note,) = notes(found)
    assert (note.what, note.c, json.loads(note.new)) == ("evaluation", event.c, [dict(scores[0])])
    assert any(isinstance(action, p.Forget) for action in found)


def ended(event: Open, kind: p.Ending, result: StepResult | None = None) -> p.ObservedJob:
    return p.ObservedJob(
        name="e", kind="evaluate", c=event.c, to=1, attempt=0, phase=p.JobPhase.ENDED,
        created_at=NOW, end=p.JobEnd(exit_code=0),
        verdict=p.Verdict(kind=kind, reason="bad_data", message="no such folder", result=result),
    )  # fmt: skip


def test_an_evaluation_on_bad_data_is_told_and_does_not_fail_the_run() -> None:
    event = evaluation()
    ledger = replace(LEDGER, open={event.c: entry(event)})
    found = actions(p.Wishes(), ledger=ledger, jobs=(ended(event, p.Ending.BAD_DATA),))

    assert [type(a).__name__ for a in found] == ["Commit", "EmitEvent", "Forget"]


def test_a_cancelled_evaluation_says_nothing_about_the_search() -> None:
    opening = replace(evaluation(), id="6-0")
    cancel = Cancel(id="7-0", c=opening.c, to=1, a=0, reason="bug", retire=True)
    state = fold([opening, cancel], LEDGER)

    assert (state.failed, state.bugs_in_a_row, state.cancelled_in_a_row) == ({}, 0, 0)
    assert not state.open


# --- finetune ------------------------------------------------------------------------------------


def chosen(value: str = "t1 2", ledger: LedgerState = LEDGER) -> LedgerState:
    (note,) = notes(actions(p.Wishes(finetune=value), ledger=ledger))
    return replace(ledger, notes=(replace(note, id="6-0"),), last_id="6-0")


def test_the_best_are_chosen_once_and_opened_to_the_last_epoch() -> None:
    ledger = chosen("t1 3")
    assert json.loads(ledger.notes[0].old) == [1, 3]  # the best one has nothing left to train

    steps = opened(actions(p.Wishes(finetune="t1 3"), ledger=ledger))
    assert [(s.c, s.frm, s.to, s.res) for s in steps] == [("1", 4, 10, 12.0), ("3", 2, 10, 16.0)]
    assert steps[0].why["rule"] == "finetune"


def test_a_run_that_reached_its_goal_goes_on_for_it_and_ends_again() -> None:
    ledger = chosen("t1 2", replace(LEDGER, closed=OVER))
    (reopen,) = actions(p.Wishes(finetune="t1 2"), ledger=ledger)
    assert isinstance(reopen, p.RecordNote)
    assert reopen.event.kind == "reopen"

    going = replace(ledger, closed=None)
    (step,) = opened(actions(p.Wishes(finetune="t1 2"), ledger=going))
    there = fold(
        [
            replace(step, id="7-0"),
            Done(id="8-0", c="1", to=10, a=0, state="ok", epochs=((10, 0.9, 2.0),), dev=12.0),
        ],
        going,
    )
    (close,) = actions(p.Wishes(finetune="t1 2"), ledger=there)
    assert isinstance(close, p.RecordNote)
    assert (close.event.kind, there.heads["1"]) == ("close", 10)


@pytest.mark.parametrize(
    ("value", "budget", "closed", "words"),
    [
        ("t1 2", Budget(max_steps=14), None, "6 steps"),
        ("t1 2", Budget(max_gpu_seconds=11.0), None, "12 device-seconds"),
        ("t1 1", SPEC.budget, None, "nothing to do"),
        ("t1 x", SPEC.budget, None, "how many"),
        ("t1", SPEC.budget, None, "how many"),
        ("t1 2", SPEC.budget, Close(id="5-0", reason="BadData"), "BadData"),
        ("t1 2", SPEC.budget, Close(id="5-0", reason="Stopped"), "Stopped"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_further_is_refused_with_both_figures(
    value: str, budget: Budget, closed: Close | None, words: str
) -> None:
    spec, ledger = replace(SPEC, budget=budget), replace(LEDGER, closed=closed)

    assert words in refusal(actions(p.Wishes(finetune=value), ledger=ledger, spec=spec))

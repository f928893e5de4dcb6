"""Weights before everything: when the planner fetches, waits, gives up and asks a person."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qtt_core import plan as p
from qtt_core.ledger.events import Cancel, Note, Open, Prepared, Retry, Run, WeightsFetched
from qtt_core.ledger.fold import LedgerState, OpenEntry, fold
from qtt_core.planner import decide
from qtt_core.results import State, StepResult
from qtt_core.settle import settle
from qtt_core.spec import Budget, Dataset, Fidelity, RunSpec
from qtt_core.steps import METRICS, nonce
from qtt_operator.observe import classify

NOW = 1_000_000.0
SPEC = RunSpec(
    dataset=Dataset(claim_name="d"), budget=Budget(max_steps=4), fidelity=Fidelity(max=4)
)
RUN = Run(
    id="1-0", name="birds", spec_hash="h", seed=7, algorithm="Random", version="0", space_hash="s"
)
SUPPLY = p.Supply(models=("vit", "dla"), claim="birds-weights", hub="timm24", offline=True)
PREPARED = Prepared(fingerprint="f", n_train=10, n_val=5, classes=2)
UNREACHABLE = "no weights for vit, dla (2 of 2): huggingface.co:443 cannot be reached"


def opening(at: str = "2-0", attempt: int = 0, c: str = "weights") -> Open:
    return Open(id=at, c=c, frm=0, to=1, h="d1", res=0.0, a=attempt)


def planned(
    *events: Any, supply: p.Supply = SUPPLY, jobs: tuple[p.ObservedJob, ...] = (), **changes: Any
) -> p.Plan:
    return decide(
        p.PlannerInput(
            spec=SPEC,
            identity=p.Identity(
                uid="u1", name="birds", seed=7, space_id="native", space_sha="s", spec_hash="h",
                version="0",
            ),
            ledger=fold([RUN, *events]),
            observed=p.Observed(jobs=jobs, synced_at=NOW),
            optimizer=p.OptimizerView(),
            now=NOW,
            supply=supply,
            **changes,
        )
    )  # fmt: skip


def opens(plan: p.Plan) -> list[tuple[str, int]]:
    return [(a.event.c, a.event.a) for a in plan.actions if isinstance(a, p.OpenStep)]


def ended(verdict: p.Verdict) -> p.ObservedJob:
    return p.ObservedJob(
        name="birds-weights-a0", kind="weights", c="weights", to=1, attempt=0,
        phase=p.JobPhase.ENDED, created_at=NOW - 5, end=p.JobEnd(exit_code=0), verdict=verdict,
    )  # fmt: skip


FETCHED = p.Verdict(kind=p.Ending.FETCHED, reason="ok", state=State.OK)


def test_weights_are_fetched_before_the_data_set_is_read() -> None:
    assert opens(planned()) == [("weights", 0)]


def test_the_job_is_created_from_the_open_decision_and_nothing_else_is_opened() -> None:
    plan = planned(opening())

    (job,) = [a for a in plan.actions if isinstance(a, p.CreateJob)]
    assert (job.kind, job.c, job.attempt, job.decision) == ("weights", "weights", 0, "d1")
    assert opens(plan) == []


def test_what_was_fetched_is_recorded_once_then_the_data_set_is_read() -> None:
    plan = planned(opening(), jobs=(ended(FETCHED),))

    (note,) = [a for a in plan.actions if isinstance(a, p.RecordNote)]
    assert note.key == "weights-f1"
    assert note.event == WeightsFetched(claim="birds-weights", models=("vit", "dla"))
    assert opens(planned(opening(), replace(note.event, id="3-0"))) == [("prepare", 0)]


@pytest.mark.parametrize(
    ("events", "supply"),
    [
        ((), p.Supply(offline=True)),
        ((), p.Supply()),
        ((opening(), WeightsFetched(id="3-0", claim="w")), SUPPLY),
    ],
    ids=["nothing to fetch", "one machine", "fetched"],
)
def test_without_models_to_fetch_the_data_set_is_read_at_once(
    events: tuple[Any, ...], supply: p.Supply
) -> None:
    assert opens(planned(*events, supply=supply)) == [("prepare", 0)]


def test_a_run_of_an_older_version_that_is_prepared_fetches_nothing() -> None:
    plan = planned(opening(c="prepare"), replace(PREPARED, id="3-0"))

    assert opens(plan) == []
    assert any(isinstance(action, p.LoadOptimizer) for action in plan.actions)


def given_up() -> Cancel:
    return Cancel(
        id="3-0", c="weights", to=1, a=0, reason="weights_unavailable", msg=UNREACHABLE, retire=True
    )


def test_what_could_not_be_fetched_holds_the_run_with_models_host_and_command() -> None:
    plan = planned(opening(), given_up())

    assert opens(plan) == []
    assert plan.held is not None
    reason, message = plan.held
    assert reason == "WeightsMissing"
    for words in (
        UNREACHABLE,
        "qtt weights fetch --hub timm24 --model vit --model dla --to DIR",
        "qtt data push DIR birds-weights",
        "quicktune.dev/retry",
    ):
        assert words in message
    assert len(message) <= 1024


def test_of_many_models_the_whole_hub_is_fetched() -> None:
    many = replace(SUPPLY, models=tuple(f"m{n}" for n in range(24)))

    held = planned(opening(), given_up(), supply=many).held

    assert held is not None
    assert "--hub timm24 --to DIR" in held[1]


def test_giving_up_counts_as_no_configurations_failure() -> None:
    state = fold([RUN, opening(), given_up()])

    assert (state.failed, state.retired, state.invalid_in_a_row) == ({}, frozenset(), 0)
    assert state.cancelled_in_a_row == 0


def test_a_persons_word_tries_again_with_an_attempt_never_used() -> None:
    token = Note(id="4-0", what="retry", new="t")
    plan = planned(opening(), given_up(), token)

    assert plan.held is None
    assert opens(plan) == [("weights", 1)]


def test_models_that_prepare_does_not_find_hold_a_run_whose_steps_are_offline() -> None:
    lacking = replace(PREPARED, id="3-0", missing_weights=("vit",))
    offline = p.Supply(claim="timm", hub="own", offline=True)

    held = planned(opening(c="prepare"), lacking, supply=offline).held
    here = planned(opening(c="prepare"), lacking, supply=p.Supply()).held

    assert held is not None
    assert "no pretrained weights for vit. " in held[1]
    assert "--hub own --model vit --to DIR; then qtt data push DIR timm" in held[1]
    assert here is None  # on one machine the step fetches them


# --- the end of an attempt ------------------------------------------------------------------------

ENTRY = OpenEntry(
    c="weights", frm=0, to=1, attempt=0, decision="d1", reserved=0.0, opened_id="2-0", since=NOW
)


def verdict_of(state: State, code: int, entry: OpenEntry = ENTRY) -> p.Verdict:
    message = StepResult(
        attempt=entry.attempt, nonce=nonce("d1", entry.attempt), state=state, reason=UNREACHABLE
    ).encode()
    return classify(p.JobEnd(exit_code=code, message=message), entry, METRICS["top1"])


def test_only_a_word_of_success_is_one() -> None:
    assert verdict_of(State.OK, 0).kind is p.Ending.FETCHED
    assert verdict_of(State.DIVERGED, 0).kind is p.Ending.BUG


def test_an_unreachable_hub_is_tried_three_times() -> None:
    state: LedgerState = fold([RUN, opening()])
    reasons = []
    for number in range(3, 9):
        entry = state.open.get("weights")
        if entry is None:
            break
        verdict = verdict_of(State.WEIGHTS_UNAVAILABLE, 75, entry)
        event = settle(entry, verdict, p.JobEnd(exit_code=75), SPEC)
        reasons.append(type(event))
        state = fold([replace(event, id=f"{number}-0")], state)

    assert reasons == [Retry, Retry, Cancel]
    assert state.weights_missing == UNREACHABLE
    assert state.charged_seconds == 0


def test_a_refused_model_is_not_tried_again() -> None:
    verdict = verdict_of(State.WEIGHTS_UNAVAILABLE, 64)

    assert isinstance(settle(ENTRY, verdict, p.JobEnd(exit_code=64), SPEC), Cancel)


def test_the_names_of_many_models_survive_into_the_ledger() -> None:
    verdict = replace(verdict_of(State.WEIGHTS_UNAVAILABLE, 64), message="x" * 850)

    event = settle(ENTRY, verdict, p.JobEnd(exit_code=64), SPEC)

    assert isinstance(event, Cancel)
    assert len(event.msg) == 850

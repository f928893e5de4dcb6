"""The contract of 10-optimizer 5.1, for every algorithm: ask, tell, replay, finish."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace

from qtt_core.errors import OptimizerError
from qtt_core.hub import load_hub
from qtt_core.optimizer import ALGORITHMS, build, explain, replay
from qtt_core.space import SearchSpace, build_space
from qtt_core.steps import (
    BudgetView,
    Observation,
    OptimizerSetup,
    Options,
    Outcome,
    canonical_json,
    event_from_json,
    event_to_json,
)
from qtt_core.testing.curves import ToyTask, answer

HUB = load_hub("timm24")
SMALL = dataclasses.replace(HUB, cards=HUB.cards[-5:])
META = {"n_train": 1000.0, "n_val": 200.0, "num_classes": 10.0}
FAST = Options(pool_size=24)


def make_setup(algorithm="QuickTune", max_fidelity=5, options=FAST, seed=3, **changes):
    return OptimizerSetup(
        **{
            "algorithm": algorithm,
            "space": "native",
            "hub": {"name": "timm24", "cards": [card.to_json() for card in SMALL.cards]},
            "max_fidelity": max_fidelity,
            "step": 1,
            "seed": seed,
            "metafeatures": META,
            "options": options,
        }
        | changes
    )


def make(algorithm="QuickTune", **changes):
    return build(make_setup(algorithm, **changes))


def make_task(max_fidelity=5, seed=0):
    return ToyTask(seed=seed, hub=SMALL, max_fidelity=max_fidelity)


def ok(proposal, score=0.5, seconds=1.0, upto=None):
    stop = upto or proposal.fidelity_to
    count = stop - proposal.fidelity_from
    return Observation(
        config_id=proposal.config_id,
        fidelity=stop,
        outcome=Outcome.OK,
        scores=(score,) * count,
        seconds=(seconds,) * count,
    )


def play(optimizer, task, results, *, workers=1, budget=None, seed=0):
    """Ask, open and tell with workers that end in random order; returns the events."""
    rng = random.Random(seed)
    events, running = [], []
    while results > 0:
        optimizer.retract()
        for proposal in optimizer.ask(workers - len(running), budget):
            optimizer.opened(proposal)
            events.append(proposal)
            running.append(proposal)
        if not running:
            break
        proposal = running.pop(rng.randrange(len(running)))
        event = answer(task, proposal)
        optimizer.tell(event)
        events.append(event)
        results -= 1
    return events


# --- asking -------------------------------------------------------------------------------------


def test_quicktune_asks_for_the_default_first():
    optimizer = make()
    assert optimizer.ask(1)[0].config == build_space("native", SMALL, max_fidelity=5).default()


def test_a_pool_of_one_is_enough():
    cs = ConfigurationSpace()
    cs.add(CategoricalHyperparameter("lr", [0.1]))
    optimizer = ALGORITHMS["QuickTune"](SearchSpace.from_configspace(cs, 4), seed=0)
    while proposals := optimizer.ask(1):
        optimizer.tell(ok(proposals[0]))
    assert optimizer.finished == "exhausted"
    assert optimizer.recommend().config_id == 0


def test_candidates_may_be_given_instead_of_drawn():
    space = build_space("native", SMALL, max_fidelity=5)
    configs = [space.canonical({"lr": lr}) for lr in (1e-5, 1e-4, 1e-3)]
    optimizer = ALGORITHMS["QuickTune"](space, seed=0, hub=SMALL, candidates=configs)
    play(optimizer, make_task(), 40)
    assert len(optimizer.trials.all()) == 3


# --- what ends a search -------------------------------------------------------------------


def test_a_hopeless_gain_ends_the_search():
    task = make_task()
    cheap = make(options=dataclasses.replace(FAST, min_gain_per_gpu_hour=1e-9))
    greedy = make(options=dataclasses.replace(FAST, min_gain_per_gpu_hour=1e9))
    play(cheap, task, 5)
    play(greedy, task, 5)
    assert cheap.finished is None
    assert greedy.finished == "gain"


def test_no_step_is_started_that_cannot_end_in_time():
    optimizer = make(options=dataclasses.replace(FAST, steps_per_job=1))
    for _ in range(3):
        optimizer.tell(ok(optimizer.ask(1)[0], seconds=100.0))
    assert optimizer.ask(1, BudgetView(total_seconds=1000.0, spent_seconds=999.0)) == []
    assert optimizer.finished == "budget"
    assert optimizer.ask(1, BudgetView(total_seconds=1000.0, spent_seconds=300.0))


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_constant_scores_raise_nothing(score):
    optimizer = make()
    for _ in range(25):
        for proposal in optimizer.ask(1):
            optimizer.tell(ok(proposal, score))
    assert optimizer.recommend().score == score


# --- determinism ----------------------------------------------------------------------------------


SCRIPT = """
import json, sys
from qtt_core.optimizer import build, replay
from qtt_core.steps import OptimizerSetup, event_from_json
raw = json.loads(sys.stdin.read())
optimizer = build(OptimizerSetup.from_json(raw["setup"]))
replay(optimizer, map(event_from_json, raw["events"]))
print(json.dumps([p.to_json() for p in optimizer.ask(4)]))
"""


@pytest.mark.parametrize(
    ("algorithm", "external"),
    [("QuickTune", None), ("QuickTunePaper", None), ("External", "optuna-tpe")],
)
def test_replay_in_another_process_with_another_hash_seed_decides_the_same(algorithm, external):
    live = make(algorithm, external=external)
    events = play(live, make_task(), 18, workers=2)
    raw = {
        "setup": make_setup(algorithm, external=external).to_json(),
        "events": [event_to_json(event) for event in events],
    }
    answers = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            input=json.dumps(raw),
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PATH": ""},
            cwd=Path(__file__).parents[2],
        ).stdout
        for seed in ("1", "77")
    ]
    live.retract()
    assert answers[0] == answers[1]
    assert json.loads(answers[0]) == json.loads(
        json.dumps([p.to_json() for p in replay(make(algorithm, external=external), events).ask(4)])
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_cost_awareness_seconds_decide_nothing(algorithm):
    def decisions(factor):
        optimizer = make(algorithm, options=dataclasses.replace(FAST, cost_aware=False))
        rng, found = random.Random(1), []
        for step in range(20):
            budget = BudgetView(total_steps=60, spent_steps=step)
            for proposal in optimizer.ask(1, budget):
                found.append((proposal.config_id, proposal.fidelity_to))
                optimizer.tell(ok(proposal, rng.random(), seconds=factor * (1 + step)))
        return found

    assert decisions(1.0) == decisions(1e-3)


def test_cost_awareness_reacts_to_prices():
    def first_models(expensive):
        optimizer = make(options=Options(pool_size=60))
        used = []
        for _ in range(14):
            proposal = optimizer.ask(1)[0]
            used.append(proposal.config["model"])
            price = 500.0 if proposal.config["model"] == expensive else 1.0
            optimizer.tell(ok(proposal, 0.5, seconds=price))
        return used

    names = [card.name for card in SMALL.cards]
    counts = {name: first_models(name)[3:].count(name) for name in names[:2]}
    base = {name: first_models(None)[3:].count(name) for name in names[:2]}
    assert sum(counts.values()) < sum(base.values()) or sum(counts.values()) <= 2


def test_warming_up_changes_no_answer():
    task = make_task()
    a, b = make(), make()
    events = play(a, task, 17)
    replay(b, events)
    b.warm_up()
    assert a.ask(2) == b.ask(2)


def test_state_travels_as_json():
    live = make()
    play(live, make_task(), 12)
    raw = json.loads(canonical_json(live.state()))
    rebuilt = replay(make(), map(event_from_json, raw["events"]))
    live.retract()
    assert rebuilt.ask(2) == live.ask(2)


# --- answers --------------------------------------------------------------------------------------


def test_a_curve_that_rises_is_not_held_back_by_its_start():
    optimizer = make(max_fidelity=4, options=dataclasses.replace(FAST, steps_per_job=4))
    flat, rising = optimizer.ask(2)
    for proposal, scores in ((flat, (0.80, 0.80, 0.80, 0.80)), (rising, (0.40, 0.60, 0.75, 0.90))):
        optimizer.tell(dataclasses.replace(ok(proposal), scores=scores))
    assert optimizer.recommend().config_id == rising.config_id


def test_the_recommendation_is_not_the_luckiest_epoch():
    optimizer = make(max_fidelity=4, options=dataclasses.replace(FAST, steps_per_job=4))
    lucky, steady = optimizer.ask(2)
    for proposal, scores in ((lucky, (0.1, 0.9, 0.1, 0.1)), (steady, (0.5, 0.6, 0.6, 0.6))):
        optimizer.tell(dataclasses.replace(ok(proposal), scores=scores))
    found = optimizer.recommend()
    assert (found.config_id, found.score) == (steady.config_id, pytest.approx(0.6, abs=0.03))
    assert (found.best_observed.config_id, found.best_observed.score) == (lucky.config_id, 0.9)
    assert found.n_val == 200


@pytest.mark.parametrize("algorithm", ["QuickTune", "ASHA"])
def test_forecasts_cover_the_epochs_to_come(algorithm):
    optimizer = make(algorithm)
    play(optimizer, make_task(), 9)
    trial = next(t for t in optimizer.trials.all() if 0 < t.t < 5)
    forecast = optimizer.forecast(trial.config_id)
    assert forecast.epochs == tuple(range(trial.t + 1, 6))
    assert all(0 <= mean <= 1 for mean in forecast.mean)
    assert all(sd > 0 for sd in forecast.sd)
    assert optimizer.forecast(0).epochs or optimizer.trials.trial(0).t == 5


def test_a_forecast_does_not_depend_on_what_was_asked_before():
    """More epochs to come than there are candidates, and two configurations equally far."""
    optimizer = make(max_fidelity=100)
    for score in (0.3, 0.8):
        optimizer.tell(ok(*optimizer.ask(1), score))
    first, second = (trial.config_id for trial in optimizer.trials.all() if trial.scores)
    asked_first = optimizer.forecast(first)
    assert len(asked_first.epochs) > 64
    fresh = replay(make(max_fidelity=100), map(event_from_json, optimizer.state()["events"]))
    assert optimizer.forecast(second) == fresh.forecast(second)
    assert optimizer.forecast(second).mean != asked_first.mean
    assert fresh.forecast(first) == asked_first


def test_explain_says_why():
    optimizer = make()
    play(optimizer, make_task(), 10)
    text = explain(optimizer.ask(1)[0])
    assert "expected to reach" in text
    assert "% to finish" in text
    assert text.endswith(".")


def test_the_portfolio_says_that_it_has_no_prior():
    optimizer = make("Portfolio")
    optimizer.tell(ok(optimizer.ask(1)[0]))
    assert "without a prior" in optimizer.ask(1)[0].why.rule


def test_reservations_are_finite_and_positive():
    optimizer = make()
    budget = BudgetView(total_seconds=100.0, workers=4)
    for proposal in optimizer.ask(4, budget):
        assert 0 < proposal.expected_seconds <= 2.0
        optimizer.tell(ok(proposal, seconds=3.0))
    assert optimizer.ask(1, budget)[0].expected_seconds > 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": "Magic"}, "use one of QuickTune"),
        ({"algorithm": "External", "external": "nobody"}, "'nobody': .*known here: .*optuna-tpe"),
    ],
)
def test_unknown_algorithms_are_named(changes, words):
    with pytest.raises(OptimizerError, match=words):
        build(make_setup(**changes))


@pytest.mark.parametrize(
    "options",
    [
        {"acquisition": "UCB"},
        {"acquisition": "Thompson"},
        {"acquisition": "Exploit"},
        {"cost_aware": False},
        {"cost_factor": 3.0},
        {"init_random": 0},
        {"init_random": 12},
    ],
    ids=str,
)
def test_every_switch_of_the_paper_s_rule_changes_the_outcome(options):
    def decisions(chosen):
        optimizer = make("QuickTunePaper", options=Options(pool_size=60, **chosen))
        task, found = make_task(seed=2), []
        for _ in range(22):
            proposal = optimizer.ask(1)[0]
            found.append(proposal.config_id)
            optimizer.tell(answer(task, proposal))
        return found

    assert decisions(options) != decisions({})


@pytest.mark.parametrize("options", [{"meta_learning": False}, {"grey_box": False}], ids=str)
def test_every_switch_of_the_default_rule_changes_the_outcome(options):
    def decisions(chosen):
        optimizer = make(options=Options(pool_size=60, **chosen))
        events = play(optimizer, make_task(seed=2), 12)
        return [e.to_json() for e in events if hasattr(e, "fidelity_to")]

    assert decisions(options) != decisions({})

"""What every optimizer must do: one set of tests for ours, for adapters and for your own.

A test module subclasses `OptimizerContract` and says in `make` how to build its optimizer; pytest
then runs every test of this class on it. See docs/optimizers.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np

from qtt_core.errors import ObservationError, UnknownConfigurationError
from qtt_core.hub import Hub, load_hub
from qtt_core.space import SearchSpace, build_space
from qtt_core.steps import (
    Abandon,
    BudgetView,
    Forecast,
    Observation,
    OptimizerEvent,
    Options,
    Outcome,
    Proposal,
    Recommendation,
)
from qtt_core.testing.curves import ToyTask, answer


class AnyOptimizer(Protocol):
    """What a run calls. `qtt_core.optimizer.from_rule` makes all of it from a rule's `choose`."""

    @property
    def finished(self) -> str | None:
        """Why nothing more is asked: goal, gain, exhausted, budget; None = go on."""

    def ask(self, n: int = 1, budget: BudgetView | None = None) -> list[Proposal]:
        """At most n proposals of distinct configurations; [] = nothing useful now."""

    def feed(self, event: OptimizerEvent) -> None:
        """What was recorded: a proposal as opened, a result, a proposal that ended untold."""

    def retract(self) -> None:
        """Forget what was asked for and never recorded; comes before each ask of a run."""

    def warm_up(self) -> None:
        """Time to fit models before the next ask; must not change its answer."""

    def recommend(self) -> Recommendation | None:
        """The incumbent, None before the first score."""

    def forecast(self, config_id: int) -> Forecast:
        """Predicted scores over the epochs to come."""

    def explain(self, proposal: Proposal) -> str:
        """One sentence: why this proposal."""


def small_hub() -> Hub:
    """Three models, the first one the default."""
    cards = [replace(card, default=False) for card in load_hub("timm24").cards[-3:]]
    return Hub(name="small", cards=(replace(cards[0], default=True), *cards[1:]))


def any_space() -> SearchSpace:
    """Numbers, ranks, a condition and a forbidden pair; none of our hyperparameters."""
    from ConfigSpace import (
        Categorical,
        ConfigurationSpace,
        EqualsCondition,
        Float,
        ForbiddenAndConjunction,
        ForbiddenEqualsClause,
        Integer,
    )

    kind, width = Categorical("kind", ["a", "b", "c"]), Integer("width", (4, 64), log=True)
    size = Categorical("size", [1, 2, 4], ordered=True)
    cs = ConfigurationSpace()
    cs.add(kind, width, size, Float("rate", (1e-4, 1.0), log=True))
    cs.add(EqualsCondition(width, kind, "b"))
    pair = ForbiddenEqualsClause(kind, "c"), ForbiddenEqualsClause(size, 4)
    cs.add(ForbiddenAndConjunction(*pair))
    return SearchSpace.from_configspace(cs, max_fidelity=3)


HUB = small_hub()
METAFEATURES = {"n_train": 1000.0, "n_val": 200.0, "num_classes": 10.0}
SMALL = Options(pool_size=8)


def result(proposal: Proposal, score: float = 0.5, outcome: Outcome = Outcome.OK) -> Observation:
    """A result with the same score at every epoch, a second each."""
    count = proposal.fidelity_to - proposal.fidelity_from if outcome is Outcome.OK else 0
    return Observation(
        config_id=proposal.config_id,
        fidelity=proposal.fidelity_to,
        outcome=outcome,
        scores=(score,) * count,
        seconds=(1.0,) * count,
    )


def next_proposals(
    optimizer: AnyOptimizer, n: int = 1, budget: BudgetView | None = None
) -> list[Proposal]:
    """Ask as a run does, and record what was asked."""
    optimizer.retract()
    proposals = optimizer.ask(n, budget)
    for proposal in proposals:
        optimizer.feed(proposal)
    return proposals


def _refused(error: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except error:
        return True
    return False


class OptimizerContract:
    """Subclass it, implement `make`."""

    def make(self, space: SearchSpace, **arguments: Any) -> AnyOptimizer:
        """The optimizer under test. `arguments`: seed, hub, metafeatures, options."""
        raise NotImplementedError

    def build(
        self,
        options: Options = SMALL,
        *,
        max_fidelity: int = 4,
        step: int = 1,
        seed: int = 3,
        overrides: Mapping[str, str] | None = None,
    ) -> AnyOptimizer:
        """An optimizer of a small search."""
        space = self.space(max_fidelity, step, **(overrides or {}))
        return self.make(space, seed=seed, hub=HUB, metafeatures=METAFEATURES, options=options)

    @staticmethod
    @cache
    def space(max_fidelity: int = 4, step: int = 1, **overrides: str) -> SearchSpace:
        """The space that proposals must lie in; making one takes half a second."""
        return build_space("native", HUB, max_fidelity=max_fidelity, step=step, overrides=overrides)

    @staticmethod
    def task(max_fidelity: int = 4) -> ToyTask:
        """What training shows."""
        return ToyTask(seed=0, hub=HUB, max_fidelity=max_fidelity)

    def rebuilt(self, events: Iterable[OptimizerEvent], options: Options = SMALL) -> AnyOptimizer:
        """What a restarted process makes of the record."""
        optimizer = self.build(options)
        for event in events:
            optimizer.feed(event)
        return optimizer

    # --- what is asked ---

    def test_proposals_are_configurations_of_the_space_on_the_grid_of_steps(self) -> None:
        """Canonical, from the epoch that was told last to a multiple of Δ or to T."""
        for max_fidelity, step in ((1, 1), (4, 4), (7, 3)):
            optimizer = self.build(max_fidelity=max_fidelity, step=step)
            space, told = self.space(max_fidelity, step), dict[int, int]()
            for _ in range(8):
                for proposal in next_proposals(optimizer):
                    assert space.canonical(proposal.config) == dict(proposal.config)
                    assert proposal.fidelity_from == told.get(proposal.config_id, 0)
                    assert proposal.fidelity_from < proposal.fidelity_to <= max_fidelity
                    assert proposal.fidelity_to in (max_fidelity, *range(0, max_fidelity, step))
                    assert proposal.expected_seconds >= 0
                    optimizer.feed(result(proposal))
                    told[proposal.config_id] = proposal.fidelity_to

    def test_asking_for_four_is_asking_four_times_for_one(self) -> None:
        """And all four are different configurations, with one id each."""
        one, four = self.build(), self.build()
        for optimizer in (one, four):
            play(optimizer, self.task(), 5)
            optimizer.retract()

        together = four.ask(4)

        assert together == [proposal for _ in range(4) for proposal in one.ask(1)]
        assert len({proposal.config_id for proposal in together}) == len(together)
        assert len({str(proposal.config) for proposal in together}) == len(together)

    def test_a_configuration_is_never_open_twice(self) -> None:
        """Workers that end in any order."""
        optimizer, rng, running = self.build(), np.random.default_rng(0), list[Proposal]()
        for _ in range(20):
            running += next_proposals(optimizer, 3 - len(running))
            ids = [proposal.config_id for proposal in running]
            assert len(ids) == len(set(ids))
            if running:
                optimizer.feed(answer(self.task(), running.pop(rng.integers(len(running)))))

    def test_initial_configurations_come_first_and_in_order(self) -> None:
        """However many workers ask, and over a restart between any two of them."""
        rates = ("1e-3", "1e-5", "1e-2")
        given = tuple({"lr": rate, "drop": "0.3"} for rate in rates)  # as a manifest has them
        options = replace(SMALL, initial_configs=given)
        wanted = [self.space().canonical(config) for config in given]

        assert [p.config for p in next_proposals(self.build(options), 3)] == wanted
        events: list[OptimizerEvent] = []
        for config in wanted:
            (proposal,) = next_proposals(self.rebuilt(events, options))
            assert dict(proposal.config) == config
            events += [proposal, result(proposal)]

    def test_narrowed_choices_and_a_cut_hub_hold_for_every_proposal(self) -> None:
        """`search.overrides`, `search.models` and `search.modelLimits` of a manifest."""
        overrides = {"opt": "sgd,adamw", "drop": "0.2"}
        optimizer = self.build(overrides=overrides)
        for event in play(optimizer, self.task(), 16):
            if isinstance(event, Proposal):
                assert event.config["opt"] in ("sgd", "adamw")
                assert event.config["drop"] == 0.2
                assert event.config["model"] in HUB.names

    def test_nothing_is_asked_beyond_the_budget_and_a_higher_one_goes_on(self) -> None:
        """Steps of open proposals count."""
        optimizer = self.build()
        asked = next_proposals(optimizer, 50, BudgetView(total_steps=7, spent_steps=1, workers=50))
        assert 0 < sum(p.fidelity_to - p.fidelity_from for p in asked) <= 6
        for proposal in asked:
            optimizer.feed(result(proposal))

        assert next_proposals(optimizer, 1, BudgetView(total_steps=7, spent_steps=7)) == []
        assert optimizer.finished == "budget"
        assert next_proposals(optimizer, 1, BudgetView(total_seconds=9.0, spent_seconds=9.0)) == []
        assert optimizer.finished == "budget"
        assert len(next_proposals(optimizer, 1, BudgetView(total_steps=9, spent_steps=7))) == 1
        assert optimizer.finished is None

    def test_an_integer_of_steps_a_job_is_kept_to(self) -> None:
        """But for the last job of a configuration."""
        optimizer = self.build(replace(SMALL, steps_per_job=2), max_fidelity=5)
        for _ in range(6):
            (proposal,) = next_proposals(optimizer)
            assert proposal.fidelity_to in (proposal.fidelity_from + 2, 5)
            optimizer.feed(result(proposal))

    def test_it_does_without_hub_metafeatures_and_options(self) -> None:
        """Nothing but a space, any ConfigSpace, and a seed is required."""
        space = any_space()
        optimizer = self.make(space, seed=0)
        for score in (0.2, 0.7, 0.4):
            for proposal in next_proposals(optimizer, 2):
                assert space.canonical(proposal.config) == dict(proposal.config)
                optimizer.feed(result(proposal, score))
        assert len(next_proposals(optimizer, 2)) == 2

    # --- how it ends ---

    def test_it_ends_when_nothing_is_left_to_train(self) -> None:
        """And not before: having tried everything once is no end."""
        optimizer = self.build(replace(SMALL, patience=100), max_fidelity=2)
        events = play(optimizer, self.task(2), 1000)
        assert any(isinstance(e, Observation) and e.scores and e.fidelity == 2 for e in events)
        assert optimizer.finished == "exhausted"
        assert next_proposals(optimizer) == []

    def test_open_proposals_keep_it_from_being_finished(self) -> None:
        """Their results may open something new."""
        optimizer = self.build(max_fidelity=1)
        running = next_proposals(optimizer, 1000)
        assert running
        assert next_proposals(optimizer) == []
        assert optimizer.finished is None

    def test_a_goal_ends_it(self) -> None:
        """Reached by any single score."""
        optimizer = self.build(replace(SMALL, goal=0.9))
        for score, finished in ((0.89, None), (0.9, "goal")):
            (proposal,) = next_proposals(optimizer)
            optimizer.feed(result(proposal, score))
            assert optimizer.finished == finished
        assert next_proposals(optimizer, 3) == []

    def test_when_everything_fails_it_ends_without_a_recommendation(self) -> None:
        """Whatever the failure."""
        for outcome in (Outcome.DIVERGED, Outcome.OOM, Outcome.INFEASIBLE):
            optimizer = self.build()
            for _ in range(100):
                proposals = next_proposals(optimizer)
                if not proposals:
                    break
                optimizer.feed(result(proposals[0], outcome=outcome))
            assert optimizer.finished == "exhausted"
            assert optimizer.recommend() is None

    def test_a_retired_configuration_is_never_proposed_again(self) -> None:
        """One that was merely abandoned may be."""
        optimizer, retired = self.build(), set[int]()
        for number in range(12):
            for proposal in next_proposals(optimizer):
                assert proposal.config_id not in retired
                retire = number % 2 == 0
                optimizer.feed(Abandon(config_id=proposal.config_id, retire=retire))
                retired |= {proposal.config_id} if retire else set()

    def test_a_model_that_nobody_can_have_is_proposed_no_more(self) -> None:
        """Its weights are gone; another model's configurations go on."""
        optimizer = self.build()
        (first,) = next_proposals(optimizer)
        optimizer.feed(Abandon(config_id=first.config_id, retire=True, model_gone=True))
        later = [e for e in play(optimizer, self.task(), 12) if isinstance(e, Proposal)]
        assert later
        assert first.config["model"] not in {proposal.config["model"] for proposal in later}

    # --- what it rests on ---

    def test_replay_decides_like_the_live_one_after_any_interleaving(self) -> None:
        """Asks that were never recorded, crashes included, leave no trace."""
        options = replace(SMALL, pool_size=20)  # something new is left to be asked at the end
        for seed in (0, 1):
            rng, live, task = np.random.default_rng(seed), self.build(options), self.task()
            events, running = list[OptimizerEvent](), list[Proposal]()
            for number in range(1, 25):
                move = rng.random()
                live.retract()
                wanted = int(rng.integers(1, 3)) if move < 0.6 and len(running) < 4 else 0
                asked = live.ask(wanted) if wanted else []
                recorded: list[OptimizerEvent] = [*asked[: rng.integers(0, 3)]]
                if not asked and running:
                    ended = running.pop(rng.integers(len(running)))
                    lost = Abandon(config_id=ended.config_id, retire=move > 0.96)
                    recorded = [lost if move > 0.92 else answer(task, ended)]
                for event in recorded:
                    live.feed(event)
                    events.append(event)
                    running += [event] if isinstance(event, Proposal) else []
                if number % 8 == 0:
                    self._assert_alike(live, self.rebuilt(events, options))

    @staticmethod
    def _assert_alike(live: AnyOptimizer, replayed: AnyOptimizer) -> None:
        replayed.warm_up()
        live.retract()
        assert replayed.ask(3) == live.ask(3)
        assert replayed.recommend() == live.recommend()
        assert replayed.finished == live.finished

    def test_a_recorded_proposal_is_a_fact_even_if_it_never_made_it(self) -> None:
        """Another version made it, or the fallback did."""
        optimizer, space = self.build(), self.space()
        foreign = Proposal(
            config_id=1000, config=space.canonical({"lr": 5e-3, "smoothing": 0.05}),
            fidelity_from=0, fidelity_to=1, expected_seconds=1.0,
            why=next_proposals(optimizer)[0].why,
        )  # fmt: skip
        optimizer.feed(foreign)
        optimizer.feed(result(foreign, 0.99))

        found = optimizer.recommend()

        assert found is not None
        assert (found.config_id, found.best_observed.score) == (1000, 0.99)
        assert next_proposals(optimizer)

    def test_a_result_that_is_told_twice_counts_once(self) -> None:
        """A restart may repeat the last one."""
        once, twice = self.build(), self.build()
        for optimizer, times in ((once, 1), (twice, 2)):
            for score in (0.3, 0.6):
                (proposal,) = next_proposals(optimizer)
                for _ in range(times):
                    optimizer.feed(result(proposal, score))
        assert once.recommend() == twice.recommend()
        assert once.ask(2) == twice.ask(2)

    def test_results_that_cannot_be_are_refused_and_change_nothing(self) -> None:
        """Unknown id, score out of range, epochs left out, an epoch beyond T."""
        optimizer, untouched = self.build(), self.build()
        (proposal,) = next_proposals(optimizer)
        next_proposals(untouched)
        good = result(proposal)
        gap = replace(good, fidelity=proposal.fidelity_to + 2)
        beyond = replace(good, fidelity=5)
        unknown = replace(good, config_id=99_999)

        assert _refused(UnknownConfigurationError, lambda: optimizer.feed(unknown))
        for score in (1.5, -0.1):
            wrong = replace(good, scores=(score,) * len(good.scores))
            assert _refused(ObservationError, lambda wrong=wrong: optimizer.feed(wrong))  # type: ignore[misc]  # bound early
        for event in (gap, beyond):
            assert _refused(ObservationError, lambda event=event: optimizer.feed(event))  # type: ignore[misc]  # bound early
        assert optimizer.recommend() is None
        assert optimizer.ask(2) == untouched.ask(2)

    def test_no_global_random_state_is_used_or_set(self) -> None:
        """Runs that share a process must not disturb one another."""
        before = random.getstate(), str(np.random.get_state())
        play(self.build(), self.task(), 4)
        assert (random.getstate(), str(np.random.get_state())) == before

        random.seed(1)
        np.random.seed(1)
        first = play(self.build(), self.task(), 4)
        random.seed(2)
        np.random.seed(2)
        assert play(self.build(), self.task(), 4) == first

    # --- what it answers ---

    def test_recommendation_forecast_and_explanation_speak_of_what_was_told(self) -> None:
        """Of a configuration with scores, of the epochs to come, in a sentence."""
        optimizer = self.build(max_fidelity=5)
        assert optimizer.recommend() is None
        events = play(optimizer, self.task(5), 6)
        scores = {
            (event.config_id, event.fidelity - i): score
            for event in events
            if isinstance(event, Observation)
            for i, score in enumerate(reversed(event.scores))
        }
        found = optimizer.recommend()
        assert found is not None
        assert (found.config_id, found.fidelity) in scores
        best = found.best_observed
        assert scores[best.config_id, best.fidelity] == best.score == max(scores.values())

        trained = max(epoch for config_id, epoch in scores if config_id == found.config_id)
        forecast = optimizer.forecast(found.config_id)
        assert forecast.epochs == tuple(range(trained + 1, 6))
        assert len(forecast.mean) == len(forecast.sd) == len(forecast.epochs)
        assert all(0 <= mean <= 1 for mean in forecast.mean)
        assert all(sd > 0 for sd in forecast.sd)
        proposal = next(event for event in events if isinstance(event, Proposal))
        assert optimizer.explain(proposal).endswith(".")


def play(optimizer: AnyOptimizer, task: ToyTask, results: int) -> list[OptimizerEvent]:
    """One worker until so many results are told or nothing is asked; what was recorded."""
    events: list[OptimizerEvent] = []
    for _ in range(results):
        proposals = next_proposals(optimizer)
        for proposal in proposals:
            told = answer(task, proposal)
            optimizer.feed(told)
            events += [proposal, told]
        if not proposals:
            break
    return events

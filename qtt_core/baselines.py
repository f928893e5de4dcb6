"""Rules that choose the next configuration without any model; every benchmark reports them.

Each rule is a small object with `choose`, called by `optimizer.Optimizer`, which owns the book, the
budget and the job length. A rule reads trials and the seed and must not change anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qtt_core.hub import Hub
from qtt_core.pool import generator
from qtt_core.steps import BudgetView, Config
from qtt_core.trials import Trial, Trials, next_rung, rungs

ETA = 3
"""One in ETA is promoted (Li et al., ASHA, arXiv 1810.05934)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A rule's answer: train `config_id` up to `fidelity_to`; the rest explains why.

    `config`: a candidate that the book does not have yet, under the id `trials.next_id`.
    """

    config_id: int
    fidelity_to: int
    rule: str
    config: Config | None = None
    mean: float | None = None
    sd: float | None = None
    p_finish: float | None = None
    rank: int | None = None
    pool: int | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """A rule's answer when nothing is left for it: `exhausted`, `budget` or `gain`."""

    reason: str


def order(trials: Trials, seed: int, tag: str) -> list[Trial]:
    """All candidates in a fixed random order; initial configurations are asked before any rule."""
    every = trials.all()
    shuffled = generator(seed, tag, 0).permutation(len(every))
    return [every[i] for i in shuffled]


@dataclass(frozen=True, slots=True)
class Random:
    """Random search: each configuration is trained to T before the next is begun."""

    seed: int
    defaults_first: bool = False

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | None:
        """A started configuration first, else the next of a fixed random order."""
        trainable = [t for t in order(trials, self.seed, "random") if trials.is_trainable(t)]
        chosen = next((t for t in trainable if t.t > 0), None) or next(iter(trainable), None)
        if chosen is None:
            return None
        return Choice(config_id=chosen.config_id, fidelity_to=trials.max_fidelity, rule="random")


@dataclass(frozen=True, slots=True)
class FreezeThawRandom:
    """Upstream's random baseline: any unfinished configuration, one step."""

    seed: int
    defaults_first: bool = False

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | None:
        """A uniform draw among the trainable, by the number of proposals so far."""
        trainable = trials.trainable()
        if not trainable:
            return None
        rng = generator(self.seed, "freeze-thaw-random", trials.proposal_count)
        chosen = trainable[int(rng.integers(len(trainable)))]
        end = (chosen.t // trials.step + 1) * trials.step
        return Choice(config_id=chosen.config_id, fidelity_to=end, rule="freeze-thaw random")


@dataclass(frozen=True, slots=True)
class SuccessiveHalving:
    """Synchronous successive halving (Jamieson and Talwalkar 2016), bracket after bracket.

    A bracket starts ETA^k configurations, k = rungs - 1; when all of a rung have ended, the best
    third goes on. While its last results are awaited, the next bracket begins.
    """

    seed: int
    defaults_first: bool = False

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | None:
        """The first job that some bracket, oldest first, is ready to run."""
        levels = rungs(trials.max_fidelity, trials.step)
        size = ETA ** (len(levels) - 1)
        candidates = _by_start(trials, order(trials, self.seed, "halving"))
        for start in range(0, len(candidates), size):
            choice = self._in_bracket(trials, candidates[start : start + size], levels)
            if choice is not None:
                return choice
        return None if trials.pending() else best_unfinished(trials)

    def _in_bracket(
        self, trials: Trials, bracket: Sequence[Trial], levels: Sequence[int]
    ) -> Choice | None:
        members = list(bracket)
        for level in levels:
            waiting = [t for t in members if t.t < level and not _is_closed(t)]
            ready = next((t for t in waiting if trials.is_trainable(t)), None)
            if ready is not None:
                return Choice(
                    config_id=ready.config_id,
                    fidelity_to=level,
                    rule=f"successive halving, rung {level}",
                )
            if waiting:
                return None
            members = _best(members, level, max(1, len(members) // ETA))
        return None


@dataclass(frozen=True, slots=True)
class ASHA:
    """Asynchronous successive halving: promote where a third is beaten, else begin the next."""

    seed: int
    defaults_first: bool = False

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | None:
        """A promotion from the highest rung that has one, else a fresh configuration."""
        promoted = promotion(trials)
        if promoted is not None:
            return promoted
        fresh = next(
            (t for t in order(trials, self.seed, "asha") if trials.is_trainable(t) and t.t == 0),
            None,
        )
        if fresh is None:
            return best_unfinished(trials)
        end = rungs(trials.max_fidelity, trials.step)[0]
        return Choice(config_id=fresh.config_id, fidelity_to=end, rule="asha, first rung")


@dataclass(frozen=True, slots=True)
class Portfolio:
    """A fixed order of configurations, each trained to T.

    With a prior the order is its portfolio; without one it is honest about being a guess from the
    model cards: default configurations of the most accurate models first, then the pool.
    """

    seed: int
    hub: Hub | None = None
    ends: Callable[[Sequence[Trial]], Sequence[float]] | None = None
    """What a prior expects configurations to reach; None: there is none."""
    defaults_first: bool = True

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | None:
        """A started configuration first, else the next of the order."""
        trainable = trials.trainable()
        open_ = [t for t in trainable if t.t > 0] or trainable
        if not open_:
            return None
        worth = self._by_card(open_) if self.ends is None else self.ends(open_)
        best = min(zip(worth, open_, strict=True), key=lambda w: (-w[0], w[1].config_id))[1]
        rule = "portfolio without a prior: order by model card"
        if self.ends is not None:
            rule = "portfolio: order by the prior's final scores"
        return Choice(config_id=best.config_id, fidelity_to=trials.max_fidelity, rule=rule)

    def _by_card(self, trials: Sequence[Trial]) -> list[float]:
        cards = self.hub.cards if self.hub is not None else ()
        accuracy = {card.name: card.accuracy or 0.0 for card in cards}
        return [accuracy.get(str(t.config.get("model")), 0.0) for t in trials]


def promotion(trials: Trials, first: int = 1) -> Choice | None:
    """The best configuration in the top third of a rung, not promoted yet; highest rung first.

    Scores are compared at the rung itself. Failed configurations count as beaten.
    """
    levels = rungs(trials.max_fidelity, trials.step, first)
    every = trials.all()
    for level, target in reversed(list(pairwise(levels))):
        reached = [t for t in every if t.t >= level or _is_closed(t)]
        promotable = [
            t
            for t in _best(reached, level, len(reached) // ETA)
            if trials.is_trainable(t) and t.t < target
        ]
        if promotable:
            return Choice(
                config_id=promotable[0].config_id,
                fidelity_to=target,
                rule=f"asha, promoted from rung {level}",
            )
    return None


def best_unfinished(trials: Trials) -> Choice | None:
    """No fresh candidate is left: go on with the best of those that can be trained."""
    started = [t for t in trials.trainable() if t.t > 0]
    if not started:
        return None
    best = min(started, key=lambda t: (-max(t.scores), t.config_id))
    end = next_rung(best.t, trials.max_fidelity, trials.step)
    return Choice(
        config_id=best.config_id,
        fidelity_to=end,
        rule="no fresh candidate left: the best unfinished one",
    )


def _best(trials: Sequence[Trial], level: int, count: int) -> list[Trial]:
    """The `count` highest scores at a rung; ties go to the smaller id."""
    scored = [t for t in trials if t.t >= level]
    return sorted(scored, key=lambda t: (-t.scores[level - 1], t.config_id))[:count]


def _by_start(trials: Trials, candidates: list[Trial]) -> list[Trial]:
    """Started ones in the order of their first proposal, then the rest as they come."""
    rank = {config_id: i for i, config_id in enumerate(trials.started)}
    return sorted(candidates, key=lambda t: rank.get(t.config_id, len(rank)))


def _is_closed(trial: Trial) -> bool:
    return trial.failure is not None or trial.retired

"""The optimizer's contract (10-optimizer 5.1): ask, tell, recommend, replay.

In the path of a step: the worker process feeds recorded events in and asks for proposals; the
planner turns those into jobs. An ask is a pure function of (constructor arguments, events in order,
its own arguments): no clock, no global random state, no memory of asks that were not opened. What
differs between algorithms is one small rule object with `choose`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

from qtt_core import external
from qtt_core.baselines import (
    ASHA,
    Choice,
    FreezeThawRandom,
    Portfolio,
    Random,
    Stop,
    SuccessiveHalving,
)
from qtt_core.beliefs import Beliefs, ColdBeliefs, WarmBeliefs
from qtt_core.catalogue import LEARNERS, PriorRef
from qtt_core.encoding import Encoder, build_encoder
from qtt_core.errors import OptimizerError
from qtt_core.evidence import Evidence
from qtt_core.hub import Hub
from qtt_core.paper_policy import QuickTunePaper
from qtt_core.policy import QuickTuneRule
from qtt_core.pool import draw, generator, initial_candidates
from qtt_core.prior import MetaPrior
from qtt_core.shipped import load_prior
from qtt_core.space import SearchSpace, build_space
from qtt_core.steps import (
    Abandon,
    Best,
    BudgetView,
    Config,
    Forecast,
    Observation,
    OptimizerEvent,
    OptimizerSetup,
    Options,
    Proposal,
    Recommendation,
    Why,
    event_to_json,
)
from qtt_core.trials import (
    Trial,
    Trials,
    averaged,
    best_observed,
    job_end,
    seconds_left,
    steps_left,
)

STATE_VERSION = 1
GUESS_SHARE = 0.02
"""Before anything was measured a reservation is a guess: it may not block the budget."""


class Rule(Protocol):
    """What an algorithm must bring."""

    @property
    def defaults_first(self) -> bool:
        """Whether the space's default configuration is asked before the rule is."""

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | Stop | None:
        """The next configuration and where its job should end; None = nothing useful now."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a rule is built from."""

    space: SearchSpace
    evidence: Evidence
    seed: int
    hub: Hub | None
    options: Options
    fixed_pool: bool


RuleMaker = Callable[[Context], Rule]


class Optimizer:
    """Pool, book, budget and job length around a rule.

    Raises (constructor): SpecError for an initial configuration that the space refuses.
    """

    def __init__(
        self,
        space: SearchSpace,
        make_rule: RuleMaker,
        *,
        seed: int,
        hub: Hub | None = None,
        metafeatures: Mapping[str, float] | None = None,
        prior: MetaPrior | None = None,
        options: Options | None = None,
        candidates: Sequence[Config] | None = None,
    ) -> None:
        self.space, self.seed = space, seed
        self.options = options or Options()
        self.metafeatures = dict(metafeatures or {})
        self.encoder: Encoder = build_encoder(space, hub, self.metafeatures)
        beliefs = self._beliefs(space, hub, prior)
        self.evidence = Evidence(self.encoder, self.metafeatures, beliefs)
        fixed = candidates is not None
        self.rule = make_rule(Context(space, self.evidence, seed, hub, self.options, fixed))
        self.trials = Trials(max_fidelity=space.max_fidelity, step=space.step, options=self.options)
        self._events: list[OptimizerEvent] = []
        self._finished: str | None = None
        self._fill(hub, candidates)

    def _beliefs(self, space: SearchSpace, hub: Hub | None, prior: MetaPrior | None) -> Beliefs:
        learn = self.options.meta_learning
        if prior is not None and learn and set(prior.space.names) & set(space.names):
            return WarmBeliefs(prior=prior.joined(space, hub), metafeatures=self.metafeatures)
        return ColdBeliefs(hub=hub, max_fidelity=self.space.max_fidelity, meta_learning=learn)

    def _fill(self, hub: Hub | None, candidates: Sequence[Config] | None) -> None:
        """Initial configurations, default and draw; `candidates` replaces all but the first."""
        first, named = initial_candidates(self.space, self.options.initial_configs, hub)
        if candidates is not None:
            self._first = named
            self.trials.add([*first[:named], *candidates])
            return
        rng = generator(self.seed, "pool")
        rest = draw(self.space, size=self.options.pool_size, rng=rng, known=first)
        self._first = named + (1 if self.rule.defaults_first and len(first) > named else 0)
        self.trials.add([*first, *rest])

    # --- events ------------------------------------------------------------------------------

    def opened(self, proposal: Proposal) -> None:
        """A proposal was recorded; idempotent. An unknown id brings its configuration."""
        self._events.append(proposal)
        self.trials.open(proposal)

    def tell(self, observation: Observation) -> None:
        """Take over a result; idempotent per (config_id, fidelity).

        Raises: UnknownConfigurationError; ObservationError for a value out of range or order.
        """
        proposal = self.trials.tentative(observation.config_id)
        if self.trials.tell(observation):
            self._events += [observation] if proposal is None else [proposal, observation]
            grow = getattr(self.rule, "grow", None)
            if grow is not None:
                grow(self.trials)

    def abandon(self, config_id: int, *, retire: bool = False, model_gone: bool = False) -> None:
        """Its open proposal ended untold; retire = never propose it again, as in `Abandon`.

        Raises: UnknownConfigurationError.
        """
        event = Abandon(config_id=config_id, retire=retire, model_gone=model_gone)
        proposal = self.trials.tentative(config_id)
        self.trials.abandon(event)
        self._events += [event] if proposal is None else [proposal, event]

    def feed(self, event: OptimizerEvent) -> None:
        """Any one event, in ledger order. Raises: as `tell` and `abandon`."""
        if isinstance(event, Proposal):
            self.opened(event)
        elif isinstance(event, Observation):
            self.tell(event)
        else:
            self.abandon(event.config_id, retire=event.retire, model_gone=event.model_gone)

    def retract(self) -> None:
        """Forget proposals that were asked for and never opened, abandoned or told.

        The worker calls it before each ask: what it answers then rests on recorded events alone.
        """
        self.trials.retract()

    def warm_up(self) -> None:
        """Do the fitting that the next ask would do; never needed, never changes an answer."""
        warm_up = getattr(self.rule, "warm_up", None)
        if warm_up is not None:
            warm_up(self.trials)

    # --- decisions ---------------------------------------------------------------------------

    def ask(self, n: int = 1, budget: BudgetView | None = None) -> list[Proposal]:
        """At most n proposals of distinct configurations, each pending from now on.

        Sequential and greedy: `ask(4)` gives what four times `ask(1)` gives. An empty list means
        nothing useful now; `finished` says whether that is final. Numbers never make it raise.
        """
        budget = budget or BudgetView()
        proposals: list[Proposal] = []
        while len(proposals) < n:
            proposal = self._next(budget)
            if proposal is None:
                break
            self.trials.propose(proposal)
            proposals.append(proposal)
        return proposals

    @property
    def finished(self) -> str | None:
        """Why nothing more is asked: goal, gain, exhausted, budget; None = go on.

        `gain` and `budget` are judged by the newest ask, the others at any time.
        """
        best = best_observed(self.trials.all())
        goal = self.options.goal
        if goal is not None and best is not None and self.trials.native(best.score) >= goal:
            return "goal"
        if not self.trials.pending() and not self.trials.trainable():
            return "exhausted"
        return self._finished

    def recommend(self) -> Recommendation | None:
        """The noise-aware incumbent, None before the first score.

        Ranked by what the model believes each configuration to have reached; without a model by the
        best mean over three epochs in a row, or over as many as there are. `best_observed` beside
        it is the luckiest single epoch.
        """
        best = best_observed(self.trials.all())
        if best is None:
            return None
        standing = getattr(self.rule, "standing", averaged)
        score, config_id, epoch = min(
            (-score, config_id, epoch) for score, config_id, epoch in standing(self.trials)
        )
        n_val = self.metafeatures.get("n_val")
        return Recommendation(
            config_id=config_id,
            fidelity=epoch,
            score=self.trials.native(-score),
            n_val=None if n_val is None else int(n_val),
            best_observed=Best(
                config_id=best.config_id,
                fidelity=best.fidelity,
                score=self.trials.native(best.score),
            ),
        )

    def forecast(self, config_id: int) -> Forecast:
        """Predicted scores over the epochs t+1 … T; without a model the last score stands.

        Raises: UnknownConfigurationError.
        """
        trial = self.trials.trial(config_id)
        epochs = tuple(range(trial.t + 1, self.space.max_fidelity + 1))
        predict = getattr(self.rule, "forecast", None)
        if predict is not None:
            mean, sd = predict(self.trials, trial, epochs)
        else:
            last = trial.scores[-1] if trial.scores else 0.5
            mean, sd = [last] * len(epochs), [0.5 if not trial.scores else 0.1] * len(epochs)
        low, high = self.trials.native(0.0), self.trials.native(1.0)
        return Forecast(
            epochs=epochs,
            mean=tuple(self.trials.native(float(value)) for value in mean),
            sd=tuple(float(value) * (high - low) for value in sd),
        )

    def explain(self, proposal: Proposal) -> str:
        """One sentence: why this proposal."""
        return explain(proposal)

    def state(self) -> dict[str, Any]:
        """A JSON object from which `replay` restores: the events, in order."""
        return {"version": STATE_VERSION, "events": [event_to_json(e) for e in self._events]}

    # --- one choice --------------------------------------------------------------------------

    def _next(self, budget: BudgetView) -> Proposal | None:
        self._finished = None
        if self.finished is not None:
            return None
        left = steps_left(budget)
        if left is not None:
            left -= sum(self._open_steps(trial) for trial in self.trials.pending())
        seconds = seconds_left(budget)
        if (left is not None and left <= 0) or (seconds is not None and seconds <= 0):
            return self._end("budget")
        choice = self._forced() or self.rule.choose(self.trials, budget)
        if choice is None or isinstance(choice, Stop):
            return self._end(choice.reason if choice is not None else None)
        return self._proposal(choice, left, seconds)

    def _end(self, reason: str | None) -> Proposal | None:
        """No proposal; final only when no open job can change that."""
        self._finished = reason if not self.trials.pending() else None
        return None

    def _open_steps(self, trial: Trial) -> int:
        """Steps of an open proposal, a started one counted whole."""
        return -(-((trial.pending_to or trial.t) - trial.t) // self.space.step)

    def _forced(self) -> Choice | None:
        """Initial configurations in order, then the default."""
        for config_id in range(self._first):
            trial = self.trials.trial(config_id)
            if not trial.opened and self.trials.is_trainable(trial):
                wanted = self._first_rung()
                return Choice(config_id=config_id, fidelity_to=wanted, rule="initial configuration")
        return None

    def _first_rung(self) -> int:
        return min(self.space.step, self.space.max_fidelity)

    def _proposal(
        self, choice: Choice, steps: int | None, seconds: float | None
    ) -> Proposal | None:
        trial = (
            self.trials.trial(choice.config_id)
            if choice.config is None
            else Trial(config_id=choice.config_id, config=choice.config)
        )
        costs = self.evidence.costs(self.trials)
        epoch = float(self.evidence.epoch_seconds(self.trials, [trial])[0])
        wanted = choice.fidelity_to
        if seconds is not None and self.options.cost_aware and costs.measured:
            fits = int((seconds - costs.startup_seconds) / max(epoch, 1e-9) / self.space.step)
            wanted = min(wanted, (trial.t // self.space.step + max(1, fits)) * self.space.step)
        end = job_end(
            trial,
            wanted=wanted,
            max_fidelity=self.space.max_fidelity,
            step=self.space.step,
            steps_per_job=self.options.steps_per_job,
            steps_left=steps,
        )
        expected = costs.startup_seconds + epoch * (end - trial.t)
        if seconds is not None and not costs.measured:
            expected = min(expected, GUESS_SHARE * seconds)
        return Proposal(
            config_id=trial.config_id,
            config=dict(trial.config),
            fidelity_from=trial.t,
            fidelity_to=end,
            expected_seconds=expected,
            why=Why(
                rule=choice.rule,
                mean=None if choice.mean is None else self.trials.native(choice.mean),
                sd=choice.sd,
                p_finish=choice.p_finish,
                cost_seconds=expected,
                rank=choice.rank,
                pool=choice.pool,
            ),
        )


def _quicktune(c: Context) -> QuickTuneRule:
    return QuickTuneRule(
        c.space, c.evidence, seed=c.seed, options=c.options, fixed_pool=c.fixed_pool
    )


class QuickTune(Optimizer):
    """The default optimizer, usable with nothing but a space and a seed.

    `prior`: a meta-learned start (`metatrain`, `MetaPrior.load`); without it the search begins with
    cards and rules of thumb. `hub`: model cards of the space's hyperparameter `model`.
    `metafeatures`: descriptors of the data set; `num_classes` gives the chance level, `n_val` the
    noise of a score. Raises: SpecError for an initial configuration that the space refuses.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        hub: Hub | None = None,
        metafeatures: Mapping[str, float] | None = None,
        prior: MetaPrior | None = None,
        options: Options | None = None,
        candidates: Sequence[Config] | None = None,
    ) -> None:
        super().__init__(
            space,
            _quicktune,
            seed=seed,
            hub=hub,
            metafeatures=metafeatures,
            prior=prior,
            options=options,
            candidates=candidates,
        )

    @classmethod
    def replay(
        cls, events: Iterable[OptimizerEvent], space: SearchSpace, **arguments: Any
    ) -> QuickTune:
        """The object that `arguments` and `events` (proposals as opened, observations, abandons)
        make: it decides as the one did that the events come from.
        """
        optimizer = cls(space, **arguments)
        replay(optimizer, events)
        return optimizer


# --- algorithms by name -------------------------------------------------------------------

Builder = Callable[..., Optimizer]


def from_rule(make_rule: RuleMaker) -> Builder:
    """An optimizer around a rule of your own, called like `QuickTune`; see docs/optimizers.md."""
    return partial(Optimizer, make_rule=make_rule)


def _paper(c: Context) -> QuickTunePaper:
    return QuickTunePaper(
        c.evidence,
        seed=c.seed,
        options=c.options,
        max_fidelity=c.space.max_fidelity,
        incumbent="qtt",
    )


def _portfolio(c: Context) -> Portfolio:
    evidence = c.evidence
    if not evidence.beliefs.informed:
        return Portfolio(c.seed, c.hub)
    return Portfolio(c.seed, c.hub, lambda trials: evidence.trend(trials)[:, -1].tolist())


ALGORITHMS: Mapping[str, Builder] = {
    "QuickTune": QuickTune,
    "QuickTunePaper": from_rule(_paper),
    "Random": from_rule(lambda c: Random(c.seed)),
    "FreezeThawRandom": from_rule(lambda c: FreezeThawRandom(c.seed)),
    "SuccessiveHalving": from_rule(lambda c: SuccessiveHalving(c.seed)),
    "ASHA": from_rule(lambda c: ASHA(c.seed)),
    "Portfolio": from_rule(_portfolio),
}
"""Every algorithm a manifest may name, `External` apart."""


def setup_space(setup: OptimizerSetup) -> tuple[SearchSpace, Hub]:
    """The space and hub that a setup describes. Raises: SpecError."""
    hub = Hub.from_json(setup.hub)
    space = build_space(
        setup.space,
        hub,
        max_fidelity=setup.max_fidelity,
        step=setup.step,
        overrides=setup.overrides,
        in_channels=setup.in_channels,
        definition=setup.space_definition,
    )
    return space, hub


def build(setup: OptimizerSetup) -> Optimizer:
    """The optimizer that a setup describes. Raises: SpecError; OptimizerError (unknown name)."""
    space, hub = setup_space(setup)
    prior = setup_prior(setup)
    return _builder(setup)(
        space,
        seed=setup.seed,
        hub=hub,
        metafeatures=setup.metafeatures,
        options=setup.options,
        **({} if prior is None else {"prior": prior}),
    )


def setup_prior(setup: OptimizerSetup) -> MetaPrior | None:
    """The prior that a setup names, None for a cold start. Raises: as `load_prior`."""
    if not setup.prior or setup.algorithm not in LEARNERS:
        return None
    return _loaded(setup.prior, setup.priors)


@lru_cache(maxsize=4)
def _loaded(ref: str, own: str) -> MetaPrior:
    """Immutable, and known by its digest: runs that take turns share it."""
    return load_prior(PriorRef.parse(ref), own)


def replay(optimizer: Optimizer, events: Iterable[OptimizerEvent]) -> Optimizer:
    """Feed recorded events, in order; recorded decisions are facts and never taken again."""
    for event in events:
        optimizer.feed(event)
    return optimizer


def _builder(setup: OptimizerSetup) -> Builder:
    if setup.algorithm in ALGORITHMS:
        return ALGORITHMS[setup.algorithm]
    if setup.algorithm != "External":
        known = ", ".join([*ALGORITHMS, "External"])
        raise OptimizerError(f"algorithm {setup.algorithm!r} is unknown; use one of {known}")
    builder: Builder = external.load(setup.external or "")
    return builder


def explain(proposal: Proposal) -> str:
    """One sentence from a proposal's `why`."""
    why = proposal.why
    epochs = f"epochs {proposal.fidelity_from + 1}-{proposal.fidelity_to}"
    text = f"Configuration {proposal.config_id}, {epochs}: {why.rule}"
    if why.mean is not None and why.sd is not None:
        text += f"; expected to reach {why.mean:.3f} ± {why.sd:.3f}"
    if why.p_finish is not None:
        text += f", {100 * why.p_finish:.0f} % to finish"
    if why.cost_seconds is not None and math.isfinite(why.cost_seconds):
        text += f", about {why.cost_seconds:.1f} s"
    if why.rank is not None and why.pool is not None:
        text += f"; rank {why.rank} of {why.pool}"
    return f"{text}."

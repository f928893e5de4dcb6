"""Optuna's samplers as optimizers (extra `optuna`): they say what to try next, ASHA how far.

A study is made anew for each suggestion, from the book and a sampler with a seed of its own: what
is suggested depends on recorded events alone, and replay costs nothing. Samplers that learn from
the values of trials work (`TPESampler`, `GPSampler`, `RandomSampler`); those that keep their state
in a study (`CmaEsSampler`, `QMCSampler`, the genetic ones) would begin again each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from qtt_core.baselines import Choice, Stop, best_unfinished, promotion
from qtt_core.errors import SpecError
from qtt_core.hyperparameters import choices
from qtt_core.optimizer import Builder, Context, Optimizer, from_rule
from qtt_core.pool import generator, key
from qtt_core.space import SearchSpace
from qtt_core.steps import BudgetView, Config, Scalar
from qtt_core.trials import Trial, Trials, rungs
from qtt_core.values import plain

if TYPE_CHECKING:
    from ConfigSpace.hyperparameters import Hyperparameter

TRIES = 8
"""Suggestions, forbidden or known ones included, before a random candidate is taken."""


def tpe(space: SearchSpace, **arguments: Any) -> Optimizer:
    """Optuna's tree-structured Parzen estimator with its defaults; entry point `optuna-tpe`."""
    return from_sampler(lambda seed: TPESampler(seed=seed))(space, **arguments)


def gp(space: SearchSpace, **arguments: Any) -> Optimizer:
    """Optuna's Gaussian process with its defaults; entry point `optuna-gp`.

    What is active in some configurations only is drawn at random; seconds an ask, not milliseconds.
    """
    return from_sampler(lambda seed: GPSampler(seed=seed, warn_independent_sampling=False))(
        space, **arguments
    )


def from_sampler(make_sampler: Callable[[int], BaseSampler]) -> Builder:
    """Any sampler as an optimizer; `make_sampler`: seed -> sampler."""
    return from_rule(lambda context: OptunaRule(context, make_sampler))


class OptunaRule:
    """At most `pool_size` configurations are started; a third of each rung goes on."""

    defaults_first = False

    def __init__(self, context: Context, make_sampler: Callable[[int], BaseSampler]) -> None:
        self._space, self._seed = context.space, context.seed
        self._most = context.options.pool_size
        self._make_sampler = make_sampler
        every = {name: _distribution(hp) for name, hp in context.space.configspace.items()}
        self._distributions = {name: d for name, d in every.items() if not d.single()}

    def choose(self, trials: Trials, budget: BudgetView) -> Choice | Stop:
        """A promotion where one is due, else a new configuration, else the best unfinished."""
        return (
            promotion(trials)
            or (self._fresh(trials) if len(trials.started) < self._most else None)
            or best_unfinished(trials)
            or Stop("exhausted")
        )

    def _fresh(self, trials: Trials) -> Choice | None:
        """What the sampler suggests, the next of the pool where nothing of it can be had."""
        known = {key(trial.config): trial for trial in trials.all()}
        chosen, rule = None, "suggested by Optuna"
        for config in self._suggested(trials):
            found = known.get(key(config)) or Trial(config_id=trials.next_id, config=config)
            if _is_fresh(trials, found):
                chosen = found
                break
        else:
            chosen = next((trial for trial in trials.all() if _is_fresh(trials, trial)), None)
            rule = "the next of the pool: Optuna repeats itself"
        if chosen is None:
            return None
        return Choice(
            config_id=chosen.config_id,
            config=chosen.config if chosen.config_id == trials.next_id else None,
            fidelity_to=rungs(trials.max_fidelity, trials.step)[0],
            rule=rule,
        )

    def _suggested(self, trials: Trials) -> Iterator[Config]:
        """A few suggestions; forbidden combinations are left out."""
        with _quiet():
            study = self._study(trials)
            for _ in range(TRIES):
                with suppress(SpecError):
                    yield self._space.compose(_Suggestion(study.ask(), self._distributions))

    def _study(self, trials: Trials) -> optuna.Study:
        seed = generator(self._seed, "optuna", trials.proposal_count).integers(2**31)
        study = optuna.create_study(
            study_name="search", direction="maximize", sampler=self._make_sampler(int(seed))
        )
        told = (self._told(trials.trial(config_id)) for config_id in trials.started)
        study.add_trials([trial for trial in told if trial is not None])
        return study

    def _told(self, trial: Trial) -> FrozenTrial | None:
        """A configuration as Optuna's: its best score so far, the worst one if it failed."""
        if trial.failure is None and not trial.scores and trial.pending_to is None:
            return None  # its job ended untold
        active = [name for name in trial.config if name in self._distributions]
        distributions = {name: self._distributions[name] for name in active}
        params = {name: self._encoded(name, trial.config[name]) for name in active}
        if trial.failure is None and not trial.scores:
            return create_trial(
                state=TrialState.RUNNING, params=params, distributions=distributions
            )
        value = 0.0 if trial.failure is not None else max(trial.scores)
        return create_trial(value=value, params=params, distributions=distributions)

    def _encoded(self, name: str, value: Scalar) -> Any:
        """Ordinals are known to Optuna by their rank."""
        hp = self._space.configspace[name]
        return (choices(hp) or ()).index(value) if hasattr(hp, "sequence") else value


class _Suggestion:
    """A trial of Optuna that answers for ConfigSpace's hyperparameters."""

    def __init__(self, trial: optuna.Trial, distributions: dict[str, BaseDistribution]) -> None:
        self._trial, self._distributions = trial, distributions

    def __call__(self, hp: Hyperparameter[Any, Any]) -> Scalar:
        legal, wanted = choices(hp), self._distributions.get(hp.name)
        match wanted:
            case None:
                return legal[0] if legal else plain(hp.default_value)  # type: ignore[return-value]  # a scalar
            case CategoricalDistribution():
                return self._trial.suggest_categorical(hp.name, wanted.choices)
            case FloatDistribution():
                return self._trial.suggest_float(hp.name, wanted.low, wanted.high, log=wanted.log)
            case IntDistribution():
                found = self._trial.suggest_int(hp.name, wanted.low, wanted.high, log=wanted.log)
                return legal[found] if legal else found
        raise TypeError(f"{hp.name}: {wanted!r} is no distribution of ours")


def _distribution(hp: Hyperparameter[Any, Any]) -> BaseDistribution:
    legal = choices(hp)
    if legal is None:
        low, high = hp.lower, hp.upper  # type: ignore[attr-defined]  # numeric
        log = bool(getattr(hp, "log", False))
        if isinstance(plain(low), int):
            return IntDistribution(int(low), int(high), log=log)
        return FloatDistribution(float(low), float(high), log=log)
    if hasattr(hp, "sequence"):
        return IntDistribution(0, len(legal) - 1)
    return CategoricalDistribution(legal)


def _is_fresh(trials: Trials, trial: Trial) -> bool:
    return trial.t == 0 and trials.is_trainable(trial)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every new study; ours lives for one suggestion."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)

"""The book of one search: every candidate, its curve, and what is pending.

Sits between the ledger and the optimizers: events (proposals as opened, observations, abandons) go
in, in ledger order, and are validated here; baselines and Quick-Tune read the trials and decide.
Decides nothing itself, draws no random number, reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qtt_core.errors import ObservationError, UnknownConfigurationError
from qtt_core.steps import (
    MAX_JOB_EPOCHS,
    Abandon,
    Best,
    BudgetView,
    Config,
    Observation,
    Options,
    Outcome,
    Proposal,
)

RUNGS = (1, 3, 9, 27)
"""Epochs after which a configuration is compared with the others; the last rung is always T."""

SMOOTHING_EPOCHS = 3
"""Epochs that the noise-aware incumbent averages over (10-optimizer 5.7)."""


@dataclass(slots=True, kw_only=True)
class Trial:
    """One candidate. `scores` and `seconds` hold epochs 1..t, scores scaled to [0, 1]."""

    config_id: int
    config: Config
    scores: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    pending_to: int | None = None
    failure: Outcome | None = None
    failed_at: int = 0
    retired: bool = False
    gpu: str = ""

    @property
    def t(self) -> int:
        """Epochs trained and told."""
        return len(self.scores)

    @property
    def opened(self) -> bool:
        """Whether anything was ever started on it."""
        return bool(self.scores) or self.pending_to is not None or self.failure is not None


@dataclass(frozen=True, slots=True)
class Told:
    """What one observation added: the epochs `start`+1..`stop` of a trial, or its failure."""

    config_id: int
    start: int
    stop: int
    outcome: Outcome


class Trials:
    """All candidates by id, and the ordered list of what was told.

    A proposal is *tentative* from ask until it is opened or told; `retract` forgets the tentative
    ones, so that a later ask depends on recorded events alone.
    """

    def __init__(self, *, max_fidelity: int, step: int, options: Options) -> None:
        self.max_fidelity = max_fidelity
        self.step = step
        self.options = options
        self.told: list[Told] = []
        self.overheads: list[float] = []
        self.opened_count = 0
        self._started: list[int] = []
        self._recorded: set[int] = set()
        self._added: set[int] = set()
        """Candidates that a proposal brought."""
        self._trials: dict[int, Trial] = {}
        self._tentative: dict[int, Proposal] = {}
        self._gone: set[object] = set()
        """Models whose weights nobody can have: only what has a checkpoint goes on."""

    # --- candidates --------------------------------------------------------------------------

    def add(self, configs: Iterable[Config]) -> None:
        """Append candidates; ids count up from the highest known one."""
        for config_id, config in enumerate(configs, start=self.next_id):
            self._trials[config_id] = Trial(config_id=config_id, config=config)

    @property
    def next_id(self) -> int:
        """The id of a candidate that is added now."""
        return max(self._trials, default=-1) + 1

    def trial(self, config_id: int) -> Trial:
        """One candidate. Raises: UnknownConfigurationError."""
        if config_id not in self._trials:
            raise UnknownConfigurationError(
                f"configuration {config_id} is unknown; "
                f"known ids are 0..{max(self._trials, default=-1)}"
            )
        return self._trials[config_id]

    def all(self) -> list[Trial]:
        """Every candidate, by id."""
        return [self._trials[config_id] for config_id in sorted(self._trials)]

    def pending(self) -> list[Trial]:
        """Candidates with an open or tentative proposal, by id."""
        return [trial for trial in self.all() if trial.pending_to is not None]

    def is_trainable(self, trial: Trial) -> bool:
        """Not pending, not closed, not retired, not at T; a new one's model can be had."""
        return (
            trial.pending_to is None
            and trial.failure is None
            and not trial.retired
            and (trial.t > 0 or trial.config.get("model") not in self._gone)
            and trial.t < self.max_fidelity
        )

    def trainable(self) -> list[Trial]:
        """Candidates that a proposal may name, by id."""
        return [trial for trial in self.all() if self.is_trainable(trial)]

    @property
    def started(self) -> list[int]:
        """Ids in the order of their first proposal."""
        return list(self._started)

    @property
    def proposal_count(self) -> int:
        """Proposals so far, the tentative ones included: the counter of random draws."""
        return self.opened_count + len(self._tentative)

    # --- events ------------------------------------------------------------------------------

    def propose(self, proposal: Proposal) -> None:
        """Mark a proposal as asked for, not yet opened; a new candidate stays if it is opened."""
        if proposal.config_id not in self._trials:
            self.add([proposal.config])
            self._added.add(proposal.config_id)
        self._tentative[proposal.config_id] = proposal
        if proposal.config_id not in self._started:
            self._started.append(proposal.config_id)
        self.trial(proposal.config_id).pending_to = proposal.fidelity_to

    def tentative(self, config_id: int) -> Proposal | None:
        """The proposal of a configuration that was asked for and not recorded yet."""
        return self._tentative.get(config_id)

    def retract(self) -> None:
        """Forget the proposals that were asked for and never opened or told."""
        for config_id in self._tentative:
            self._trials[config_id].pending_to = None
            if config_id not in self._recorded:
                self._started.remove(config_id)
                if config_id in self._added:
                    del self._trials[config_id]
        self._tentative.clear()

    def open(self, proposal: Proposal) -> None:
        """A proposal was recorded. A fact: an unknown id is taken over with its configuration."""
        trial = self._trials.get(proposal.config_id)
        if trial is None or (trial.config != proposal.config and not trial.opened):
            trial = Trial(config_id=proposal.config_id, config=dict(proposal.config))
            self._trials[proposal.config_id] = trial
        repeated = (
            trial.pending_to == proposal.fidelity_to and proposal.config_id not in self._tentative
        )
        self._tentative.pop(proposal.config_id, None)
        if repeated or proposal.fidelity_to <= trial.t or trial.failure is not None:
            return
        trial.pending_to = proposal.fidelity_to
        self._count(trial)

    def abandon(self, event: Abandon) -> None:
        """The open proposal of a configuration ended untold. Raises: UnknownConfigurationError."""
        trial = self.trial(event.config_id)
        self._confirm(trial)
        trial.pending_to = None
        trial.retired = trial.retired or event.retire
        if event.model_gone:
            self._gone.add(trial.config.get("model"))

    def tell(self, observation: Observation) -> bool:
        """Take a result over; False if all of it was known already.

        Raises: UnknownConfigurationError; ObservationError if a field is out of range or order.
        """
        trial = self.trial(observation.config_id)
        if trial.config_id not in self._started:
            raise UnknownConfigurationError(
                f"configuration {trial.config_id} was never proposed; tell only what was"
            )
        if trial.failure is not None and observation.fidelity <= trial.failed_at:
            return False
        scores = self._checked(trial, observation)
        if observation.outcome is Outcome.OK and observation.fidelity <= trial.t:
            return False
        self._confirm(trial)
        self._append(trial, observation, scores)
        return True

    def _confirm(self, trial: Trial) -> None:
        if self._tentative.pop(trial.config_id, None) is not None:
            self._count(trial)

    def _count(self, trial: Trial) -> None:
        self.opened_count += 1
        if trial.config_id not in self._started:
            self._started.append(trial.config_id)
        self._recorded.add(trial.config_id)

    def _append(self, trial: Trial, observation: Observation, scores: Sequence[float]) -> None:
        ok = observation.outcome is Outcome.OK
        start = trial.t
        known = max(0, trial.t - observation.fidelity + len(scores)) if ok else 0
        trial.scores.extend(scores[known:])
        trial.seconds.extend(observation.seconds[known:])
        trial.gpu = observation.gpu or trial.gpu
        if not ok:
            trial.failure, trial.failed_at = observation.outcome, observation.fidelity
        if not ok or (trial.pending_to is not None and trial.t >= trial.pending_to):
            trial.pending_to = None
        if observation.overhead_seconds > 0:
            self.overheads.append(observation.overhead_seconds)
        self.told.append(
            Told(trial.config_id, start, trial.t, observation.outcome),
        )

    def _checked(self, trial: Trial, observation: Observation) -> tuple[float, ...]:
        """The scores scaled to [0, 1]; raises ObservationError with field, value and remedy."""
        who = f"configuration {trial.config_id}"
        if not 1 <= observation.fidelity <= self.max_fidelity:
            raise ObservationError(
                f"{who}: fidelity {observation.fidelity}; use 1..{self.max_fidelity}"
            )
        if trial.failure is not None:
            raise ObservationError(
                f"{who}: fidelity {observation.fidelity} told after it was closed as "
                f"{trial.failure} at {trial.failed_at}"
            )
        self._check_order(who, trial, observation)
        for name, value in (("overhead_seconds", observation.overhead_seconds),):
            if not math.isfinite(value) or value < 0:
                raise ObservationError(f"{who}: {name} is {value!r}; use a finite number >= 0")
        return tuple(self._unit(who, score) for score in observation.scores)

    def _check_order(self, who: str, trial: Trial, observation: Observation) -> None:
        count, fidelity = len(observation.scores), observation.fidelity
        if observation.outcome is Outcome.OK:
            if count == 0:
                raise ObservationError(f"{who}: outcome ok without scores; tell one per epoch")
            if not 0 <= fidelity - count <= trial.t:
                raise ObservationError(
                    f"{who}: scores of epochs {fidelity - count + 1}..{fidelity} told after epoch "
                    f"{trial.t}; epochs must follow one another"
                )
        elif observation.outcome is Outcome.DIVERGED:
            if fidelity <= trial.t + count:
                raise ObservationError(
                    f"{who}: diverged at epoch {fidelity}, but epochs up to {trial.t + count} are "
                    "finite; fidelity is the epoch that failed"
                )
        elif count:
            raise ObservationError(f"{who}: outcome {observation.outcome} carries {count} scores")

    def _unit(self, who: str, score: float) -> float:
        low, high = self.options.score_range or (0.0, 1.0)
        if not low <= score <= high:
            raise ObservationError(
                f"{who}: score {score!r} outside [{low}, {high}]; set score_range or convert it"
            )
        return (score - low) / (high - low)

    def native(self, score: float) -> float:
        """A score in [0, 1] back in the range it was told in."""
        low, high = self.options.score_range or (0.0, 1.0)
        return low + score * (high - low)


# --- pure questions about trials -----------------------------------------------------------------


def rungs(max_fidelity: int, step: int, first: int = 1) -> tuple[int, ...]:
    """{1, 3, 9, 27, T} from `first` on, rounded up to multiples of Δ; the last one is T."""
    wanted = [rung for rung in RUNGS if first <= rung < max_fidelity]
    rounded = {min(max_fidelity, -(-rung // step) * step) for rung in wanted}
    return (*sorted(rounded - {max_fidelity}), max_fidelity)


def next_rung(t: int, max_fidelity: int, step: int, first: int = 1) -> int:
    """The first rung above t."""
    return next(rung for rung in rungs(max_fidelity, step, first) if rung > t)


def job_end(
    trial: Trial,
    *,
    wanted: int,
    max_fidelity: int,
    step: int,
    steps_per_job: int | None = None,
    steps_left: int | None = None,
) -> int:
    """Where a job ends: `wanted`, or t + m steps, bounded by T, by steps left and by 150 epochs.

    Steps lie on the grid of multiples of Δ; a curve that was cut between two of them finishes its
    step first.
    """
    done = trial.t // step
    end = wanted if steps_per_job is None else (done + steps_per_job) * step
    if steps_left is not None:
        end = min(end, (done + steps_left) * step)
    if end - trial.t > MAX_JOB_EPOCHS:
        end = max((trial.t + MAX_JOB_EPOCHS) // step * step, trial.t + 1)
    return min(max(end, trial.t + 1), max_fidelity)


def steps_left(budget: BudgetView) -> int | None:
    """Steps that may still be opened; None = not limited."""
    return None if budget.total_steps is None else max(0, budget.total_steps - budget.spent_steps)


def seconds_left(budget: BudgetView) -> float | None:
    """Seconds that may still be spent; None = not limited."""
    if budget.total_seconds is None:
        return None
    return max(0.0, budget.total_seconds - budget.spent_seconds)


def smoothed(scores: Sequence[float], width: int = SMOOTHING_EPOCHS) -> tuple[int, float]:
    """(epoch, score) of the best stretch: the highest mean over `width` epochs in a row.

    The epoch is the one of the stretch whose score is nearest to that mean, the latest of equals.
    Fewer epochs than `width` are averaged as they are. Averages do not reward the luckiest epoch.
    """
    width = min(width, len(scores))
    means = [sum(scores[i : i + width]) / width for i in range(len(scores) - width + 1)]
    start = max(range(len(means)), key=lambda i: (means[i], i))
    offset = min(range(width), key=lambda k: (abs(scores[start + k] - means[start]), -k))
    return start + offset + 1, means[start]


def averaged(trials: Trials) -> list[tuple[float, int, int]]:
    """(smoothed score, configuration, epoch) of every configuration with a score."""
    return [
        (score, trial.config_id, epoch)
        for trial in trials.all()
        if trial.scores
        for epoch, score in [smoothed(trial.scores)]
    ]


def is_stagnating(trial: Trial, patience: int, tolerance: float) -> bool:
    """Whether the best score has not risen by `tolerance` for `patience` epochs.

    Compared with its own best so far, not with a buffer of zeros (10-optimizer 11, defect 6).
    """
    if trial.t <= patience:
        return False
    return max(trial.scores) < max(trial.scores[:-patience]) + tolerance


def best_observed(trials: Iterable[Trial]) -> Best | None:
    """The highest single score; of equals the lower id, then the earlier epoch."""
    points = [
        (-score, trial.config_id, epoch)
        for trial in trials
        for epoch, score in enumerate(trial.scores, start=1)
    ]
    if not points:
        return None
    score, config_id, epoch = min(points)
    return Best(config_id=config_id, fidelity=epoch, score=-score)

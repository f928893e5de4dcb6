"""Priors that come with the project, and what one says of a table of runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qtt_core.catalogue import FIELD, PREFIX, SHIPPED, STAND_INS, PriorRef, card_sha, shipped_names
from qtt_core.errors import Fault, OptimizerError, SpecError
from qtt_core.layouts import read_runs
from qtt_core.prior import MetaPrior
from qtt_core.surrogate import squash_of

OTHER_MACHINE_SD = 2.0
"""Of the log of seconds: another device, another machine; one result then moves the level."""


def shipped(name: str) -> MetaPrior:
    """The prior of that name, with or without `mtlbm/` before it.

    `mini` and `extended` are answered by `micro` until they have meta-data of their own
    (`catalogue.STAND_INS`). Raises: SpecError for an unknown name.
    """
    plain = name.removeprefix(PREFIX)
    known = STAND_INS.get(plain, plain)
    if known not in shipped_names():
        names = ", ".join((*shipped_names(), *STAND_INS))
        raise SpecError([Fault("prior", name, f"is not shipped; choose one of {names}")])
    return MetaPrior.load(SHIPPED / known)


def load_prior(ref: PriorRef, own: str | Path = "") -> MetaPrior:
    """What a run has chosen; `own`: the folder of own priors.

    A shipped prior's seconds were measured on machines unlike this one, and it knows that. Raises:
    SpecError if it is gone or damaged; OptimizerError if it is another one than was chosen.
    """
    try:
        found = MetaPrior.load(ref.folder(own))
    except SpecError as error:
        words = "; ".join(f"{f.value}: {f.expected}" for f in error.faults)
        raise SpecError([Fault(FIELD, ref.name, words)]) from error
    if card_sha(ref.folder(own)) != ref.sha:
        raise OptimizerError(f"prior {ref.name} was replaced while it was being loaded; try again")
    if ref.own:
        return found
    return replace(found, pace=replace(found.pace, sd=max(found.pace.sd, OTHER_MACHINE_SD)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunForecast:
    """What is believed of one row of a table before it ran."""

    run: str
    dataset: str
    score: float
    """Top-1 accuracy after all epochs, in [0, 1]."""
    seconds: float
    """Training and evaluation of one epoch."""
    finish: float
    """Chance that it trains to the end."""


def predict_runs(path: Path, prior: MetaPrior | None = None) -> list[RunForecast]:
    """A forecast for every row of a CSV in the layout of `layouts.from_runs_csv`, in its order.

    Only the columns that describe a configuration and its data set are read. `prior`: the shipped
    `micro` if none is given. Raises: OSError; SpecError for a file of another layout.
    """
    prior = prior or shipped("micro")
    runs = read_runs(path)
    forecasts: dict[int, RunForecast] = {}
    for dataset in dict.fromkeys(one.dataset for one in runs):
        at = [i for i, one in enumerate(runs) if one.dataset == dataset]
        features = runs[at[0]].metafeatures
        configs = [runs[i].config for i in at]
        score = squash_of(features).to_score(prior.trend(configs, features)[:, -1])
        seconds = np.exp(prior.log_seconds(configs, features))
        finish = prior.finish(configs, features)
        for k, i in enumerate(at):
            forecasts[i] = RunForecast(
                run=runs[i].run, dataset=dataset, score=float(score[k]),
                seconds=float(seconds[k]), finish=float(finish[k]),
            )  # fmt: skip
    return [forecasts[i] for i in range(len(runs))]

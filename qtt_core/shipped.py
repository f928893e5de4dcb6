"""Priors that come with the project, and what one says of a table of runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from qtt_core.errors import Fault, SpecError
from qtt_core.layouts import read_runs
from qtt_core.prior import MetaPrior
from qtt_core.surrogate import squash_of

PRIORS = resources.files("qtt_core") / "data" / "priors"
NAMES = ("micro",)


def shipped(name: str) -> MetaPrior:
    """The prior of that name, with or without `mtlbm/` before it.

    Raises: SpecError for a name that is not among `NAMES`.
    """
    known = name.removeprefix("mtlbm/")
    if known not in NAMES:
        raise SpecError([Fault("prior", name, f"is not shipped; choose one of {', '.join(NAMES)}")])
    with resources.as_file(PRIORS / known) as folder:
        return MetaPrior.load(folder)


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

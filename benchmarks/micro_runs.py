"""A prior fitted on real finetuning runs, judged on data sets that it has not seen.

    QUICKTUNE_MICRO_RUNS=runs.csv python benchmarks/micro_runs.py
    QUICKTUNE_MICRO_RUNS=runs.csv python benchmarks/micro_runs.py --ship   # the prior `micro`

Leave one data set out, 20 times: what `MetaPrior` says of its runs, against how they ended.
The baseline is scikit-learn's extremely randomised trees on the same columns.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from measure import ROOT
from scipy.stats import spearmanr  # type: ignore[import-untyped]  # SciPy ships no types
from sklearn.ensemble import (  # type: ignore[import-untyped]
    ExtraTreesRegressor,
)

from qtt_core.encoding import Array
from qtt_core.layouts import from_runs_csv
from qtt_core.metadataset import OK, MetaDataset
from qtt_core.metatrain import metatrain
from qtt_core.prior import MetaPrior

BOUNDS = {"rank correlation": 0.70, "score of the first pick": 0.68, "error of seconds": 0.12}


def judged(score: Array, top1: Array, seconds: Array, measured: Array) -> list[float]:
    """The three figures on one data set; NaN entries of `measured` do not count."""
    ended, timed = np.isfinite(top1), np.isfinite(measured)
    return [
        float(spearmanr(score[ended], top1[ended]).statistic),
        float(top1[ended][np.argmax(score[ended])]),
        float(np.median(np.abs(seconds[timed] / measured[timed] - 1))),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=os.environ.get("QUICKTUNE_MICRO_RUNS"))
    parser.add_argument("--ship", action="store_true", help="write the shipped prior, no table")
    asked = parser.parse_args()
    if asked.runs is None:
        parser.error("name the table: --runs FILE or QUICKTUNE_MICRO_RUNS")
    torch.set_num_threads(1)
    meta = from_runs_csv(asked.runs)
    if asked.ship:
        metatrain(meta, 0, name="mtlbm/micro").save(ROOT / "qtt_core/data/priors/micro")
        return
    ours, stock = [], []
    for name in meta.tasks:
        others = meta.of_tasks([other for other in meta.tasks if other != name])
        mine = meta.of_tasks([name])
        top1 = np.where([state == OK for state in mine.states], mine.curves[:, -1], np.nan)
        measured = np.nanmax(np.where(np.isfinite(mine.seconds), mine.seconds, -1), axis=1)
        measured = np.where(measured > 0, measured, np.nan)
        prior = metatrain(others, 0)
        features = mine.metafeatures[name]
        score = prior.trend(mine.configs, features)[:, -1]
        seconds = np.exp(prior.log_seconds(mine.configs, features))
        ours.append(judged(score, top1, seconds, measured))
        stock.append(judged(*trees(prior, others, mine, name), measured))
        print(name, np.round(ours[-1], 3).tolist(), np.round(stock[-1], 3).tolist(), flush=True)
    print(f"{'mean of 20 data sets':26}{'prior':>8}{'trees':>8}{'bound':>8}")
    for (what, bound), a, b in zip(
        BOUNDS.items(), np.mean(ours, axis=0), np.mean(stock, axis=0), strict=True
    ):
        print(f"{what:26}{a:8.3f}{b:8.3f}{bound:8.2f}")


def trees(
    prior: MetaPrior, others: MetaDataset, mine: MetaDataset, name: str
) -> tuple[Array, Array, Array]:
    """Stock trees on the prior's own columns: predicted score, true score, predicted seconds."""
    x = np.vstack(
        [
            prior.rows([c], others.metafeatures[d])
            for c, d in zip(others.configs, others.datasets, strict=True)
        ]
    )
    y = np.where([state == OK for state in others.states], others.curves[:, -1], np.nan)
    spent = np.where(np.isfinite(others.seconds), others.seconds, -1).max(axis=1)
    at = prior.rows(mine.configs, mine.metafeatures[name])
    stock = ExtraTreesRegressor(200, min_samples_leaf=2, random_state=0)
    score = stock.fit(x[np.isfinite(y)], y[np.isfinite(y)]).predict(at)
    seconds = np.exp(stock.fit(x[spent > 0], np.log(spent[spent > 0])).predict(at))
    top1 = np.where([state == OK for state in mine.states], mine.curves[:, -1], np.nan)
    return score, top1, seconds


if __name__ == "__main__":
    main()

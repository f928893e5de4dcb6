"""Whether forecasts of learning curves are as sure as they say, and better than "as it is now".

    python benchmarks/calibration.py          # 24 made-up data sets; 4 minutes and the prior once
    python benchmarks/calibration.py --real   # the committed curves of our trainer; 3 minutes

30 random configurations of a data set that the prior has not seen are known up to an epoch each:
not at all, or up to a rung. For each of them: does the 80 % interval that `QuickTune.forecast`
gives hold the score at the end of training; and how far is the forecast of the next rung from that
rung, against the last score carried forward? Made-up scores are judged by the truth under their
noise, real ones as measured, so that counting noise widens their intervals. Priors of real curves
are made of every second set and judged on the others. What diverges is left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tiny_curves import EPOCHS, SHARDS, demo_space, read_shard
from tiny_prior import Table, meta_dataset, table_of
from transfer import UNSEEN, WORLD, prior

from qtt_core.hub import Hub
from qtt_core.metatrain import metatrain
from qtt_core.optimizer import QuickTune
from qtt_core.prior import MetaPrior
from qtt_core.space import SearchSpace
from qtt_core.steps import Config, Proposal, Why
from qtt_core.testing.curves import answer
from qtt_core.testing.worlds import WorldTask
from qtt_core.trials import next_rung, rungs

KNOWN = 30
INSIDE = 1.2815515655446004
"""Deviations on either side of the mean that hold 80 % of a normal distribution."""
WANTED = (0.75, 0.85)
DATA_SETS = 24

Case = tuple[SearchSpace, Hub | None, WorldTask | Table, Sequence[Config], MetaPrior | None]


def made_up(*, warm: bool) -> Iterator[Case]:
    """Data sets of `transfer.py`."""
    for index in range(DATA_SETS):
        configs = WORLD.space.sample(KNOWN, np.random.default_rng(index))
        known = prior("58") if warm else None
        yield WORLD.space, None, WORLD.task(UNSEEN + index), configs, known


def real(*, warm: bool) -> Iterator[Case]:
    """The committed shards, by halves."""
    space, hub = demo_space(EPOCHS)
    paths = sorted(SHARDS.glob("*.jsonl.gz"))
    for half in (0, 1):
        known = metatrain(meta_dataset(paths[1 - half :: 2]), 0) if warm else None
        for path in paths[half::2]:
            task = table_of(*read_shard(path), EPOCHS)
            yield space, hub, task, task.configs[:KNOWN], known


def judged(case: Case, seed: int) -> list[tuple[int, bool, float, float]]:
    """(epochs known, end inside, error of the next rung, error of the last score) of each."""
    space, hub, task, configs, known = case
    optimizer = QuickTune(
        space, seed=0, hub=hub, metafeatures=task.metafeatures, prior=known, candidates=configs
    )
    last = space.max_fidelity
    choices = (0, *rungs(last, space.step)[:-1])
    epochs = np.random.default_rng(seed).choice(choices, len(configs)).tolist()
    for config_id, (config, epoch) in enumerate(zip(configs, epochs, strict=True)):
        if epoch:
            whole = Proposal(
                config_id=config_id, config=config, fidelity_from=0, fidelity_to=epoch,
                expected_seconds=1.0, why=Why(rule="given"),
            )  # fmt: skip
            optimizer.opened(whole)
            optimizer.tell(answer(task, whole))
    found = []
    for config_id, (config, epoch) in enumerate(zip(configs, epochs, strict=True)):
        curve = task.curve(config)
        if curve.diverges_at is None:
            told = optimizer.forecast(config_id)
            mean, sd = told.mean[-1], math.hypot(told.sd[-1], counting(task, told.mean[-1]))
            inside = mean - INSIDE * sd <= curve.truth[last - 1] <= mean + INSIDE * sd
            rung = next_rung(epoch, last, space.step)
            error = abs(told.mean[rung - epoch - 1] - curve.truth[rung - 1])
            carried = abs(curve.scores[epoch - 1] - curve.truth[rung - 1]) if epoch else np.nan
            found.append((epoch, inside, error, carried))
    return found


def counting(task: WorldTask | Table, score: float) -> float:
    """Deviation of what is measured around what is true; 0 where the truth is known."""
    if isinstance(task, WorldTask):
        return 0.0
    return math.sqrt(max(score * (1 - score), 0.0) / task.metafeatures["n_val"])


def report(name: str, cases: Iterator[Case]) -> list[str]:
    """Print a line for every count of known epochs; what falls short."""
    every = [line for seed, case in enumerate(cases) for line in judged(case, seed)]
    table = np.array(every, dtype=np.float64)
    low, high = WANTED
    covered = table[:, 1].mean()
    print(f"{name}: {covered:.1%} of {len(table)} ends lie inside their 80 % intervals")
    short = [] if low <= covered <= high else [f"{name}: coverage"]
    for epoch in np.unique(table[:, 0]).astype(int):
        part = table[table[:, 0] == epoch]
        held, off, carried = part[:, 1].mean(), part[:, 2].mean(), part[:, 3].mean()
        line = f"  {epoch:3} epochs known: {held:6.1%} inside; next rung off by {off:.3f}"
        if epoch:
            line += f", the last score by {carried:.3f}: {off / carried:.2f} x"
            short += [f"{name}: rung after {epoch}"] if off >= carried else []
        print(line)
    return short


def main() -> None:
    """Print the figures; exit 1 where one falls short."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--real", action="store_true", help="curves of our trainer")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    make = real if asked.real else made_up
    short = report("prior", make(warm=True)) + report("no prior", make(warm=False))
    raise SystemExit(f"falls short: {', '.join(short)}" if short else 0)


if __name__ == "__main__":
    main()

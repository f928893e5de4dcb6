"""Normalised regret of the optimizers on made-up data sets that resemble one another.

    python benchmarks/transfer.py                        # 16 data sets x every line of the table
    python benchmarks/transfer.py --seeds 4 --only warm asha
    python benchmarks/transfer.py --report               # print what is there

A world (`qtt_core.testing.worlds`) has 13 mixed hyperparameters, 24 models, 50 epochs, noise,
crossings and failures. Priors are meta-learned on 58 data sets of it (`few`: 8; `wrong`: 58 whose
curves were dealt to other configurations). Every line runs the same data sets, unseen by the
priors, from the same seeds, with 4 asynchronous workers, until 16 mean full trainings are spent.

    regret at s = (best - recommended by s) / (best - worst), true scores, of 1,000 configurations

A finished search leaves one small JSON shard in benchmarks/out; a second call goes on where the
first ended. Shards of other code are not read: they carry a digest of the optimizer's sources.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import OUT, ROOT

from qtt_core.metadataset import MetaDataset
from qtt_core.metatrain import metatrain
from qtt_core.optimizer import ALGORITHMS
from qtt_core.prior import MetaPrior
from qtt_core.steps import Config, Options
from qtt_core.testing.curves import best_and_worst, simulate
from qtt_core.testing.worlds import World, WorldTask

WORLD = World(seed=0, steepness=0.6)
RUNS_PER_DATA_SET = 224
UNSEEN = 1000
"""Index of the first data set that is searched; priors see 0, 1, 2 and so on."""
SHARES = (0.1, 0.25, 0.5, 1.0)
SHARDS = OUT / "transfer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table."""

    algorithm: str = "QuickTune"
    prior: str = ""
    workers: int = 4
    start_up: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


LINES = {
    "random": Line(algorithm="Random"),
    "asha": Line(algorithm="ASHA"),
    "cold": Line(),
    "warm": Line(prior="58"),
    "few": Line(prior="8"),
    "wrong": Line(prior="wrong"),
    "warm, 16 workers": Line(prior="58", workers=16),
    "warm, 30 s start-up": Line(prior="58", start_up=30.0),
    "warm, not cost-aware": Line(prior="58", options={"cost_aware": False}),
    "warm, whole trainings": Line(prior="58", options={"grey_box": False}),
}


def records(count: int, *, dealt: bool) -> MetaDataset:
    """Runs of the first data sets; `dealt`: curves go to other configurations of the data set."""
    rng = np.random.default_rng([0, 7])
    configs: list[Config] = []
    curves, seconds, names, described = [], [], [], {}
    for index in range(count):
        task = WORLD.task(index)
        described[task.name] = task.metafeatures
        drawn = WORLD.space.sample(RUNS_PER_DATA_SET, rng)
        order = rng.permutation(len(drawn)) if dealt else np.arange(len(drawn))
        for config, i in zip(drawn, order, strict=True):
            curve = task.curve(drawn[i])
            failed = curve.diverges_at
            stop = WORLD.max_fidelity if failed is None else failed - 1
            configs.append(config)
            curves.append([*curve.scores[:stop], *([] if failed is None else [math.nan])])
            seconds.append(list(task.curve(config).seconds[: stop + (failed is not None)]))
            names.append(task.name)
    return MetaDataset.from_records(WORLD.space, configs, curves, seconds, names, described)


@functools.cache
def prior(kind: str) -> MetaPrior | None:
    """Made once and kept."""
    if not kind:
        return None
    folder = SHARDS / f"prior-{kind}-{sources()}"
    if not (folder / "card.json").exists():
        begun = time.process_time()
        made = metatrain(records(8 if kind == "8" else 58, dealt=kind == "wrong"), 0)
        made.save(folder)
        held_out = made.card["held_out"]
        print(f"prior {kind}: {time.process_time() - begun:.0f} CPU-s, held out: {held_out}")
    return MetaPrior.load(folder)


@functools.cache
def sources() -> str:
    """Digest of what decides."""
    files = [*sorted((ROOT / "qtt_core").glob("*.py")), ROOT / "qtt_core/testing/worlds.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


@functools.cache
def scale(seed: int) -> tuple[WorldTask, float, float, float]:
    """The data set, its best and worst score, seconds of a mean full training."""
    task = WORLD.task(UNSEEN + seed)
    configs = WORLD.space.sample(1000, np.random.default_rng(99))
    best, worst = best_and_worst(task, configs)
    full = float(np.mean([task.seconds(c) for c in configs])) * WORLD.max_fidelity
    return task, best, worst, full


def search(line: Line, seed: int, trainings: float) -> list[float]:
    """Regret at each of SHARES."""
    task, best, worst, full = scale(seed)
    optimizer = ALGORITHMS[line.algorithm](
        WORLD.space, seed=seed, metafeatures=task.metafeatures, prior=prior(line.prior),
        options=Options(**line.options),
    )  # fmt: skip
    total = trainings * full
    path = simulate(
        optimizer, task, total_seconds=total, workers=line.workers, start_up=line.start_up
    )
    return [max(0.0, (best - path.at(share * total)) / (best - worst)) for share in SHARES]


def report(names: Sequence[str], trainings: float) -> None:
    """Means over the data sets that every printed line has run, and their standard errors."""
    found = {name: shards(name, trainings) for name in names}
    found = {name: values for name, values in found.items() if values}
    if not found:
        print("nothing was run with this code")
        return
    shared = sorted(set.intersection(*(set(values) for values in found.values())))
    print(f"mean regret over {len(shared)} data sets, budget {trainings:g} mean full trainings")
    print(f"{'':24}" + "".join(f"{f'at {share:.0%}':>16}" for share in SHARES))
    for name, values in found.items():
        table = np.array([values[seed] for seed in shared])
        error = table.std(0, ddof=1) / math.sqrt(len(table)) if len(table) > 1 else [math.nan] * 4
        cells = (f"{m:.3f} ± {e:.3f}" for m, e in zip(table.mean(0), error, strict=True))
        print(f"{name:24}" + "".join(f"{cell:>16}" for cell in cells))


def shards(name: str, trainings: float) -> dict[int, list[float]]:
    """Regrets by seed."""
    folder = place(name, trainings)
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


def place(name: str, trainings: float) -> Path:
    """Where the shards of a line are."""
    return SHARDS / f"{name.replace(' ', '-').replace(',', '')}-{trainings:g}-{sources()}"


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=16, help="data sets, from 0")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--trainings", type=float, default=16.0, help="budget")
    parser.add_argument("--only", nargs="*", default=list(LINES), help="lines, by name")
    parser.add_argument("--report", action="store_true", help="run nothing")
    asked = parser.parse_args()
    names = [name for name in LINES if name in asked.only]
    torch.set_num_threads(1)
    for seed in range(asked.first, asked.seeds) if not asked.report else ():
        for name in names:
            file = place(name, asked.trainings) / f"{seed}.json"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(search(LINES[name], seed, asked.trainings)))
    report(names, asked.trainings)


if __name__ == "__main__":
    main()

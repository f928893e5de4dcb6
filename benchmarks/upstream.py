"""The published package (quicktunetool 0.0.4) and ours on the same tables of curves, side by side.

    python benchmarks/upstream.py                 # 3 data sets x 100 steps; about 20 minutes

Each table has 200 configurations of 50 epochs of a made-up data set of `transfer.py`; both sides
learn first from 100 runs of each of 6 other data sets and then train one configuration for one
epoch at a time, alone. Theirs runs with its defaults, then cost-aware, in an environment of its
own (`benchmarks/out/upstream`, made once; an empty module stands in for torchvision). Printed: the
regret of the best score that was really reached, after so many steps and after so many seconds of
training; and the time of an `ask`, theirs over ours, both with one thread on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from measure import OUT, ROOT
from transfer import UNSEEN, WORLD

from qtt_core.metadataset import MetaDataset
from qtt_core.metatrain import metatrain
from qtt_core.optimizer import QuickTune
from qtt_core.prior import MetaPrior
from qtt_core.steps import BudgetView, Config, Options, Proposal
from qtt_core.testing.curves import answer
from qtt_core.testing.worlds import WorldTask

FOLDER = OUT / "upstream"
PACKAGES = (
    f"torch=={torch.__version__.partition('+')[0]}", "numpy<2", "pandas==2.3.3",
    "scikit-learn==1.5.0", "gpytorch", "ConfigSpace>=1.2", "scipy", "requests", "tqdm", "pyyaml",
)  # fmt: skip
POOL, RUNS, TAUGHT = 200, 100, 6
AFTER_STEPS = (10, 25, 50, 100)
AFTER_TRAININGS = (0.25, 0.5, 1.0, 1.5)
"""Seconds, in mean full trainings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search did: best true score so far and seconds spent, after each step."""

    best: Sequence[float]
    spent: Sequence[float]
    asks: Sequence[float]


def environment() -> str:
    """The interpreter that has the published package; made at the first call."""
    python = FOLDER / "venv/bin/python"
    if not (FOLDER / "made").exists():
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER / "venv"], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python]
        subprocess.run([*install, *PACKAGES], check=True)
        subprocess.run([*install, "--no-deps", "quicktunetool==0.0.4"], check=True)
        stand_in = FOLDER / "stand_in/torchvision"
        stand_in.mkdir(parents=True, exist_ok=True)
        (stand_in / "__init__.py").write_text("")
        (stand_in / "datasets.py").write_text("ImageFolder = object\n")
        (FOLDER / "made").write_text("")
    return str(python)


def rows_of(task: WorldTask, configs: Sequence[Config]) -> dict[str, Any]:
    """Configurations with their data set's descriptors, and curves, as JSON."""
    names = sorted({name for config in configs for name in config})
    curves = []
    for config in configs:
        curve = task.curve(config)
        stop = math.inf if curve.diverges_at is None else curve.diverges_at - 1
        curves.append([s if i < stop else None for i, s in enumerate(curve.scores)])
    return {
        "rows": [{n: c.get(n) for n in names} | dict(task.metafeatures) for c in configs],
        "curves": curves,
    }


def theirs(index: int, steps: int, options: dict[str, Any]) -> Search:
    """A search by the package."""
    parts = [rows_of(task, configs) for task, configs in taught()]
    known = {key: [line for part in parts for line in part[key]] for key in ("rows", "curves")}
    known["cost"] = [task.seconds(c) for task, configs in taught() for c in configs]
    task, configs = searched(index)
    given = {
        "train": known, "candidates": rows_of(task, configs), "steps": steps, "seed": index,
        "options": options, "threads": 1,
    }  # fmt: skip
    source, result = FOLDER / "in.json", FOLDER / "out.json"
    source.write_text(json.dumps(given))
    script = ROOT / "benchmarks/upstream_search.py"
    clean = {
        **os.environ,
        "PYTHONPATH": str(FOLDER / "stand_in"),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    subprocess.run([environment(), "-P", script, source, result], env=clean, check=True)
    done = json.loads(result.read_text())
    return followed(task, [(configs[i], epoch - 1, epoch) for i, epoch in done["chosen"]],
                    done["seconds"])  # fmt: skip


def ours(index: int, steps: int, prior: MetaPrior) -> Search:
    """A search by QuickTune, an epoch a step as theirs."""
    task, configs = searched(index)
    optimizer = QuickTune(
        WORLD.space, seed=index, metafeatures=task.metafeatures, prior=prior, candidates=configs,
        options=Options(steps_per_job=1),
    )  # fmt: skip
    chosen, asks = [], []
    for step in range(steps):
        begun = perf_counter()
        (proposal,) = optimizer.ask(1, BudgetView(total_steps=steps, spent_steps=step)) or (None,)
        asks.append(perf_counter() - begun)
        if proposal is None:
            break
        optimizer.tell(answer(task, proposal))
        chosen.append(_trained(proposal))
    return followed(task, chosen, asks)


def _trained(proposal: Proposal) -> tuple[Config, int, int]:
    return proposal.config, proposal.fidelity_from, proposal.fidelity_to


def followed(
    task: WorldTask, chosen: Sequence[tuple[Config, int, int]], asks: Sequence[float]
) -> Search:
    """Best true score reached and seconds spent after each step."""
    best, spent, top, total = [], [], 0.0, 0.0
    for config, start, stop in chosen:
        curve = task.curve(config)
        alive = stop if curve.diverges_at is None else min(stop, curve.diverges_at - 1)
        top = max([top, *curve.truth[start:alive]])
        total += sum(curve.seconds[start:stop])
        best.append(top)
        spent.append(total)
    return Search(best=best, spent=spent, asks=asks)


def taught() -> list[tuple[WorldTask, list[Config]]]:
    """What both learn from."""
    found = []
    for index in range(TAUGHT):
        rng = np.random.default_rng([index, 3])
        found.append((WORLD.task(index), list(WORLD.space.sample(RUNS, rng))))
    return found


def searched(index: int) -> tuple[WorldTask, list[Config]]:
    """A data set that neither has seen, and its candidates."""
    rng = np.random.default_rng([index, 4])
    return WORLD.task(UNSEEN + index), list(WORLD.space.sample(POOL, rng))


def our_prior() -> MetaPrior:
    """Of the same runs."""
    configs, curves, seconds, names, described = [], [], [], [], {}
    for task, drawn in taught():
        described[task.name] = task.metafeatures
        for config in drawn:
            curve = task.curve(config)
            stop = len(curve.scores) if curve.diverges_at is None else curve.diverges_at - 1
            failed = [] if curve.diverges_at is None else [math.nan]
            configs.append(config)
            curves.append([*curve.scores[:stop], *failed])
            seconds.append(list(curve.seconds[: stop + len(failed)]))
            names.append(task.name)
    meta = MetaDataset.from_records(WORLD.space, configs, curves, seconds, names, described)
    return metatrain(meta, 0)


def regrets(index: int, found: Search) -> list[float]:
    """After AFTER_STEPS, then after AFTER_TRAININGS."""
    task, configs = searched(index)
    reached = [
        task.curve(c).truth[: None if (d := task.curve(c).diverges_at) is None else d - 1]
        for c in configs
    ]
    best, worst = max(max(r) for r in reached if r), min(min(r) for r in reached if r)
    full = float(np.mean([task.seconds(c) for c in configs])) * WORLD.max_fidelity
    at = [found.best[min(n, len(found.best)) - 1] for n in AFTER_STEPS]
    for trainings in AFTER_TRAININGS:
        inside = [b for b, s in zip(found.best, found.spent, strict=True) if s <= trainings * full]
        at.append(inside[-1] if inside else worst)
    return [(best - score) / (best - worst) for score in at]


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="data sets")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="epochs in all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    prior = our_prior()
    lines = {
        "published, defaults": lambda i: theirs(i, asked.steps, {}),
        "published, cost-aware": lambda i: theirs(i, asked.steps, {"cost_aware": True}),
        "ours": lambda i: ours(i, asked.steps, prior),
    }
    after = [f"{n} st." for n in AFTER_STEPS] + [f"{t:g} tr." for t in AFTER_TRAININGS]
    print(f"mean regret of {asked.seeds} data sets after steps, after mean full trainings")
    print(f"{'':24}" + "".join(f"{name:>9}" for name in after))
    asks = {}
    for name, run in lines.items():
        found = [run(index) for index in range(asked.seeds)]
        mean = np.mean([regrets(i, path) for i, path in enumerate(found)], axis=0)
        print(f"{name:24}" + "".join(f"{value:9.3f}" for value in mean), flush=True)
        asks[name] = np.median([second for path in found for second in path.asks[3:]])
    for name, second in asks.items():
        ratio = second / asks["ours"]
        print(f"median ask, pool of {POOL}: {name:24}{1e3 * second:9.1f} ms  {ratio:6.1f} x ours")


if __name__ == "__main__":
    main()

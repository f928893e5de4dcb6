"""The manifests of the Quick-Tune-Tool paper's experiment: data set x algorithm x step x seed.

    python benchmarks/paper/experiment.py FOLDER                     # 4 x 2 x 2 x 10 manifests
    python benchmarks/paper/experiment.py FOLDER --only digits --seeds 2

Settings of its section 4: budget and prior by data set, one GPU (as pods have by default), 50
epochs of full training, steps of Δ = 1 and 2 epochs, ten seeds, its search space (Table 3).
`digits` is ours, minutes on a CPU: it exercises the same code. A run is named
paper-DATA-ALGORITHM-dΔ-sSEED; `fold.py` reads that.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SEEDS = 10
STEPS = (1, 2)
ALGORITHMS = {"quicktune": "QuickTune", "random": "FreezeThawRandom"}
"""The paper's random search trains an epoch at a time, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A data set and how it is searched."""

    title: str
    claim: str
    path: str
    seconds: int
    portfolio: str
    space: str = "paper-table3"
    hub: str = "timm24"
    epochs: int = 50
    on_cpu: bool = False
    published: bool = True
    """Whether it is of the paper."""


EXPERIMENTS = {
    "imagenette": Experiment(
        title="Imagenette", claim="datasets", path="imagenette2-320", seconds=3600,
        portfolio="mtlbm/micro",
    ),
    "flowers": Experiment(
        title="Oxford Flowers 102", claim="datasets", path="flowers102", seconds=3600,
        portfolio="mtlbm/micro",
    ),
    "cars": Experiment(
        title="Stanford Cars", claim="datasets", path="stanford-cars", seconds=4 * 3600,
        portfolio="mtlbm/mini",
    ),
    "aircraft": Experiment(
        title="FGVC-Aircraft", claim="datasets", path="fgvc-aircraft", seconds=4 * 3600,
        portfolio="mtlbm/mini",
    ),
    "digits": Experiment(
        title="Digits (ours)", claim="digits", path="", seconds=60, portfolio="Auto",
        space="native", hub="tiny", epochs=12, on_cpu=True, published=False,
    ),
}  # fmt: skip


def manifest(name: str, algorithm: str, step: int, seed: int) -> dict[str, Any]:
    """One run. Raises: KeyError for an experiment or algorithm that is not here."""
    what = EXPERIMENTS[name]
    dataset = {"claimName": what.claim} | ({"path": what.path} if what.path else {})
    search: dict[str, Any] = {"space": what.space, "hub": what.hub}
    if ALGORITHMS[algorithm] == "QuickTune":
        search["portfolio"] = what.portfolio
    if what.on_cpu:
        search["overrides"] = {"amp": "false", "batch_size": "16,32,64,128"}
    return {
        "apiVersion": "quicktune.dev/v1alpha1",
        "kind": "TuningRun",
        "metadata": {"name": f"paper-{name}-{algorithm}-d{step}-s{seed}"},
        "spec": {
            "dataset": dataset,
            "search": search,
            "fidelity": {"max": what.epochs, "step": step},
            "objective": {"metric": "top1"},
            "optimizer": {"algorithm": ALGORITHMS[algorithm], "seed": seed},
            "parallelism": 1,
            "budget": {"maxGPUSeconds": what.seconds},
        },
    }


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    of_the_paper = [name for name, what in EXPERIMENTS.items() if what.published]
    parser.add_argument("--only", nargs="*", default=of_the_paper, choices=list(EXPERIMENTS))
    parser.add_argument("--algorithms", nargs="*", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="seeds 0 … N-1")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    made = [
        manifest(name, algorithm, step, seed)
        for name in asked.only
        for algorithm in asked.algorithms
        for step in STEPS
        for seed in range(asked.seeds)
    ]
    for run in made:
        path = asked.folder / f"{run['metadata']['name']}.yaml"
        path.write_text(yaml.safe_dump(run, sort_keys=False))
    print(f"{len(made)} manifests in {asked.folder}")


if __name__ == "__main__":
    main()

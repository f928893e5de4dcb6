"""The shipped prior `tiny`: fitted to the shards of benchmarks/curves, judged on the digits.

    python benchmarks/tiny_prior.py --ship       # write the prior that comes with the project
    python benchmarks/tiny_prior.py              # Quick-Tune with and without it, ASHA, random
    python benchmarks/tiny_prior.py --report     # print what is there
    python benchmarks/tiny_prior.py --left-out   # the same on each made-up set, left out in turn

The searches are simulated on a table of real curves: `tiny_curves.py --digits N` trains N random
configurations of the demo's space on the demo's images, each to its last epoch, with its
CPU-seconds. Each seed chooses among these configurations only; a result comes back after the
seconds that it took. What an optimizer thinks costs nothing here. No digit was seen in making
the prior.

    regret at s = best validation top-1 of the table - that of what was recommended by s
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measure import OUT, ROOT
from tiny_curves import EPOCHS, SHARDS, Record, demo_space, digits_part, read_shard

from qtt_core.metadataset import DIVERGED, FAILED, OK, MetaDataset
from qtt_core.metatrain import metatrain
from qtt_core.optimizer import ALGORITHMS
from qtt_core.prior import MetaPrior
from qtt_core.shipped import shipped
from qtt_core.steps import Config, canonical_json
from qtt_core.testing.curves import Curve, simulate

STATES = {"ok": OK, "diverged": DIVERGED, "oom": FAILED}
SHARES = (0.125, 0.25, 0.5, 1.0)
LINES = {
    "random": ("Random", False),
    "ASHA": ("ASHA", False),
    "Quick-Tune, no prior": ("QuickTune", False),
    "Quick-Tune, tiny": ("QuickTune", True),
}
"""Name in the table -> algorithm, with the prior."""


def meta_dataset(paths: Iterable[Path]) -> MetaDataset:
    """The runs of some shards. Raises: KeyError for one that ended by a fault of the trainer."""
    space, hub = demo_space(EPOCHS)
    shards = {path.name.partition(".")[0]: read_shard(path) for path in sorted(paths)}
    rows = [(name, record) for name, (_, records) in shards.items() for record in records]
    return MetaDataset.from_records(
        space,
        [record["config"] for _, record in rows],
        [record["scores"] for _, record in rows],
        [record["seconds"] for _, record in rows],
        [name for name, _ in rows],
        {name: header["metafeatures"] for name, (header, _) in shards.items()},
        states=[STATES[record["state"]] for _, record in rows],
        hub=hub,
        source=f"our own trainer on {len(shards)} made-up picture sets (benchmarks/curves)",
    )


# --- the digits ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Measured curves as a task of `qtt_core.testing.curves`; the truth is what was measured."""

    curves: dict[str, Curve]
    configs: tuple[Config, ...]
    metafeatures: dict[str, float]

    def curve(self, config: Config) -> Curve:
        """What training a configuration of the table showed."""
        return self.curves[canonical_json(dict(config))]

    def seconds(self, config: Config) -> float:
        """Mean seconds of an epoch."""
        return float(np.mean(self.curve(config).seconds))

    @property
    def best(self) -> float:
        """The highest score of any epoch of any configuration."""
        return max(max(curve.truth, default=0.0) for curve in self.curves.values())

    @property
    def full_training(self) -> float:
        """Mean seconds of training a configuration to the end."""
        return float(np.mean([sum(curve.seconds) for curve in self.curves.values()]))


def table_of(header: Record, records: Sequence[Record], epochs: int) -> Table:
    """Records of one data set; those whose seconds nobody measured are left out."""
    curves, configs = {}, []
    for record in records:
        if record["seconds"]:
            failed = len(record["scores"]) + 1 if record["state"] != "ok" else None
            pace = float(np.median(record["seconds"]))
            seconds = [*record["seconds"], *[pace] * epochs][:epochs]
            scores = tuple(record["scores"])
            curves[canonical_json(record["config"])] = Curve(
                truth=scores, scores=scores, seconds=tuple(seconds), diverges_at=failed
            )
            configs.append(record["config"])
    return Table(curves=curves, configs=tuple(configs), metafeatures=header["metafeatures"])


@functools.cache
def digits(images: int) -> Table:
    """The table that `tiny_curves.py --digits` has measured so far."""
    space, _ = demo_space()
    return table_of(*read_shard(digits_part(images)), space.max_fidelity)


def search(
    name: str, seed: int, trainings: float, task: Table, epochs: int, prior: MetaPrior
) -> list[float]:
    """Regret at each of SHARES of the budget; `prior` is for the lines that use one."""
    algorithm, warm = LINES[name]
    space, hub = demo_space(epochs)
    optimizer = ALGORITHMS[algorithm](
        space, seed=seed, hub=hub, metafeatures=task.metafeatures,
        prior=prior if warm else None, candidates=task.configs,
    )  # fmt: skip
    total = trainings * task.full_training
    path = simulate(optimizer, task, total_seconds=total)
    return [task.best - path.at(share * total) for share in SHARES]


def left_out(seeds: Sequence[int], trainings: float) -> None:
    """Mean regret on each committed set, searched with a prior that has not seen it."""
    paths = sorted(SHARDS.glob("*.jsonl.gz"))
    found: dict[str, list[list[float]]] = {name: [] for name in LINES}
    for path in paths:
        prior = metatrain(meta_dataset(other for other in paths if other != path), 0)
        task = table_of(*read_shard(path), EPOCHS)
        for name, kept in found.items():
            runs = [search(name, seed, trainings, task, EPOCHS, prior) for seed in seeds]
            kept.append(np.mean(runs, axis=0).tolist())
        print(path.name, {name: np.round(kept[-1], 3).tolist() for name, kept in found.items()})
    budget = ", ".join(f"{share * trainings:g}" for share in SHARES)
    print(f"mean of {len(paths)} sets x {len(seeds)} seeds after {budget} mean full trainings")
    for name, kept in found.items():
        print(f"{name:24}", np.round(np.mean(kept, axis=0), 4).tolist())


def place(name: str, seed: int, trainings: float, images: int) -> Path:
    """Where a finished search is kept; another prior, table or optimizer is another place."""
    files = [*(ROOT / "qtt_core").glob("*.py"), *(ROOT / "qtt_core/data/priors/tiny").iterdir()]
    files.append(digits_part(images))
    content = b"".join(path.read_bytes() for path in sorted(files))
    digest = hashlib.sha256(content).hexdigest()[:8]
    return OUT / "tiny_prior" / f"{name}-{trainings:g}-{seed}-{digest}.json"


def report(names: Sequence[str], seeds: Sequence[int], trainings: float, images: int) -> None:
    """Means over the seeds, their standard errors, and the ratio to random search at the end."""
    found = {name: [place(name, seed, trainings, images) for seed in seeds] for name in names}
    tables = {
        name: np.array([json.loads(path.read_text()) for path in paths])
        for name, paths in found.items()
        if all(path.exists() for path in paths)
    }
    task = digits(images)
    total = trainings * task.full_training
    print(
        f"{len(task.configs)} configurations, best top-1 {task.best:.4f}; "
        f"{len(seeds)} seeds, budget {total:.0f} CPU-seconds = {trainings:g} full trainings"
    )
    print(f"{'mean regret':24}" + "".join(f"{f'at {share * total:.0f} s':>18}" for share in SHARES))
    for name, values in tables.items():
        error = values.std(0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else [0.0] * 4
        cells = (f"{m:.4f} ± {e:.4f}" for m, e in zip(values.mean(0), error, strict=True))
        print(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells))
    for name, values in tables.items():
        if "random" in tables and name != "random":
            ratio = values.mean(0) / tables["random"].mean(0)
            wins = int((values[:, -1] < tables["random"][:, -1]).sum())
            shown = ", ".join(f"{value:.2f}" for value in ratio)
            print(f"{name}: {shown} of random's regret; better at the end on {wins} seeds")


def main() -> None:
    """Ship, or run what is missing and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ship", action="store_true", help="write the shipped prior, no table")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="seeds 0 … N-1")
    parser.add_argument("--trainings", type=float, default=16.0, metavar="N", help="the budget")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="of the table (all)")
    parser.add_argument("--left-out", action="store_true", help="on made-up sets instead")
    parser.add_argument("--report", action="store_true", help="run nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.ship:
        prior = metatrain(meta_dataset(SHARDS.glob("*.jsonl.gz")), 0, name="tiny")
        prior.save(ROOT / "qtt_core/data/priors/tiny")
        print(prior.card)
        return
    if asked.left_out:
        left_out(range(asked.seeds), asked.trainings)
        return
    prior, epochs = shipped("tiny"), demo_space()[0].max_fidelity
    for seed in range(asked.seeds) if not asked.report else ():
        for name in LINES:
            file = place(name, seed, asked.trainings, asked.images)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                regret = search(name, seed, asked.trainings, digits(asked.images), epochs, prior)
                file.write_text(json.dumps(regret))
    report(list(LINES), range(asked.seeds), asked.trainings, asked.images)


if __name__ == "__main__":
    main()

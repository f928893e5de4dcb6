"""Folds ledgers of the paper's experiment into its Table 1 and its figure 5.

    qtt ledger export paper-flowers-quicktune-d1-s0 ledgers/…       # of every run
    python benchmarks/paper/fold.py ledgers/ [--figure figure5.png] [--trajectories FOLDER]

Table 1: best validation top-1 in percent when the budget is spent, mean of the seeds and its 95 %
interval (Student's t), beside the published one. Figure 5: the best score against GPU-seconds; with
`--trajectories` the authors' own (`plots/data` of the tool's repository) are drawn thin beside it.
Its files are ledgers as `qtt ledger export` writes them; runs of other names are left out.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from experiment import ALGORITHMS, EXPERIMENTS, STEPS
from scipy.stats import t as student  # type: ignore[import-untyped]  # SciPy ships no types

from qtt_core.history import best_so_far
from qtt_core.ledger.file import read_ledger

NAME = re.compile(
    rf"paper-(?P<data>{'|'.join(EXPERIMENTS)})-(?P<algorithm>{'|'.join(ALGORITHMS)})"
    r"-d(?P<step>[12])-s(?P<seed>\d+)"
)
PUBLISHED = {
    ("imagenette", "quicktune", 1): "99.6 [99.3, 99.9]",
    ("imagenette", "random", 1): "82.1 [60.4, 99.9]",
    ("imagenette", "quicktune", 2): "99.9",
    ("imagenette", "random", 2): "91.2",
    ("flowers", "quicktune", 1): "89.1 [84.0, 94.2]",
    ("flowers", "random", 1): "74.7 [56.0, 93.1]",
    ("flowers", "quicktune", 2): "89.9",
    ("flowers", "random", 2): "80.7",
    ("cars", "quicktune", 1): "53.5 [34.4, 72.7]",
    ("cars", "random", 1): "40.4 [22.2, 58.6]",
    ("cars", "quicktune", 2): "74.1",
    ("cars", "random", 2): "22.3",
    ("aircraft", "quicktune", 1): "48.0 [35.2, 60.8]",
    ("aircraft", "random", 1): "25.0 [16.2, 33.9]",
    ("aircraft", "quicktune", 2): "62.5",
    ("aircraft", "random", 2): "26.4",
}
"""Table 1 of the Quick-Tune-Tool paper (Δ = 1); means of its released trajectories (Δ = 2)."""
RELEASED = {"quicktune": "QT", "random": "Random"}
"""What the authors call their lines."""

Key = tuple[str, str, int]
"""(data set, algorithm, epochs of a step)."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Best score in percent after so many charged device-seconds; 0 before the first."""

    seconds: Sequence[float]
    score: Sequence[float]

    def at(self, seconds: float) -> float:
        """The best score by then."""
        place = int(np.searchsorted(self.seconds, seconds, side="right"))
        return float(self.score[place - 1]) if place else 0.0


def trajectories(paths: Iterable[Path]) -> dict[Key, dict[int, Trajectory]]:
    """By run and seed. Raises: SpecError for a file that is no ledger; OSError."""
    found: dict[Key, dict[int, Trajectory]] = defaultdict(dict)
    for path in sorted(paths):
        ledger = read_ledger(path)
        named = NAME.fullmatch(ledger.name)
        if named is None:
            continue
        points = [p for p in best_so_far(ledger.events) if p.best_score is not None]
        key = named["data"], named["algorithm"], int(named["step"])
        found[key][int(named["seed"])] = Trajectory(
            [p.charged_seconds for p in points], [100 * (p.best_score or 0.0) for p in points]
        )
    return dict(found)


def interval(values: Sequence[float]) -> str:
    """Mean and its 95 % interval, as the paper prints them."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f}"
    error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    half = float(student.ppf(0.975, len(values) - 1)) * error
    return f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def table(found: Mapping[Key, Mapping[int, Trajectory]]) -> list[str]:
    """Table 1, Markdown."""
    lines = [
        "| Data set | Δ | Algorithm | Seeds | Top-1 at the end | Published |",
        "|---|---|---|---|---|---|",
    ]
    for name, what in EXPERIMENTS.items():
        for step in STEPS:
            for algorithm in ALGORITHMS:
                key = name, algorithm, step
                ran = found.get(key, {})
                if not ran and not what.published:
                    continue
                ends = [run.at(what.seconds) for run in ran.values()]
                cell = interval(ends) if ends else "not run here"
                cells = (
                    what.title, str(step), ALGORITHMS[algorithm], str(len(ends)), cell,
                    PUBLISHED.get(key, "-"),
                )  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def released(folder: Path, key: Key) -> dict[int, Trajectory]:
    """The authors' trajectories: a table of time and one column of percent a seed."""
    name, algorithm, step = key
    title = EXPERIMENTS[name].title.replace(" ", "-")
    file = folder / title / f"{RELEASED[algorithm]}{' (step 2)' if step == 2 else ''}.csv"
    if not file.exists():
        return {}
    rows = list(csv.DictReader(file.read_text().splitlines()))
    times = [float(row["time"]) for row in rows]
    seeds = [column for column in rows[0] if column != "time"]
    return {
        i: Trajectory(times, [float(row[seed]) for row in rows]) for i, seed in enumerate(seeds)
    }


def figure(found: Mapping[Key, Mapping[int, Trajectory]], file: Path, folder: Path | None) -> None:
    """Figure 5: a panel a data set, the mean of the seeds and its standard error."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in EXPERIMENTS if any(key[0] == name for key in found)]
    drawn, axes = plt.subplots(
        1, len(names), figsize=(4.2 * len(names), 3.4), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        times = np.linspace(0, EXPERIMENTS[name].seconds, 200)
        for i, (algorithm, step) in enumerate((a, s) for a in ALGORITHMS for s in STEPS):
            key = name, algorithm, step
            label = f"{ALGORITHMS[algorithm]}, Δ = {step}"
            for runs, width, words in (
                (found.get(key, {}), 1.8, label),
                (released(folder, key) if folder else {}, 0.7, f"{label}, published"),
            ):
                if not runs:
                    continue
                at = np.array([[run.at(time) for time in times] for run in runs.values()])
                mean = at.mean(0)
                axis.plot(times, mean, color=f"C{i}", linewidth=width, label=words)
                if len(at) > 1 and width > 1:
                    error = at.std(0, ddof=1) / np.sqrt(len(at))
                    axis.fill_between(times, mean - error, mean + error, color=f"C{i}", alpha=0.15)
        axis.set_title(EXPERIMENTS[name].title)
        axis.set_xlabel("CPU-seconds" if EXPERIMENTS[name].on_cpu else "GPU-seconds")
        axis.set_ylim(0, 100)
    axes[0][0].set_ylabel("best validation top-1, %")
    axes[0][-1].legend(loc="lower right", fontsize="small")
    drawn.savefig(file, dpi=120)


def main() -> None:
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ledgers", type=Path, help="a folder of ledger files")
    parser.add_argument("--figure", type=Path, metavar="PNG")
    parser.add_argument("--trajectories", type=Path, metavar="FOLDER", help="the authors' own")
    asked = parser.parse_args()
    found = trajectories(path for path in asked.ledgers.iterdir() if path.is_file())
    print("\n".join(table(found)))
    if asked.figure and found:
        figure(found, asked.figure, asked.trajectories)


if __name__ == "__main__":
    main()

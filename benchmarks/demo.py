"""The demo against its limits: wall, peak memory, steps and test accuracy, in a fresh state.

python benchmarks/demo.py                   # run it, print four figures; exit 1 past a limit
python benchmarks/demo.py --finished DIR    # judge a run that has ended (no time, no memory)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from measure import DIGITS, MANIFEST, OUT, PREPARE, QTT, must_succeed, qtt_json, watch

STATE = OUT / "demo" / "state"
FIGURES = OUT / "demo" / "figures.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured value and the bound it has to keep."""

    name: str
    value: float
    bound: float
    at_most: bool
    unit: str = ""

    @property
    def kept(self) -> bool:
        """Whether the bound holds."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        verdict = "kept" if self.kept else "MISSED"
        return (
            f"{self.name:<14} {self.value:>9.4g} {self.unit:<4} {sign} {self.bound:<6g} {verdict}"
        )


ACCURACY = 0.95
BROKEN = 0.90
"""Two runs differ: decisions depend on measured seconds, and 400 test images by a point or two.
A run that ended is judged by what only a broken demo misses; the figure is judged by `make bench`.
"""


def outcome(state_dir: Path, accuracy: float) -> list[Figure]:
    """Steps and test accuracy of the demo run whose state lies here, against a lowest accuracy."""
    where = ("digits", "--state-dir", str(state_dir))
    steps = sum(row["steps"] for row in qtt_json("statistics", *where))
    ranked = qtt_json("leaderboard", *where, "--test", str(DIGITS / "test"))
    winner = next((row for row in ranked if row["best"]), ranked[0])
    return [
        Figure(name="steps", value=steps, bound=60, at_most=False),
        Figure(name="test accuracy", value=winner["test"], bound=accuracy, at_most=False),
    ]


def run_demo(state_dir: Path) -> list[Figure]:
    """The two commands of `make demo` once the environment is there."""
    shutil.rmtree(state_dir, ignore_errors=True)
    data = must_succeed(watch([sys.executable, str(PREPARE)]), "examples/digits/prepare.py")
    run = must_succeed(
        watch([QTT, "run", str(MANIFEST), "--state-dir", str(state_dir)]), "the demo"
    )
    wall = data.wall_seconds + run.wall_seconds
    return [
        Figure(name="wall", value=wall, bound=300, at_most=True, unit="s"),
        Figure(name="peak memory", value=run.peak_bytes / 2**30, bound=4, at_most=True, unit="GiB"),
        *outcome(state_dir, ACCURACY),
    ]


def main() -> int:
    """Print the figures; 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--finished", type=Path, metavar="DIR", help="state of a run that ended")
    finished = parser.parse_args().finished
    figures = outcome(finished, BROKEN) if finished else run_demo(STATE)
    if not finished:
        FIGURES.write_text(json.dumps({figure.name: figure.value for figure in figures}, indent=2))
    print(*figures, sep="\n")
    return 0 if all(figure.kept for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Draws the panels of the dashboards from what a real Prometheus answered: docs/img/*.png.

    QTT_PANELS=/tmp/panels.json make testbed PYTEST_FLAGS="-k observability"
    python -m pip install matplotlib                 # for this script alone
    python docs/panels.py /tmp/panels.json

The queries are the dashboards' own (tests/e2e/test_observability.py); only the drawing is ours.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent / "img"
COLUMNS, SIZE = 3, (4.6, 2.5)
LABEL = re.compile(r"\{\{(\w+)\}\}")

Series = tuple[str, list[float], list[float]]
"""Legend, minutes since the start, values."""


def read(path: Path) -> dict[str, dict[str, list[Series]]]:
    """Dashboard -> title of a panel -> its series."""
    boards: dict[str, dict[str, list[Series]]] = defaultdict(lambda: defaultdict(list))
    rows: list[list[Any]] = json.loads(path.read_text())
    begin = min(p[0] for *_, series in rows for s in series for p in s["values"])
    for board, title, legend, _, series in rows:
        shown = boards[board][title]
        for item in series:
            name = LABEL.sub(lambda found, labels=item["metric"]: labels.get(found[1], ""), legend)
            points = [((t - begin) / 60, float(v)) for t, v in item["values"]]
            points = [(t, v) for t, v in points if math.isfinite(v)]
            shown.append((name, [t for t, _ in points], [v for _, v in points]))
    return boards


def draw(board: str, panels: dict[str, list[Series]]) -> None:
    """One picture of a dashboard."""
    rows = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(SIZE[0] * COLUMNS, SIZE[1] * rows), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(title, fontsize=9)
        for name, minutes, values in series[:8]:
            single = "." if len(minutes) == 1 else ""
            axis.plot(minutes, values, single, label=name or None, linewidth=1.2)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if any(name for name, *_ in series):
            axis.legend(fontsize=6, loc="upper left", framealpha=0.6)
    for axis in axes[-1]:
        axis.set_xlabel("minutes", fontsize=7)
    figure.tight_layout()
    figure.savefig(FOLDER / f"dashboard-{board}.png", dpi=70)
    plt.close(figure)


def main() -> None:
    """Draw all of a file of answers."""
    FOLDER.mkdir(exist_ok=True)
    for board, panels in read(Path(sys.argv[1])).items():
        draw(board, panels)


if __name__ == "__main__":
    main()

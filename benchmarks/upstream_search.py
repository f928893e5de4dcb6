"""A search by the published package on a table of curves; `upstream.py` runs it, apart from ours.

    python upstream_search.py IN.json OUT.json       # in an environment that has quicktunetool

IN: `train` and `candidates`, each with `rows` (configuration and descriptors, column by name) and
`curves` (null = the run had ended); `train` also `cost` (seconds of an epoch); `steps`, `seed`,
`options` of its QuickOptimizer. OUT: `chosen` [candidate, epoch], `seconds` of each ask, `fit`.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from qtt import QuickOptimizer  # type: ignore[import-not-found]


def table(part: dict[str, Any]) -> tuple[pd.DataFrame, np.ndarray]:
    """Columns as the package reads them, curves as floats with NaN."""
    return pd.DataFrame(part["rows"]), np.array(part["curves"], dtype=np.float64)


def main() -> None:
    """Fit, search, write."""
    given = json.loads(Path(sys.argv[1]).read_text())
    logging.disable(logging.WARNING)
    torch.set_num_threads(given["threads"])
    train, curves = table(given["train"])
    rows, shown = table(given["candidates"])
    optimizer = QuickOptimizer(
        None, shown.shape[1], seed=given["seed"], path=str(Path(sys.argv[2]).parent / "state"),
        verbosity=0, **given["options"],
    )  # fmt: skip
    begun = perf_counter()
    optimizer.fit(train, curves, np.array(given["train"]["cost"])[:, None])
    fit = perf_counter() - begun
    optimizer.setup_pandas(rows)
    chosen, seconds = [], []
    for _ in range(given["steps"]):
        begun = perf_counter()
        optimizer.ante()
        asked = optimizer.ask()
        seconds.append(perf_counter() - begun)
        if asked is None:
            break
        index, epoch = int(asked["config-id"]), int(asked["fidelity"])
        score = shown[index, epoch - 1]
        failed = bool(np.isnan(score))
        optimizer.tell({**asked, "score": 0.0 if failed else score, "status": not failed})
        chosen.append([index, epoch])
    Path(sys.argv[2]).write_text(json.dumps({"chosen": chosen, "seconds": seconds, "fit": fit}))


if __name__ == "__main__":
    main()

"""Meta-data as a table of one row an epoch: what people can make of their own logs.

    dataset,run,epoch,score,seconds,state,meta:<descriptor>…,<hyperparameter>…

`score` lies in [0, 1] and is maximised; empty or NaN = diverged at that epoch. `seconds`, `state`
(ok, diverged, censored, failed; of the whole run) may be absent or empty. Every other column is a
hyperparameter, empty where it is inactive. CSV, or Parquet where pyarrow is installed (`[meta]`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ConfigSpace import Categorical, ConfigurationSpace, Float, OrdinalHyperparameter
from ConfigSpace.hyperparameters import Hyperparameter

from qtt_core.errors import Fault, SpecError
from qtt_core.fields import raise_faults
from qtt_core.metadataset import MetaDataset
from qtt_core.space import SearchSpace

KEYS = ("dataset", "run", "epoch", "score")
KNOWN = (*KEYS, "seconds", "state")
META = "meta:"
FEW = 12
"""A numeric column of more values than this is a range, else a list of choices."""


def read_table(path: Path, space: SearchSpace | None = None) -> MetaDataset:
    """A table in the long format; without `space` one is made of the values that occur.

    Raises: OSError; SpecError that names the row or the column; SpecError for Parquet without
    pyarrow.
    """
    rows = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    missing = [name for name in KEYS if not rows or name not in rows[0]]
    remedy = f"the long format has {', '.join(KNOWN)}, …"
    raise_faults([Fault(str(path), f"no column {name}", remedy) for name in missing])
    runs: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        runs.setdefault((row["dataset"], row["run"]), []).append(row)
    faults: list[Fault] = []
    curves, seconds, states = [], [], []
    for key, mine in runs.items():
        mine.sort(key=lambda row: _number(row["epoch"]))
        if [_number(row["epoch"]) for row in mine] != list(range(1, len(mine) + 1)):
            faults.append(Fault(f"{path}: {key[1]}", "epoch", "give epochs 1, 2, … once each"))
        curves.append([_number(row["score"]) for row in mine])
        spent = [_number(row.get("seconds", "")) for row in mine]
        seconds.append(spent if any(map(math.isfinite, spent)) else [])
        states.append(mine[0].get("state") or "")
    raise_faults(faults)
    longest = max(map(len, curves))
    space = space or space_of([mine[0] for mine in runs.values()], longest)
    guessed = [state or _state(curve, longest) for state, curve in zip(states, curves, strict=True)]
    return MetaDataset.from_records(
        space,
        [config_of(mine[0], space) for mine in runs.values()],
        [[] if state == "failed" else c for c, state in zip(curves, guessed, strict=True)],
        seconds,
        [dataset for dataset, _ in runs],
        {dataset: _descriptors(mine[0]) for (dataset, _), mine in runs.items()},
        states=guessed,
        source=path.name,
    )


def _state(curve: list[float], longest: int) -> str:
    if not all(map(math.isfinite, curve)):
        return "diverged"
    return "ok" if len(curve) == longest else "censored"


def _csv(path: Path) -> list[Mapping[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _parquet(path: Path) -> list[Mapping[str, str]]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found,unused-ignore]  # optional
    except ImportError as error:
        remedy = "needs pyarrow: pip install 'quicktune-operator[meta]', or save it as CSV"
        raise SpecError([Fault(str(path), "Parquet", remedy)]) from error
    table: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return [{name: "" if v is None else str(v) for name, v in row.items()} for row in table]


def _number(text: str) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError as error:
        raise SpecError([Fault("table", text, "is no number")]) from error


def _names(row: Mapping[str, str]) -> list[str]:
    return [name for name in row if name not in KNOWN and not name.startswith(META)]


def _descriptors(row: Mapping[str, str]) -> dict[str, float]:
    found = {n.removeprefix(META): _number(v) for n, v in row.items() if n.startswith(META)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def config_of(row: Mapping[str, str], space: SearchSpace) -> dict[str, object]:
    """The hyperparameters of a row, numbers where the space has a range; empty ones left out."""
    ranges = {name for name in space.names if space.legal(name) is None}
    return {
        name: float(row[name]) if name in ranges else row[name]
        for name in _names(row)
        if row[name] != ""
    }


def space_of(rows: Iterable[Mapping[str, str]], longest: int) -> SearchSpace:
    """A space of the values that occur. Raises: SpecError for a column without any."""
    cs = ConfigurationSpace()
    rows = list(rows)
    cs.add(*(_hyperparameter(name, rows) for name in _names(rows[0])))
    return SearchSpace.from_configspace(cs, max_fidelity=longest, step=1)


def _hyperparameter(name: str, rows: list[Mapping[str, str]]) -> Hyperparameter[Any, Any]:
    values = sorted({row[name] for row in rows if row[name] != ""})
    if not values:
        raise SpecError([Fault(name, "no value", "leave the column out, or fill it")])
    try:
        numbers = sorted({float(value) for value in values})
    except ValueError:
        return Categorical(name, values)
    if len(numbers) <= FEW:
        return (
            OrdinalHyperparameter(name, numbers) if len(numbers) > 1 else Categorical(name, values)
        )
    low, high = _outward(numbers[0], math.floor), _outward(numbers[-1], math.ceil)
    return Float(name, (low, high), log=low > 0 and high / low > 100)


def _outward(bound: float, to_integer: Callable[[float], int]) -> float:
    """A bound at six digits, never inside the values: ConfigSpace rounds bounds to nine or so."""
    if bound == 0:
        return 0.0
    scale = 10.0 ** (5 - math.floor(math.log10(abs(bound))))
    return to_integer(bound * scale) / scale

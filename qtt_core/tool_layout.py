"""Reads the tables that the published tool is trained on: a row a run, joined by the first column.

    config.csv (or pipeline.csv)    hyperparameters in their own words; empty where inactive
    curve.csv                       scores in [0, 1] by epoch, empty after an early end
    cost.csv                        one column: seconds of the whole run; may be missing
    meta.csv                        descriptors of a run's data set, or of the data set that the
                                    column `dataset` of the others names; may be missing
    ds_to_idx.json                  data set -> its runs; may be missing

Runs whose data set nobody names are told apart by their descriptors. Tables of the published space
are read by its rules, any other hyperparameters as they are. Source: 10-optimizer 9.2.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtt_core.axes import QTT_COMPAT
from qtt_core.errors import ABSENT, Fault, SpecError
from qtt_core.fields import raise_faults
from qtt_core.hub import Hub, load_hub
from qtt_core.layouts import lost_activations, trained_epochs
from qtt_core.long_format import config_of, space_of
from qtt_core.metadataset import CENSORED, OK, MetaDataset
from qtt_core.space import SearchSpace, build_space
from qtt_core.steps import Config

CONFIGS, CURVES, COSTS, META = ("config.csv", "pipeline.csv"), "curve.csv", "cost.csv", "meta.csv"
GROUPS = "ds_to_idx.json"
DATASET = "dataset"
OURS = {"num_samples": "n_train"}
CONSTANT = ("num_features", "num_channels")
"""Descriptors that are the same everywhere in the published tables."""

SHOWN = 20
"""Faults that are named; a wrong column has thousands."""

Row = Mapping[str, str]
Table = Mapping[str, Row]


def is_tool_layout(folder: Path) -> bool:
    """Whether a folder holds such tables, or some of them."""
    return any((folder / name).is_file() for name in (*CONFIGS, CURVES))


def from_tool_folder(folder: Path) -> MetaDataset:
    """All runs of a folder of tables; T is the number of columns of `curve.csv`.

    Raises: OSError; SpecError that names file, run, column and value.
    """
    name = next((name for name in CONFIGS if (folder / name).is_file()), CONFIGS[0])
    configs, curves = _read(folder, name), _read(folder, CURVES)
    costs = _read(folder, COSTS) if (folder / COSTS).is_file() else {}
    meta = _read(folder, META) if (folder / META).is_file() else {}
    absent = [run for run in curves if run not in configs][:SHOWN]
    remedy = f"{CURVES} has its curve; the tables must be of the same runs"
    raise_faults([Fault(f"{folder / name}: {run}", ABSENT, remedy) for run in absent])
    width = len(next(iter(curves.values())))
    space, hub = _space(configs, width)
    runs: list[_Run] = []
    faults: list[Fault] = []
    for run, row in curves.items():
        try:
            found = _run(folder, name, run, configs[run], row, costs.get(run), space, hub)
            runs += [] if found is None else [found]
        except SpecError as error:
            faults += error.faults
        if len(faults) >= SHOWN:
            break
    raise_faults(faults)
    datasets, described = _datasets(folder, [run.run for run in runs], configs, meta)
    told = "" if DATASET in next(iter(configs.values())) or (folder / GROUPS).is_file() else (
        "; data sets told apart by their descriptors"
    )  # fmt: skip
    return MetaDataset.from_records(
        space, [run.config for run in runs], [run.scores for run in runs],
        [run.seconds for run in runs], datasets, described,
        states=[run.state for run in runs], hub=hub,
        source=f"tables of {folder.resolve().name}{told}",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    run: str
    config: Config
    scores: Sequence[float]
    seconds: Sequence[float]
    state: str


def _read(folder: Path, name: str) -> Table:
    """First column -> the other columns. Raises: OSError; SpecError for a broken table."""
    path = folder / name
    if not path.is_file():
        remedy = f"the tool's layout has {CONFIGS[0]} and {CURVES}"
        raise SpecError([Fault(str(path), "no such file", remedy)])
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    if len(header) < 2 or not lines:
        raise SpecError([Fault(str(path), f"{len(lines)} rows", "give a header and a row a run")])
    table: dict[str, Row] = {}
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            remedy = f"the header has {len(header)} columns"
            raise SpecError([Fault(f"{path}:{number}", f"{len(line)} columns", remedy)])
        if line[0] in table:
            raise SpecError([Fault(f"{path}:{number}", line[0], "is there twice: one row a run")])
        table[line[0]] = dict(zip(header[1:], line[1:], strict=True))
    return table


def _space(configs: Table, width: int) -> tuple[SearchSpace, Hub | None]:
    """The published space where the columns are its own, else one of the values that occur."""
    rows = [{k: v for k, v in row.items() if k != DATASET} for row in configs.values()]
    hub = load_hub("timm24")
    models = {row.get("model", "") for row in rows}
    if set(rows[0]) == set(QTT_COMPAT.names) and models <= set(hub.names):
        return build_space(QTT_COMPAT.space_id, hub, max_fidelity=width), hub
    empty = {name for name in rows[0] if all(_is_empty(row[name]) for row in rows)}
    kept = [
        {k: "" if _is_empty(v) else v for k, v in row.items() if k not in empty} for row in rows
    ]
    return space_of(kept, width), None


def _run(
    folder: Path, name: str, run: str, row: Row, curve: Row, cost: Row | None,
    space: SearchSpace, hub: Hub | None,
) -> _Run | None:  # fmt: skip
    """A run that says something, else None."""
    scores = _scores(folder, run, curve)
    config = _config(f"{folder / name}: {run}", row, space, published=hub is not None)
    known = len(scores)
    if hub is not None:
        probing = config.get("linear_probing") is True
        known = trained_epochs(known, len(curve), linear_probing=probing)
        if lost_activations(str(config["model"]), stoch_norm=config.get("stoch_norm") is True):
            return None
    if not known:
        return None
    seconds: list[float] = []
    if cost is not None:
        (column, text), *_ = cost.items()
        spent = _number(f"{folder / COSTS}: {run}.{column}", text)
        if spent < 0:
            raise SpecError([Fault(f"{folder / COSTS}: {run}.{column}", text, "give seconds")])
        seconds = [spent / len(scores)] * known if math.isfinite(spent) else []
    state = OK if known == len(curve) else CENSORED
    return _Run(run=run, config=config, scores=scores[:known], seconds=seconds, state=state)


def _scores(folder: Path, run: str, curve: Row) -> list[float]:
    """The scores before an early end. Raises: SpecError for gaps and for other scales."""
    values = [_number(f"{folder / CURVES}: {run}.{epoch}", v) for epoch, v in curve.items()]
    known = [value for value in values if math.isfinite(value)]
    where = f"{folder / CURVES}: {run}"
    if not all(map(math.isfinite, values[: len(known)])):
        raise SpecError([Fault(where, "a gap", "empty epochs may stand at the end only")])
    for epoch, value in zip(curve, known, strict=False):
        if not 0 <= value <= 1:
            raise SpecError([Fault(f"{where}.{epoch}", value, "scale scores to [0, 1]")])
    return known


def _config(where: str, row: Row, space: SearchSpace, *, published: bool) -> Config:
    """Raises: SpecError naming the column; also for an active hyperparameter without a value."""
    given = {k: "" if _is_empty(v) else v for k, v in row.items() if k != DATASET}
    filler = _fillers(given, space) if published else set()
    try:
        if not published:
            known = {name: value for name, value in given.items() if name in space.names}
            return space.canonical(config_of(known, space))
        config = space.canonical({k: v for k, v in given.items() if k not in filler})
    except SpecError as error:
        faults = [Fault(f"{where}.{f.field}", f.value, f.expected) for f in error.faults]
        raise SpecError(faults) from error
    remedy = "is active in this run; give its value"
    raise_faults([Fault(f"{where}.{k}", row[k], remedy) for k in sorted(filler & set(config))])
    return config


def _fillers(given: Row, space: SearchSpace) -> set[str]:
    """Conditional hyperparameters whose value stands for none: empty, or a zero that is illegal."""
    found = set()
    for name in {rule.child for rule in QTT_COMPAT.activations}:
        legal = space.legal(name) or ()
        zero = given[name] in {"0", "0.0", "False"}
        if given[name] == "" or (zero and not any(value in (0, False) for value in legal)):
            found.add(name)
    return found


def _datasets(
    folder: Path, runs: Sequence[str], configs: Table, meta: Table
) -> tuple[list[str], dict[str, dict[str, float]]]:
    """The data set of each run, and what is known of each data set."""
    named = _groups(folder)
    datasets: list[str] = []
    described: dict[str, dict[str, float]] = {}
    for run in runs:
        row = meta.get(run, {})
        name = named.get(run) or configs[run].get(DATASET) or row.get(DATASET)
        row = row or meta.get(name or "", {})
        if not row and not name:
            remedy = "name the run's data set: here, or in a column `dataset`"
            raise SpecError([Fault(f"{folder / META}: {run}", ABSENT, remedy)])
        values = {
            OURS.get(key, key): _number(f"{folder / META}: {run}.{column}", text)
            for column, text in row.items()
            if column != DATASET and (key := column.replace("-", "_")) not in CONSTANT
        }
        known = {key: value for key, value in values.items() if math.isfinite(value)}
        datasets.append(name or ", ".join(f"{key}={value:g}" for key, value in known.items()))
        described.setdefault(datasets[-1], known)
    return datasets, described


def _groups(folder: Path) -> dict[str, str]:
    path = folder / GROUPS
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {str(run): str(name) for name, runs in raw.items() for run in runs}
    except (ValueError, AttributeError, TypeError) as error:
        raise SpecError([Fault(str(path), str(error), "give data set -> list of runs")]) from error


def _is_empty(text: str) -> bool:
    return text.strip().lower() in {"", "nan"}


def _number(where: str, text: str) -> float:
    if _is_empty(text):
        return math.nan
    try:
        return float(text)
    except ValueError as error:
        raise SpecError([Fault(where, text, "is no number")]) from error

"""Reads the paper's meta-data set: one version of it, `micro`, `mini`, `extended` or `zap`.

    VERSION/args.json                              run -> every argument of the training script
    VERSION/eval_top1.json                         data set -> run -> percent after each epoch
    VERSION/{train,eval}_time.json                 the same of seconds
    VERSION/{train,eval}_loss.json                 the same of losses, NaN = diverged
    dataset-meta-features/*/meta-features.json     beside VERSION: descriptors of data sets

Only the first two must be there. Runs are joined by their names, never by their order. Source:
the data set of Pineda Arango et al., Quick-Tune, ICLR 2024; 10-optimizer 9.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtt_core.errors import ABSENT, Fault, SpecError
from qtt_core.fields import raise_faults
from qtt_core.hub import load_hub
from qtt_core.layouts import (
    ARGUMENTS,
    EPOCHS,
    config_of_arguments,
    lost_activations,
    trained_epochs,
)
from qtt_core.metadataset import CENSORED, DIVERGED, OK, MetaDataset
from qtt_core.space import SearchSpace, build_space
from qtt_core.steps import Config

ARGS, SCORES = "args.json", "eval_top1.json"
TIMES = ("train_time.json", "eval_time.json")
LOSSES = ("train_loss.json", "eval_loss.json")
DESCRIPTORS = "dataset-meta-features/*/meta-features.json"
NAMES = ("num_samples", "num_classes", "num_features", "num_channels")
"""Order of a data set's descriptors; the last two are the same everywhere."""

PAPER = "Pineda Arango et al., ICLR 2024"
SHOWN = 20
"""Faults that are named; a wrong column has thousands."""

Curves = Mapping[str, Mapping[str, Sequence[Any]]]


def is_paper_layout(folder: Path) -> bool:
    """Whether a folder holds one version, or some of its files."""
    return (folder / ARGS).is_file() or (folder / SCORES).is_file()


def from_paper_folder(folder: Path) -> MetaDataset:
    """All runs of a version; scores of 50 epochs, those after the 50th left out.

    Left out, too: dry runs, and runs that the old harness trained without activations. Seconds of
    nodes without an accelerator are not kept. Raises: OSError; SpecError that names file, run,
    argument and value.
    """
    hub = load_hub("timm24")
    rows = _Rows(folder=folder, space=build_space("quicktune-v1", hub, max_fidelity=EPOCHS))
    args = _object(folder / ARGS)
    scores = _curves(folder, SCORES)
    others = {n: _curves(folder, n) for n in (*TIMES, *LOSSES) if (folder / n).is_file()}
    for dataset, runs in scores.items():
        for run, values in runs.items():
            argued = args.get(run)
            if not isinstance(argued, dict):
                rows.fault(ARGS, run, argued if run in args else ABSENT, f"{SCORES} has its curve")
            elif argued.get("dataset", dataset) != dataset:
                remedy = f"its curve is one of {dataset}: files of two versions?"
                rows.fault(ARGS, f"{run}.dataset", argued["dataset"], remedy)
            else:
                beside = {n: curves.get(dataset, {}).get(run) for n, curves in others.items()}
                rows.add(run, dataset, argued, values, {n: v for n, v in beside.items() if v})
    raise_faults(rows.faults)
    described = dict(_descriptors(folder))
    known = {dataset: described.get(dataset, {}) for dataset in scores}
    return MetaDataset.from_records(
        rows.space, rows.configs, rows.scores, rows.seconds, rows.datasets,
        {name: {**rows.classes.get(name, {}), **known[name]} for name in scores},
        states=rows.states, hub=hub,
        source=f"Quick-Tune meta-data set, {folder.resolve().name} ({PAPER})",
    )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class _Rows:
    """Runs as they are read; every fault is kept, up to a number."""

    folder: Path
    space: SearchSpace
    configs: list[Config] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def fault(self, file: str, name: str, value: object, remedy: str) -> None:
        if len(self.faults) < SHOWN:
            self.faults.append(Fault(f"{self.folder / file}: {name}", value, remedy))

    def add(
        self,
        run: str,
        dataset: str,
        argued: Mapping[str, Any],
        values: Sequence[Any],
        beside: Mapping[str, Sequence[Any]],
    ) -> None:
        """A run with its scores in percent and, by file, what else is known of its epochs."""
        config = self._config(run, argued)
        percent = self._numbers(SCORES, run, values)
        found = {name: self._numbers(name, run, v) for name, v in beside.items()}
        for name, curve in found.items():
            if curve is not None and len(curve) != len(values):
                remedy = f"{SCORES} has {len(values)}: files of two versions?"
                self.fault(name, run, f"{len(curve)} epochs", remedy)
        if (
            config is None
            or percent is None
            or lost_activations(str(config["model"]), stoch_norm=config.get("stoch_norm") is True)
        ):
            return
        losses = [found.get(name) or percent for name in LOSSES]
        finite = min(map(_finite, (percent, *losses)))
        probing = config.get("linear_probing") is True
        known = trained_epochs(finite, EPOCHS, linear_probing=probing)
        broke = known == finite < min(len(percent), EPOCHS)
        if probing and known == EPOCHS // 2:
            broke = False  # at the unfreezing: the harness's fault, see `trained_epochs`
        if not (known or broke):
            return
        self.configs.append(config)
        self.datasets.append(dataset)
        self.scores.append([value / 100 for value in percent[:known]])
        spent = [found.get(name) or [] for name in TIMES if argued.get("device") != "cpu"]
        timed = len(spent) == len(TIMES) and all(spent)
        seconds = [sum(both) for both in zip(*spent, strict=False)] if timed else []
        self.seconds.append(seconds[:known])
        self.states.append(DIVERGED if broke else OK if known == EPOCHS else CENSORED)
        if isinstance(argued.get("num_classes"), int | float):
            self.classes[dataset] = {"num_classes": float(argued["num_classes"])}

    def _config(self, run: str, argued: Mapping[str, Any]) -> Config | None:
        missing = [name for name in ARGUMENTS if name not in argued]
        if missing:
            remedy = "is an argument of every run; download the file again"
            self.fault(ARGS, f"{run}.{missing[0]}", ABSENT, remedy)
            return None
        row = {name: _text(argued[name]) for name in ARGUMENTS}
        ran = argued.get("final_batch_size")  # -1 stands for unknown in the published tables
        row["final_batch_size"] = _text(ran) if isinstance(ran, int | float) and ran > 0 else ""
        try:
            config = config_of_arguments(row)
            plain = {name: "none" if value == "" else value for name, value in config.items()}
            return self.space.canonical(plain)
        except SpecError as error:
            for fault in error.faults:
                self.fault(ARGS, f"{run}.{fault.field}", fault.value, fault.expected)
        except ValueError as error:
            self.fault(ARGS, run, str(error), "is no argument of the training script")
        return None

    def _numbers(self, file: str, run: str, values: Sequence[Any]) -> list[float] | None:
        """A curve as floats; None after a fault."""
        top = 100.0 if file == SCORES else math.inf
        found = [math.nan if value is None else value for value in values]
        for epoch, value in enumerate(found, start=1):
            if isinstance(value, bool) or not isinstance(value, int | float):
                self.fault(file, f"{run}, epoch {epoch}", value, "is no number")
                return None
            if file not in LOSSES and (value < 0 or value > top):
                remedy = "give percent, 0 to 100" if file == SCORES else "give seconds"
                self.fault(file, f"{run}, epoch {epoch}", value, remedy)
                return None
        return [float(value) for value in found]


def _finite(curve: Sequence[float]) -> int:
    """Epochs before the first that is not finite."""
    return next((i for i, value in enumerate(curve) if not math.isfinite(value)), len(curve))


def _text(value: object) -> str:
    """An argument as the tables of such runs spell it; empty = off."""
    if value is None or value == "None" or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _object(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        remedy = f"the paper's layout has {ARGS} and {SCORES}; unpack all of it"
        raise SpecError([Fault(str(path), "no such file", remedy)]) from error
    except ValueError as error:
        raise SpecError([Fault(str(path), str(error), "is no JSON; download it again")]) from error
    if not isinstance(found, dict):
        raise SpecError([Fault(str(path), type(found).__name__, "must be a JSON object")])
    return found


def _curves(folder: Path, name: str) -> Curves:
    found = _object(folder / name)
    for dataset, runs in found.items():
        good = isinstance(runs, dict) and all(isinstance(v, list) for v in runs.values())
        if not good:
            remedy = "give data set -> run -> list of a number per epoch"
            raise SpecError([Fault(f"{folder / name}: {dataset}", type(runs).__name__, remedy)])
    return found


def _descriptors(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """(data set, its descriptors by our names) of every file of them beside a version."""
    for path in sorted(folder.resolve().parent.glob(DESCRIPTORS)):
        raw = _object(path)
        try:
            names, rows = raw["dataset_names"], _by_row(raw["dataset_descriptors"])
            for name, values in zip(names, rows, strict=True):
                known = dict(zip(NAMES, map(float, values), strict=True))
                described = {"n_train": known["num_samples"], "num_classes": known["num_classes"]}
                yield str(name), described
                yield f"mtlbm/{name}", described
        except (KeyError, TypeError, ValueError) as error:
            remedy = "give dataset_names, and as many dataset_descriptors of four numbers"
            raise SpecError(
                [Fault(str(path), f"{type(error).__name__}: {error}", remedy)]
            ) from error


def _by_row(described: Any) -> list[Sequence[Any]]:
    """One list a data set, from such lists or from one list a descriptor."""
    if isinstance(described, dict):
        columns = (
            [described[name] for name in NAMES] if NAMES[0] in described else [*described.values()]
        )
        return [list(row) for row in zip(*columns, strict=True)]
    return [list(row.values()) if isinstance(row, dict) else list(row) for row in described]

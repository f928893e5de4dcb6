"""Learning curves of many data sets in one search space: what meta-training learns from.

Built from plain records, stored as one npz beside a manifest (10-optimizer 9.3). A row is one run
of one configuration on one data set. It keeps how it ended: a short curve is not a converged one.

    R   runs        T   epochs of the space
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qtt_core.encoding import Array
from qtt_core.errors import Fault, SpecError
from qtt_core.fields import raise_faults
from qtt_core.hub import Hub
from qtt_core.space import SearchSpace
from qtt_core.steps import Config, canonical_json

SCHEMA = 1
OK, DIVERGED, CENSORED, FAILED = "ok", "diverged", "censored", "failed"
"""Trained to T; NaN from some epoch on; cut off before T; out of memory or infeasible."""
STATES = (OK, DIVERGED, CENSORED, FAILED)
ARRAYS, MANIFEST = "curves.npz", "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaDataset:
    """Curves in [0, 1], NaN where nothing was observed; `seconds` likewise, per epoch."""

    space: SearchSpace
    configs: tuple[Config, ...]
    curves: NDArray[np.float32]
    """(R, T)"""
    seconds: NDArray[np.float32]
    """(R, T)"""
    states: tuple[str, ...]
    datasets: tuple[str, ...]
    metafeatures: Mapping[str, Mapping[str, float]]
    """Data set -> descriptor -> value; what a data set lacks is missing, not zero."""
    hub: Hub | None = None
    source: str = ""
    """Where the rows come from; named on the card of whatever is fitted to them."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the data sets, in order of first appearance."""
        return tuple(dict.fromkeys(self.datasets))

    @property
    def sha(self) -> str:
        """SHA-256 of all content."""
        text = canonical_json(_manifest(self, {}))
        parts = (text.encode(), self.curves.tobytes(), self.seconds.tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def of_tasks(self, tasks: Sequence[str]) -> MetaDataset:
        """The runs of some data sets only."""
        wanted = set(tasks)
        keep = [i for i, name in enumerate(self.datasets) if name in wanted]
        return MetaDataset(
            space=self.space,
            configs=tuple(self.configs[i] for i in keep),
            curves=self.curves[keep],
            seconds=self.seconds[keep],
            states=tuple(self.states[i] for i in keep),
            datasets=tuple(self.datasets[i] for i in keep),
            metafeatures={name: self.metafeatures[name] for name in tasks},
            hub=self.hub,
            source=self.source,
        )

    @staticmethod
    def from_records(
        space: SearchSpace,
        configs: Sequence[Mapping[str, object]],
        curves: Sequence[ArrayLike],
        seconds: Sequence[ArrayLike],
        datasets: Sequence[str],
        metafeatures: Mapping[str, Mapping[str, float]] | None = None,
        *,
        states: Sequence[str] | None = None,
        hub: Hub | None = None,
        source: str = "",
    ) -> MetaDataset:
        """R runs as lists of equal length; ragged curves of epochs 1, 2, … up to T.

        A curve that ends in NaN diverged at the first of them; one that is shorter than T and
        finite was cut off. `states` says it outright where the curve cannot. Raises: SpecError that
        names every bad row, by number.
        """
        count = len(configs)
        faults = [
            Fault(name, len(values), f"give one entry for each of the {count} configurations")
            for name, values in (
                ("curves", curves), ("seconds", seconds), ("datasets", datasets),
                ("states", states if states is not None else configs),
            )
            if len(values) != count
        ]  # fmt: skip
        raise_faults(faults)
        table = _Rows(space)
        for i in range(count):
            state = None if states is None else states[i]
            table.add(i, configs[i], curves[i], seconds[i], state)
        raise_faults(table.faults)
        known = dict(metafeatures or {})
        return MetaDataset(
            space=space,
            configs=tuple(table.configs),
            curves=_stacked(table.curves, space.max_fidelity),
            seconds=_stacked(table.seconds, space.max_fidelity),
            states=tuple(table.states),
            datasets=tuple(str(name) for name in datasets),
            metafeatures={
                str(name): _numbers(known.get(name, {})) for name in dict.fromkeys(datasets)
            },
            hub=hub,
            source=source,
        )

    def save(self, folder: Path) -> None:
        """Write `curves.npz` and `manifest.json`. Raises: OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ARRAYS
        np.savez_compressed(path, curves=self.curves, seconds=self.seconds)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest = _manifest(self, {ARRAYS: digest})
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> MetaDataset:
        """What `save` wrote. Raises: OSError; SpecError for a damaged file or another schema."""
        try:
            raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            content = (folder / ARRAYS).read_bytes()
            if raw.get("schema") != SCHEMA:
                raise _damaged(folder, f"schema {raw.get('schema')!r}, this version reads {SCHEMA}")
            if hashlib.sha256(content).hexdigest() != raw["files"][ARRAYS]:
                raise _damaged(folder, f"{ARRAYS} does not match its digest")
            with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
                return _parsed(raw, arrays["curves"], arrays["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, f"{type(error).__name__}: {error}") from error


@dataclass(slots=True)
class _Rows:
    """Rows as they are read; every fault is kept."""

    space: SearchSpace
    configs: list[Config] = field(default_factory=list)
    curves: list[Array] = field(default_factory=list)
    seconds: list[Array] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _canonical: dict[str, Config] = field(default_factory=dict)

    def add(
        self,
        i: int,
        config: Mapping[str, object],
        curve: ArrayLike,
        seconds: ArrayLike,
        state: str | None,
    ) -> None:
        try:
            self.configs.append(self._config(config))
        except SpecError as error:
            self.faults += [replace(f, field=f"configs[{i}].{f.field}") for f in error.faults]
        scores = np.asarray(curve, dtype=np.float64).reshape(-1)
        spent = np.asarray(seconds, dtype=np.float64).reshape(-1)
        finite = scores[np.isfinite(scores)]
        limit = self.space.max_fidelity
        if len(scores) > limit:
            self._fault(f"curves[{i}]", len(scores), f"give at most T = {limit} epochs")
        elif len(finite) and not np.isfinite(scores[: len(finite)]).all():
            self._fault(f"curves[{i}]", "NaN between scores", "NaN may stand at the end only")
        elif np.any(finite < 0) or np.any(finite > 1):
            self._fault(f"curves[{i}]", float(finite.max()), "scale scores to [0, 1]")
        if len(spent) > limit or np.any(spent[np.isfinite(spent)] < 0):
            self._fault(f"seconds[{i}]", len(spent), f"give at most T = {limit} numbers >= 0")
        if state is not None and state not in STATES:
            self._fault(f"states[{i}]", state, f"use one of {', '.join(STATES)}")
        self.curves.append(finite)
        self.seconds.append(spent[: len(scores)])
        self.states.append(state or _state(scores, len(finite), limit))

    def _config(self, config: Mapping[str, object]) -> Config:
        key = repr(sorted(config.items(), key=str))
        if key not in self._canonical:
            self._canonical[key] = self.space.canonical(config)
        return self._canonical[key]

    def _fault(self, name: str, value: object, remedy: str) -> None:
        self.faults.append(Fault(name, value, remedy))


def _state(scores: Array, finite: int, limit: int) -> str:
    if finite < len(scores):
        return DIVERGED
    return OK if finite == limit else CENSORED


def _stacked(rows: Sequence[Array], width: int) -> NDArray[np.float32]:
    table = np.full((len(rows), width), np.nan, dtype=np.float32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}


def _manifest(meta: MetaDataset, files: Mapping[str, str]) -> dict[str, Any]:
    position = {name: i for i, name in enumerate(meta.tasks)}
    return {
        "schema": SCHEMA,
        "space": space_to_json(meta.space),
        "hub": None if meta.hub is None else meta.hub.to_json(),
        "source": meta.source,
        "tasks": {name: dict(meta.metafeatures[name]) for name in meta.tasks},
        "rows": [
            [position[name], state, dict(config)]
            for name, state, config in zip(meta.datasets, meta.states, meta.configs, strict=True)
        ],
        "files": dict(files),
    }


def _parsed(
    raw: Mapping[str, Any], curves: NDArray[np.float32], seconds: NDArray[np.float32]
) -> MetaDataset:
    tasks = list(raw["tasks"])
    space, rows = space_from_json(raw["space"]), raw["rows"]
    if curves.shape != (len(rows), space.max_fidelity) or seconds.shape != curves.shape:
        raise ValueError(f"curves are {curves.shape}, the manifest has {len(rows)} rows")
    return MetaDataset(
        space=space,
        configs=tuple(row[2] for row in rows),
        curves=curves.astype(np.float32),
        seconds=seconds.astype(np.float32),
        states=tuple(row[1] for row in rows),
        datasets=tuple(tasks[row[0]] for row in rows),
        metafeatures={name: _numbers(values) for name, values in raw["tasks"].items()},
        hub=None if raw["hub"] is None else Hub.from_json(raw["hub"]),
        source=str(raw["source"]),
    )


def space_to_json(space: SearchSpace) -> dict[str, Any]:
    """A space as a file keeps it; `space_from_json` is the inverse."""
    return {
        "space_id": space.space_id,
        "configspace": space.configspace.to_serialized_dict(),
        "max_fidelity": space.max_fidelity,
        "step": space.step,
    }


def space_from_json(raw: Mapping[str, Any]) -> SearchSpace:
    """Raises: KeyError, ValueError, TypeError for what `space_to_json` did not write."""
    from ConfigSpace import ConfigurationSpace  # loads SciPy: only where a file is read

    return SearchSpace(
        space_id=str(raw["space_id"]),
        configspace=ConfigurationSpace.from_serialized_dict(dict(raw["configspace"])),
        max_fidelity=int(raw["max_fidelity"]),
        step=int(raw["step"]),
    )


def _damaged(folder: Path, why: str) -> SpecError:
    return SpecError([Fault(str(folder), why, "is no meta-data set; make it again")])

"""What earlier data sets say of a new one: the meta-learned start of the default optimizer.

Made by `metatrain`, read by `policy` when a search begins (10-optimizer 5.3). It predicts, from a
configuration and the descriptors of the data set, the course of the squashed score, seconds and the
chance to finish, and says how far such predictions are off: the curve process corrects them online.

    u(x, t) = level of the data set + b l(x, m) + b' h(x, m) - s_x(tau)   trend, in logits
    l   how a configuration stands among others on data like these            (forest, one output)
    h   the same, by a linear model of products                               (hierarchy)
    s   how far below its end it is at each point of the clock tau            (forest, G outputs)
    log seconds = level of the data set + a c(x) + a' h'(x, m)                (both again)
    P(finish) = f(x)                                                          (forest, one output)
    psi(x) = phi(x) L          how far real ends are from the trend, together (hierarchy)

Stored as one npz and a JSON card; never a pickle.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtt_core.catalogue import CARD
from qtt_core.encoding import Array, build_encoder
from qtt_core.errors import Fault, SpecError
from qtt_core.forest import Forest
from qtt_core.gaussian import by_rows
from qtt_core.hierarchy import Basis, Products
from qtt_core.hub import Hub, ModelCard
from qtt_core.linear import CONSTANT, Linear
from qtt_core.metadataset import space_from_json, space_to_json
from qtt_core.space import SearchSpace
from qtt_core.steps import Config, Scalar
from qtt_core.surrogate import Parameters, straight

SCHEMA = 1
WEIGHTS = "prior.npz"
PLAIN = ("slopes", "factor")
FOREST_NAMES = ("level", "shape", "seconds", "finish")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaPrior:
    """A transfer prior; immutable. `name` is what a log says of it."""

    space: SearchSpace
    hub: Hub | None
    descriptors: tuple[str, ...]
    """Metafeatures it knows, sorted; others are ignored."""
    columns: tuple[str, ...]
    """Of the rows that `parameters` belongs to."""
    forests: Mapping[str, Forest]
    slopes: Array
    """(2, 2), b and b', a and a': what either prediction is worth on data sets never seen."""
    level_products: Products
    seconds_products: Products
    narrow: Basis
    factor: Array
    """(K', R), L."""
    difficulty: Linear
    """Level of a data set, in logits."""
    pace: Linear
    """Mean log seconds of an epoch on a data set."""
    seconds_sd: float
    """Deviation of log seconds around the prediction, the data set's level known."""
    parameters: Parameters
    """Of the curve process on what the trend leaves unexplained."""
    spread: float = 1.0
    """What the deviations of forecasts are multiplied by (`qtt_core.spread`)."""
    span: Array | None = None
    """(2, D): least and greatest value of each input in what it was fitted to."""
    name: str = ""
    guests: tuple[ModelCard, ...] = ()
    """Models of a run that `hub` lacks; see `joined`."""
    fillers: Mapping[str, Scalar] = field(default_factory=dict)
    """Values of hyperparameters that a configuration of a run lacks; see `joined`."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """Tasks, digests and figures on held-out data sets; for people."""

    def describe(self, metafeatures: Mapping[str, float]) -> Array:
        """Descriptors of a data set as a row (M,), log-scaled; NaN = missing."""
        return describe(self.descriptors, metafeatures)

    def rows(self, configs: Sequence[Config], metafeatures: Mapping[str, float]) -> Array:
        """Inputs of the forests: configurations of any space that shares names, and the data.

        Never outside of what it has seen: products would carry an unseen number anywhere.
        """
        whole = [{**self.fillers, **config} for config in configs] if self.fillers else configs
        x = rows(self.space, self.hub, self.descriptors, whole, metafeatures, self.guests)
        return x if self.span is None else np.clip(x, self.span[0], self.span[1])

    def trend(self, configs: Sequence[Config], metafeatures: Mapping[str, float]) -> Array:
        """Mean of u at the points of GRID, (n, G)."""
        x, row = self.rows(configs, metafeatures), self.describe(metafeatures)
        linear = self.level_products(x, self.difficulty.standardised(row))
        b, b_linear = self.slopes[0]
        standing = self.forests["level"].predict(x)[:, 0]
        level = self.difficulty(row) + b * standing + b_linear * linear
        if "shape" not in self.forests:
            return straight(level, self.space.max_fidelity)
        return np.asarray(level[:, None] - self.forests["shape"].predict(x))

    def transfer(self, configs: Sequence[Config], metafeatures: Mapping[str, float]) -> Array:
        """Psi, (n, R)."""
        return by_rows(self.narrow(self.rows(configs, metafeatures)), self.factor)

    def log_seconds(self, configs: Sequence[Config], metafeatures: Mapping[str, float]) -> Array:
        """Log of the seconds of one epoch, (n,); zeros if it has never seen seconds."""
        if "seconds" not in self.forests:
            return np.zeros(len(configs))
        metafeatures, images = self._of_known_size(metafeatures)
        x, row = self.rows(configs, metafeatures), self.describe(metafeatures)
        linear = self.seconds_products(x, self.pace.standardised(row))
        a, a_linear = self.slopes[1]
        predicted = self.forests["seconds"].predict(x)[:, 0]
        return np.asarray(self.pace(row) + images + a * predicted + a_linear * linear)

    def _of_known_size(
        self, metafeatures: Mapping[str, float]
    ) -> tuple[Mapping[str, float], float]:
        """As many images as it has seen, and the log of how many times more there are.

        Where all its data sets had as many, none has taught that seconds go with images; data sets
        of different sizes teach it themselves.
        """
        if self.span is None or "n_train" not in self.descriptors:
            return metafeatures, 0.0
        at = self.descriptors.index("n_train")
        low, high = self.span[:, at - 2 * len(self.descriptors)]
        times = self.describe(metafeatures)[at] - low
        if not np.isfinite(times) or low <= 0 or high - low > CONSTANT:
            return metafeatures, 0.0
        return {**metafeatures, "n_train": math.expm1(low)}, float(times)

    def joined(self, space: SearchSpace, hub: Hub | None) -> MetaPrior:
        """As it speaks of runs of another space and hub, by names.

        A model it has never met is described by its card. A hyperparameter that the run lacks, or
        that has no effect there, has the default of the prior's own space.
        """
        known = {card.name for card in self.hub.cards} if self.hub is not None else set()
        cards = hub.cards if hub is not None else ()
        conditions = self.space.configspace.parent_conditions_of
        fillers = {
            name: value
            for name, value in self.space.default().items()
            if name != "model" and (name not in space.names or not conditions[name])
        }
        guests = tuple(card for card in cards if card.name not in known)
        return replace(self, guests=guests, fillers=fillers)

    def finish(self, configs: Sequence[Config], metafeatures: Mapping[str, float]) -> Array:
        """P(finish), (n,), within [0.02, 0.99]."""
        if "finish" not in self.forests:
            return np.full(len(configs), 0.9)
        x = self.rows(configs, metafeatures)
        return np.clip(self.forests["finish"].predict(x)[:, 0], 0.02, 0.99)

    # --- files -------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write `prior.npz` and `card.json`. Raises: OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, forest in self.forests.items():
            arrays |= {f"{name}/{key}": value for key, value in forest.arrays().items()}
        for name, linear in (("difficulty", self.difficulty), ("pace", self.pace)):
            arrays |= _arrays(name, linear)
        for name, record in (
            ("parameters", self.parameters), ("narrow", self.narrow),
            ("level_products", self.level_products), ("seconds_products", self.seconds_products),
        ):  # fmt: skip
            arrays |= _arrays(name, record)
        arrays |= {name: getattr(self, name) for name in PLAIN}
        arrays |= {} if self.span is None else {"span": self.span}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # its stub knows no dict
        content = buffer.getvalue()
        (folder / WEIGHTS).write_bytes(content)
        about = {
            "schema": SCHEMA, "name": self.name, "space": space_to_json(self.space),
            "hub": None if self.hub is None else self.hub.to_json(),
            "descriptors": list(self.descriptors), "columns": list(self.columns),
            "seconds_sd": self.seconds_sd, "spread": self.spread,
            "files": {WEIGHTS: hashlib.sha256(content).hexdigest()}, "card": dict(self.card),
        }  # fmt: skip
        (folder / CARD).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> MetaPrior:
        """What `save` wrote. Raises: SpecError if it is missing, damaged or of another schema."""
        try:
            about = json.loads((folder / CARD).read_text(encoding="utf-8"))
            if about.get("schema") != SCHEMA:
                raise _damaged(
                    folder, f"schema {about.get('schema')!r}, this version reads {SCHEMA}"
                )
            content = (folder / WEIGHTS).read_bytes()
            if hashlib.sha256(content).hexdigest() != about["files"][WEIGHTS]:
                raise _damaged(folder, f"{WEIGHTS} does not match its digest")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return _parsed(about, arrays)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, f"{type(error).__name__}: {error}") from error


def describe(descriptors: Sequence[str], metafeatures: Mapping[str, float]) -> Array:
    """sign(v) log(1 + |v|) of each descriptor, NaN where it is missing or not finite."""
    values = [float(metafeatures.get(name, math.nan)) for name in descriptors]
    return np.array(
        [math.copysign(math.log1p(abs(v)), v) if math.isfinite(v) else math.nan for v in values]
    )


def rows(
    space: SearchSpace,
    hub: Hub | None,
    descriptors: Sequence[str],
    configs: Sequence[Config],
    metafeatures: Mapping[str, float],
    guests: Sequence[ModelCard] = (),
) -> Array:
    """Encoded configurations beside the data set's descriptors and their missing flags, (n, .).

    Only n_train enters the encoder (updates an epoch, the batch that runs); it is always given, so
    that columns never move.
    """
    described = describe(descriptors, metafeatures)
    missing = np.isnan(described)
    task = np.concatenate([np.where(missing, 0.0, described), missing.astype(np.float64)])
    n_train = metafeatures.get("n_train", math.nan)
    x = build_encoder(space, hub, {"n_train": n_train}, guests)(configs)
    return np.hstack([x, np.broadcast_to(task, (len(x), len(task)))])


def _arrays(
    prefix: str, record: Linear | Parameters | Basis | Products
) -> dict[str, NDArray[np.generic]]:
    return {f"{prefix}/{f.name}": np.asarray(getattr(record, f.name)) for f in fields(record)}


def _record(kind: type, prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Any:
    values = {f.name: arrays[f"{prefix}/{f.name}"] for f in fields(kind)}
    return kind(**{k: v if v.ndim else float(v) for k, v in values.items()})


def _parsed(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> MetaPrior:
    forests = {}
    for name in FOREST_NAMES:
        found = {k.split("/")[1]: arrays[k] for k in arrays if k.startswith(f"{name}/")}
        if found:
            forests[name] = Forest.from_arrays(found)
    return MetaPrior(
        space=space_from_json(about["space"]),
        hub=None if about["hub"] is None else Hub.from_json(about["hub"]),
        descriptors=tuple(about["descriptors"]), columns=tuple(about["columns"]), forests=forests,
        difficulty=_record(Linear, "difficulty", arrays), pace=_record(Linear, "pace", arrays),
        narrow=_record(Basis, "narrow", arrays),
        level_products=_record(Products, "level_products", arrays),
        seconds_products=_record(Products, "seconds_products", arrays),
        slopes=arrays["slopes"], factor=arrays["factor"], span=arrays.get("span"),
        seconds_sd=float(about["seconds_sd"]), parameters=_record(Parameters, "parameters", arrays),
        spread=float(about.get("spread", 1.0)), name=str(about["name"]), card=about["card"],
    )  # fmt: skip


def _damaged(folder: Path, why: str) -> SpecError:
    return SpecError([Fault(str(folder), why, "is no prior; make it with qtt metatrain")])

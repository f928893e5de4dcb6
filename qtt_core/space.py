"""The search space on ConfigSpace: named spaces, canonical configurations, digests.

Tables (`axes`) become a ConfigSpace here (10-optimizer 2.1); configurations enter and leave in
canonical form only. ConfigSpace loads SciPy (about a second), so it is imported where it is needed:
the trainer, which only calls `check_values`, never pays for it. This module must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtt_core.axes import TABLES, Activation, Axis, Table
from qtt_core.errors import Fault, SpecError
from qtt_core.fields import raise_faults
from qtt_core.hub import Hub
from qtt_core.hyperparameters import (
    choices,
    clause_names,
    default_value,
    describe,
    draw,
    movable,
    move,
    number,
    parents_first,
)
from qtt_core.narrowing import narrow, unknown_name
from qtt_core.steps import Config, Scalar, digest
from qtt_core.values import is_number, match, parse_value, plain

if TYPE_CHECKING:
    import numpy as np
    from ConfigSpace import ConfigurationSpace
    from ConfigSpace.hyperparameters import Hyperparameter

__all__ = [
    "CUSTOM",
    "SPACES",
    "SearchSpace",
    "build_space",
    "check_values",
    "custom_space",
    "parse_value",
]

SPACES = ("native", "quicktune-v1", "qtt-compat", "paper-table3")
CUSTOM = "custom"

_NEIGHBOUR_TRIES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """A ConfigSpace with fidelity: T = `max_fidelity`, Δ = `step` epochs.

    Configurations that leave this class are canonical: plain JSON scalars, inactive names absent,
    off spelled "none" (categorical, mixed ordinals) or 0 (numeric), keys in the space's order.
    """

    space_id: str
    configspace: ConfigurationSpace
    max_fidelity: int
    step: int = 1

    @property
    def sha(self) -> str:
        """SHA-256 of the space's canonical JSON: what can be chosen, not how long it is trained."""
        return digest({"space_id": self.space_id, **describe(self.configspace)})

    @property
    def names(self) -> tuple[str, ...]:
        """Every hyperparameter, fixed ones included, in the order of canonical configurations."""
        return tuple(self.configspace)

    def legal(self, name: str) -> tuple[Scalar, ...] | None:
        """The choices of a hyperparameter in order; None when it is a range of numbers."""
        return choices(self.configspace[name])

    @staticmethod
    def from_configspace(cs: ConfigurationSpace, max_fidelity: int, step: int = 1) -> SearchSpace:
        """Any ConfigSpace as a search space; `space_id` is `custom`.

        Raises: SpecError if a choice is no JSON scalar or the fidelity makes no sense.
        """
        _check_fidelity(max_fidelity, step)
        faults = [
            Fault(hp.name, value, "choices must be JSON scalars")
            for hp in cs.values()
            for value in choices(hp) or ()
            if value is not None and not isinstance(value, str | int | float | bool)
        ]
        raise_faults(faults)
        return SearchSpace(space_id=CUSTOM, configspace=cs, max_fidelity=max_fidelity, step=step)

    def default(self) -> Config:
        """The default configuration (explicit defaults, never ConfigSpace's first item)."""
        return self.canonical({})

    def sample(self, n: int, rng: np.random.Generator) -> list[Config]:
        """Return n canonical configurations, duplicates kept; equal rng states give equal lists."""
        if n < 1:
            return []
        self.configspace.seed(int(rng.integers(2**31)))
        sample = self.configspace.sample_configuration
        drawn = [sample()] if n == 1 else sample(size=n)  # with size 1 it returns no list
        return [self._leaving(dict(configuration)) for configuration in drawn]

    def canonical(self, config: Mapping[str, object]) -> Config:
        """Validate against the space and return the canonical form; missing names take defaults.

        Text is read as a manifest's quoted value. Inactive names are dropped once their value is
        known to be legal, so that configurations that train alike are equal.

        Raises: SpecError naming name, value and the legal values.
        """
        faults: list[Fault] = []
        given: dict[str, Scalar] = {}
        for name, value in config.items():
            try:
                if name in self.configspace:
                    given |= self._entering(name, value)
                else:
                    self._check_absent(name, value)
            except ValueError as error:
                faults.append(Fault(name, plain(value), str(error)))
            except SpecError as error:
                faults.extend(error.faults)
        raise_faults(faults)
        values = self._complete(given, default_value)
        self._check_allowed(values)
        return values

    def compose(self, value: Callable[[Hyperparameter[Any, Any]], Scalar]) -> Config:
        """A configuration whose every active hyperparameter was asked for, parents first.

        Raises: SpecError if the combination is forbidden.
        """
        values = self._complete({}, value)
        self._check_allowed(values)
        return values

    def changed(
        self, config: Config, changes: Mapping[str, object], rng: np.random.Generator
    ) -> Config:
        """The configuration with some values changed; what becomes active by that is drawn.

        Raises: SpecError if a value is illegal or the combination is forbidden.
        """
        given = {name: value for name, value in config.items() if name not in changes}
        for name, value in changes.items():
            if name not in self.configspace:
                raise SpecError(
                    [unknown_name(name, name, plain(value), known=self.names, where="the space")]
                )
            try:
                given |= self._entering(name, value)
            except ValueError as error:
                raise SpecError([Fault(name, plain(value), str(error))]) from error
        values = self._complete(given, lambda hp: draw(hp, rng))
        self._check_allowed(values)
        return values

    def neighbours(self, config: Config, rng: np.random.Generator, n: int = 1) -> list[Config]:
        """Return n mutations of one or two coordinates: next rank, other choice, or nudge.

        All differ from `config`, not from each other. Fewer than n when the space has no room.
        """
        found: list[Config] = []
        free = [name for name in config if movable(self.configspace[name])]
        for _ in range(_NEIGHBOUR_TRIES * n if free else 0):
            if len(found) == n:
                break
            count = min(len(free), int(rng.integers(1, 3)))
            names = rng.choice(free, size=count, replace=False)
            changes = {str(m): move(self.configspace[str(m)], config[str(m)], rng) for m in names}
            try:
                candidate = self.changed(config, changes, rng)
            except SpecError:  # a forbidden combination: draw again
                continue
            if candidate != config:
                found.append(candidate)
        return found

    # --- the border --------------------------------------------------------------------------

    def _entering(self, name: str, value: object) -> dict[str, Scalar]:
        """{name: canonical value}; nothing for a null that means "left out". Raises: ValueError."""
        hp = self.configspace[name]
        legal = choices(hp)
        if legal is None:
            return {} if value is None else {name: number(hp, value)}
        axis = TABLES[self.space_id].axis(name) if self.space_id in TABLES else None
        off = axis.off if axis else "none"
        left_out = value is None and None not in legal and (off is None or off not in legal)
        return {} if left_out else {name: match(value, legal, off=off)}

    def _leaving(self, values: Mapping[str, object]) -> Config:
        """A ConfigSpace sample as canonical JSON scalars."""
        config: dict[str, Scalar] = {}
        for name in self.configspace:
            if name in values:
                hp, value = self.configspace[name], plain(values[name])
                legal = choices(hp)
                config[name] = number(hp, value) if legal is None else match(value, legal)
        return config

    def _check_absent(self, name: str, value: object) -> None:
        """A name this space lost to overrides or the hub is fine, an unknown one is not."""
        axis = TABLES[self.space_id].axis(name) if self.space_id in TABLES else None
        if axis is None:
            raise SpecError(
                [unknown_name(name, name, plain(value), known=self.names, where="the space")]
            )
        if value is not None:
            match(value, axis.values, off=axis.off)

    def _complete(
        self, given: Mapping[str, Scalar], fill: Callable[[Hyperparameter[Any, Any]], Scalar]
    ) -> dict[str, Scalar]:
        """Active names only, parents before children; what is missing comes from `fill`."""
        from ConfigSpace.types import NotSet

        values: dict[str, Any] = dict.fromkeys(self.configspace, NotSet)
        for name in parents_first(self.configspace):
            conditions = self.configspace.parent_conditions_of[name]
            if all(condition.satisfied_by_value(values) for condition in conditions):
                values[name] = given[name] if name in given else fill(self.configspace[name])
        return {name: value for name, value in values.items() if value is not NotSet}

    def _check_allowed(self, values: Mapping[str, Scalar]) -> None:
        from ConfigSpace import Configuration
        from ConfigSpace.exceptions import ForbiddenValueError

        try:
            Configuration(self.configspace, values=dict(values))
        except ForbiddenValueError as error:
            names = self._forbidden_names(values)
            both = {name: values[name] for name in names if name in values}
            remedy = "cannot go together: turn one of them off or change it"
            raise SpecError([Fault(" and ".join(names), both, remedy)]) from error

    def _forbidden_names(self, values: Mapping[str, Scalar]) -> list[str]:
        """Who takes part in the forbidden combinations that hold."""
        clauses = self.configspace.forbidden_clauses
        broken = [clause for clause in clauses if clause.is_forbidden_value(dict(values))]
        return sorted({name for clause in broken for name in clause_names(clause)})


def build_space(
    name: str,
    hub: Hub,
    *,
    max_fidelity: int,
    step: int = 1,
    overrides: Mapping[str, str] | None = None,
    in_channels: int = 3,
    definition: str = "",
) -> SearchSpace:
    """A named space over the hub's models; overrides fix a value or narrow the choices ("a,b").

    Image policies know grey and colour images only: at any other number of channels
    `data_augmentation` is "none". The space `custom` is ConfigSpace's JSON in `definition`.

    Raises: SpecError for an unknown space, name or value, or an empty choice.
    """
    _check_fidelity(max_fidelity, step)
    if name == CUSTOM and definition:
        return custom_space(definition, hub, max_fidelity=max_fidelity, step=step, any_name=True)
    if name not in TABLES:
        remedy = f"use one of {', '.join(SPACES)}, or configSpaceRef"
        raise SpecError([Fault("spec.search.space", name, remedy)])
    chosen = dict(overrides or {})
    if in_channels not in {1, 3}:
        chosen.setdefault("data_augmentation", "none")
    batchnorm = [card.name for card in hub.cards if card.batchnorm]
    table = TABLES[name].with_models(hub.names, hub.default.name, batchnorm)
    return SearchSpace(
        space_id=name,
        configspace=_configspace(narrow(table, chosen)),
        max_fidelity=max_fidelity,
        step=step,
    )


def custom_space(
    text: str, hub: Hub, *, max_fidelity: int, step: int = 1, any_name: bool = False
) -> SearchSpace:
    """The space of a `configSpaceRef`: ConfigSpace's own JSON.

    Without `model`, the hub's models are added. `any_name`: a custom trainer reads other names too.

    Raises: SpecError for bad JSON, models that the hub does not have, or names the trainer ignores.
    """
    from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace

    where = "spec.search.configSpaceRef"
    try:
        raw = json.loads(text)
        cs = ConfigurationSpace.from_serialized_dict(raw)
        if not len(cs):
            raise ValueError("no hyperparameters")
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        remedy = (
            f"use the JSON that ConfigurationSpace.to_json writes ({type(error).__name__}: {error})"
        )
        raise SpecError([Fault(where, text[:60], remedy)]) from error
    if "model" not in cs:
        models = CategoricalHyperparameter(
            "model", hub.names, default_value=hub.default.name, meta={"type": "model"}
        )
        cs.add(models)
    missing = [model for model in choices(cs["model"]) or () if model not in hub.names]
    if missing:
        raise SpecError(
            [Fault(f"{where}: model", missing, f"hub {hub.name} has {', '.join(hub.names)}")]
        )
    known = TABLES["native"].names
    raise_faults(
        [
            unknown_name(f"{where}: {name}", name, name, known=known, where="the trainer")
            for name in cs
            if name not in known and not any_name
        ]
    )
    return SearchSpace.from_configspace(cs, max_fidelity, step)


def check_values(space_id: str, config: Mapping[str, object]) -> Config:
    """What the trainer needs: values normalised, each legal somewhere in the named space.

    None, "none" and 0 become the axis' off, betas their text form; hub and overrides are not known.

    A null where the space has no off is left out. In a `custom` space numbers may lie off the grid.

    Raises: SpecError naming every illegal name and value.
    """
    if space_id not in (*TABLES, CUSTOM):
        remedy = f"this trainer knows {', '.join((*TABLES, CUSTOM))}; another version wrote the job"
        raise SpecError([Fault("space_id", space_id, remedy)])
    table = TABLES["native" if space_id == CUSTOM else space_id]
    faults: list[Fault] = []
    checked: dict[str, Scalar] = {}
    for name, value in config.items():
        axis = table.axis(name)
        if axis is None:
            where = f"space {space_id}"
            fault = unknown_name(f"config.{name}", name, value, known=table.names, where=where)
            faults.append(fault)
            continue
        try:
            checked |= _checked(axis, plain(value), free=space_id == CUSTOM)
        except ValueError as error:
            faults.append(Fault(f"config.{name}", plain(value), str(error)))
    raise_faults(faults)
    return checked


def _checked(axis: Axis, value: object, *, free: bool) -> dict[str, Scalar]:
    if axis.name == "model":
        if not isinstance(value, str) or not value:
            raise ValueError("use the name of a model")
        return {axis.name: value}
    if value is None and axis.off is None:
        return {}
    numeric = any(is_number(member) for member in axis.values)
    if free and numeric and is_number(value) and value not in axis.values and value != 0:
        if value < 0:  # type: ignore[operator]  # is_number
            raise ValueError("use a number of at least 0")
        return {axis.name: value}  # type: ignore[dict-item]  # is_number
    return {axis.name: match(value, axis.values, off=axis.off)}


def _check_fidelity(max_fidelity: int, step: int) -> None:
    """A step longer than T is legal: it is cut to T."""
    if max_fidelity < 1 or step < 1:
        span = f"max {max_fidelity}, step {step}"
        raise SpecError([Fault("spec.fidelity", span, "use at least one epoch each")])


# --- tables to ConfigSpace -----------------------------------------------------------------------


def _configspace(table: Table) -> ConfigurationSpace:
    from ConfigSpace import (
        CategoricalHyperparameter,
        ConfigurationSpace,
        ForbiddenAndConjunction,
        ForbiddenInClause,
        OrdinalHyperparameter,
    )

    cs = ConfigurationSpace(name=table.space_id)
    hps: dict[str, Hyperparameter[Any, Any]] = {}
    for axis in table.axes:
        kind = OrdinalHyperparameter if axis.ordinal else CategoricalHyperparameter
        hps[axis.name] = kind(
            axis.name, axis.values, default_value=axis.default, meta={"type": axis.group}
        )
    conditions = [_condition(rule, hps) for rule in table.activations]
    clauses = [
        ForbiddenAndConjunction(*(ForbiddenInClause(hps[n], v) for n, v in exclusion.axes.items()))
        for exclusion in table.exclusions
    ]
    cs.add(*hps.values(), *conditions, *clauses)
    return cs


def _condition(rule: Activation, hps: Mapping[str, Hyperparameter[Any, Any]]) -> Any:
    """ConfigSpace takes one condition object per child: conjunctions nest."""
    from ConfigSpace import AndConjunction, InCondition, OrConjunction

    def parts(parents: Mapping[str, tuple[Scalar, ...]]) -> list[Any]:
        child = hps[rule.child]
        return [InCondition(child, hps[name], list(values)) for name, values in parents.items()]

    every = parts(rule.needs)
    if rule.any_of:
        every.append(OrConjunction(*parts(rule.any_of)))
    return every[0] if len(every) == 1 else AndConjunction(*every)

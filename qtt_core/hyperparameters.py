"""Hyperparameters of any ConfigSpace: choices, ranges, draws, mutations, content of a digest.

Below `space`, which owns the rules; nothing here knows a named space. ConfigSpace's values are
numpy scalars; what leaves these functions are JSON scalars.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtt_core.steps import Scalar
from qtt_core.values import is_number, plain

if TYPE_CHECKING:
    import numpy as np
    from ConfigSpace import ConfigurationSpace
    from ConfigSpace.hyperparameters import Hyperparameter

NEIGHBOUR_SD = 0.15
"""Standard deviation of a mutated number, as a share of its (logarithmic) range."""


def choices(hp: Hyperparameter[Any, Any]) -> tuple[Scalar, ...] | None:
    """The finite choices of a hyperparameter as Python values, None for a range of numbers."""
    for attribute in ("sequence", "choices"):
        listed = getattr(hp, attribute, None)
        if listed is not None:
            return tuple(plain(choice) for choice in listed)  # type: ignore[misc]  # checked on entry
    if hasattr(hp, "lower"):
        return None
    return (plain(hp.default_value),)  # type: ignore[return-value]  # a constant


def number(hp: Hyperparameter[Any, Any], value: object) -> Scalar:
    """A number of a numeric range, as the range's own type. Raises: ValueError."""
    value = plain(value)
    low, high = plain(hp.lower), plain(hp.upper)  # type: ignore[attr-defined]  # numeric
    remedy = f"use a number from {low} to {high}"
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise ValueError(remedy) from error
    if not is_number(value) or not low <= value <= high:  # type: ignore[operator]  # is_number
        raise ValueError(remedy)
    if isinstance(low, int):
        if value != int(value):  # type: ignore[call-overload]  # is_number
            raise ValueError(f"use an integer from {low} to {high}")
        return int(value)  # type: ignore[call-overload, no-any-return]  # is_number
    return float(value)  # type: ignore[arg-type]  # is_number


def default_value(hp: Hyperparameter[Any, Any]) -> Scalar:
    """The explicit default as a JSON scalar."""
    return plain(hp.default_value)  # type: ignore[return-value]  # a choice or a number


def draw(hp: Hyperparameter[Any, Any], rng: np.random.Generator) -> Scalar:
    """A value of a hyperparameter: uniform among choices, else by its own distribution."""
    legal = choices(hp)
    if legal is not None:
        return legal[int(rng.integers(len(legal)))]
    import numpy as np

    state = np.random.RandomState(int(rng.integers(2**31)))  # ConfigSpace takes no Generator
    return number(hp, hp.sample_value(seed=state))


def movable(hp: Hyperparameter[Any, Any]) -> bool:
    """Whether there is more than one value."""
    legal = choices(hp)
    return legal is None or len(legal) > 1


def move(hp: Hyperparameter[Any, Any], value: Scalar, rng: np.random.Generator) -> Scalar:
    """One mutation: the next rank of an ordinal, another category, a nudge along a range."""
    legal = choices(hp)
    if legal is None:
        unit = float(hp.to_vector(value)) + float(rng.normal(0, NEIGHBOUR_SD))
        return number(hp, hp.to_value(min(1.0, max(0.0, unit))))
    rank = legal.index(value)
    if hasattr(hp, "sequence"):
        options = [rank + step for step in (-1, 1) if 0 <= rank + step < len(legal)]
    else:
        options = [other for other in range(len(legal)) if other != rank]
    return legal[options[int(rng.integers(len(options)))]]


def parents_first(cs: ConfigurationSpace) -> Iterator[str]:
    """Every name, each behind all its parents."""
    done: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        if name not in done:
            done.add(name)
            for parent in cs.parents_of[name]:
                yield from visit(parent.name)
            yield name

    for name in cs:
        yield from visit(name)


def clause_names(clause: Any) -> Sequence[str]:
    """The hyperparameters of a forbidden clause, a conjunction or a relation."""
    if hasattr(clause, "components"):
        return [name for part in clause.components for name in clause_names(part)]
    if hasattr(clause, "left"):
        return [clause.left.name, clause.right.name]
    return [clause.hyperparameter.name]


def describe(cs: ConfigurationSpace) -> dict[str, Any]:
    """Canonical content of a space, independent of ConfigSpace's own file format and version."""
    return {
        "hyperparameters": [_describe_hp(cs[name]) for name in sorted(cs)],
        "conditions": sorted(
            (_describe_part(c.to_dict(), type(c).__name__) for c in cs.conditions), key=str
        ),
        "forbidden": sorted(
            (_describe_part(c.to_dict(), type(c).__name__) for c in cs.forbidden_clauses), key=str
        ),
    }


def _describe_hp(hp: Hyperparameter[Any, Any]) -> dict[str, Any]:
    legal = choices(hp)
    about: dict[str, Any] = {"name": hp.name, "kind": type(hp).__name__}
    about |= {"default": plain(hp.default_value)}
    if legal is not None:
        return about | {"values": list(legal), "weights": _listed(getattr(hp, "weights", None))}
    extra = ("lower", "upper", "log", "mu", "sigma", "alpha", "beta")
    return about | {key: plain(getattr(hp, key)) for key in extra if hasattr(hp, key)}


def _describe_part(raw: Any, kind: str = "") -> Any:
    """Conditions and clauses as plain JSON."""
    if isinstance(raw, Mapping):
        content = {str(key): _describe_part(value) for key, value in raw.items()}
        return {"kind": kind, **content} if kind else content
    if isinstance(raw, list | tuple | set):
        return [_describe_part(item) for item in raw]
    listed = _listed(raw)
    return listed if listed is not None else plain(raw)


def _listed(value: Any) -> Any:
    """An array as a list, None for anything else."""
    return value.tolist() if hasattr(value, "tolist") and value.ndim > 0 else None

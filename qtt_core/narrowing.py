"""What overrides do to a named space: fewer choices, and conditions that stay consistent with them.

Pure functions from table to table, before anything becomes a ConfigSpace. An override fixes a value
or narrows the choices; a parent that can no longer have the needed value removes its children, one
that always has it removes the condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qtt_core.axes import Activation, Axis, Exclusion, Table, Values
from qtt_core.errors import Fault, SpecError
from qtt_core.fields import nearest, raise_faults
from qtt_core.steps import Scalar
from qtt_core.values import parse_value, shown, split_choices

OVERRIDES = "spec.search.overrides"


def narrow(table: Table, overrides: Mapping[str, str]) -> Table:
    """The table with overrides applied, fixed axes fixed, dead axes and conditions removed.

    Raises: SpecError naming every unknown name, illegal value or empty choice.
    """
    faults: list[Fault] = []
    where = f"space {table.space_id}"
    for name, text in overrides.items():
        if name not in table.names:
            field = f"{OVERRIDES}.{name}"
            faults.append(unknown_name(field, name, text, known=table.names, where=where))
    axes = tuple(_axis(axis, table, overrides, faults) for axis in table.axes)
    raise_faults(faults)
    return _prune(replace(table, axes=axes, fixed={}))


def _axis(axis: Axis, table: Table, overrides: Mapping[str, str], faults: list[Fault]) -> Axis:
    text = overrides.get(axis.name)
    if text is None:
        fixed = axis.name in table.fixed
        return replace(axis, values=(table.fixed[axis.name],)) if fixed else axis
    try:
        return choose(axis, text)
    except ValueError as error:
        faults.append(Fault(f"{OVERRIDES}.{axis.name}", text, str(error)))
        return axis


def choose(axis: Axis, text: str) -> Axis:
    """The axis with the choices of a comma list, in the axis' own order.

    Raises: ValueError for an empty or illegal item.
    """
    items = split_choices(text) if isinstance(text, str) else [text]
    if any(item == "" for item in items):
        raise ValueError(f"empty choice; use one or more of {shown(axis.values)}")
    chosen: list[Scalar] = []
    for item in items:
        try:
            chosen.append(parse_value(item, axis.values, off=axis.off))
        except ValueError as error:
            raise ValueError(
                f"{item!r} is no choice; use one or more of {shown(axis.values)}"
            ) from error
    values = tuple(value for value in axis.values if value in chosen)
    return replace(axis, values=values, default=_default(axis, values))


def _default(axis: Axis, values: Values) -> Scalar:
    """The old default, else its nearest remaining neighbour in the axis' order."""
    if axis.default in values:
        return axis.default
    rank = {value: i for i, value in enumerate(axis.values)}
    if not axis.ordinal or axis.default not in rank:
        return values[0]
    return min(values, key=lambda value: abs(rank[value] - rank[axis.default]))


def unknown_name(
    field: str, name: str, value: object, *, known: Sequence[str], where: str
) -> Fault:
    """A fault for a name that a space does not have, with the nearest known one."""
    meant = nearest(name, known, otherwise=f"{where} has {', '.join(known)}")
    return Fault(field, value, f"unknown name; {meant}")


# --- conditions ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Status:
    """Whether an axis can be active at all, and under which remaining condition."""

    possible: bool = True
    rule: Activation | None = None


def _prune(table: Table) -> Table:
    domains = {axis.name: axis.values for axis in table.axes}
    rules = {rule.child: rule for rule in table.activations}
    known: dict[str, _Status] = {}
    for axis in table.axes:
        _status(axis.name, domains, rules, known)
    live = {name for name, status in known.items() if status.possible}
    return replace(
        table,
        axes=tuple(axis for axis in table.axes if axis.name in live),
        activations=tuple(known[a.name].rule for a in table.axes if known[a.name].rule),  # type: ignore[misc]  # filtered
        exclusions=_exclusions(table, domains, live),
    )


def _status(
    name: str,
    domains: Mapping[str, Values],
    rules: Mapping[str, Activation],
    known: dict[str, _Status],
) -> _Status:
    """Resolve parents first; tables have no cycles."""
    if name in known:
        return known[name]
    rule = rules.get(name)
    if rule is None:
        known[name] = _Status()
        return known[name]
    needs = _still_open(rule.needs, domains, rules, known)
    any_of = _still_open(rule.any_of, domains, rules, known)
    if needs.dead or (rule.any_of and not any_of.certain and not any_of.open):
        known[name] = _Status(possible=False)
    else:
        choice = {} if any_of.certain else any_of.open
        if len(choice) == 1:
            needs, choice = replace(needs, open={**needs.open, **choice}), {}
        left = Activation(child=name, needs=needs.open, any_of=choice)
        known[name] = _Status(rule=left if needs.open or choice else None)
    return known[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parents:
    """Parents that may or may not hold, and how many always (certain) or never (dead) do."""

    open: Mapping[str, Values]
    certain: int
    dead: int


def _still_open(
    parents: Mapping[str, Values],
    domains: Mapping[str, Values],
    rules: Mapping[str, Activation],
    known: dict[str, _Status],
) -> _Parents:
    kept: dict[str, Values] = {}
    certain = dead = 0
    for parent, values in parents.items():
        status = _status(parent, domains, rules, known)
        left = tuple(v for v in values if v in domains[parent]) if status.possible else ()
        if not left:
            dead += 1
        elif len(left) == len(domains[parent]) and status.rule is None:
            certain += 1
        else:
            kept[parent] = left
    return _Parents(open=kept, certain=certain, dead=dead)


def _exclusions(
    table: Table, domains: Mapping[str, Values], live: set[str]
) -> tuple[Exclusion, ...]:
    kept = []
    for exclusion in table.exclusions:
        left = {
            name: tuple(value for value in values if value in domains[name])
            for name, values in exclusion.axes.items()
            if name in live
        }
        if len(left) < len(exclusion.axes) or not all(left.values()):
            continue
        if all(len(values) == len(domains[name]) for name, values in left.items()):
            names = " and ".join(left)
            raise SpecError(
                [
                    Fault(
                        OVERRIDES,
                        dict(left),
                        f"{names} exclude each other; leave 0 among one's choices",
                    )
                ]
            )
        kept.append(Exclusion(axes=left))
    return tuple(kept)

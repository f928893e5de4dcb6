"""Reads untrusted mappings field by field and gathers every fault instead of stopping at the first.

Used by `spec` (manifests) and `steps` (job documents). A reader never raises: it returns a usable
default, notes the fault, and `raise_faults` reports them together.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from qtt_core.errors import ABSENT, Fault, SpecError

T = TypeVar("T")

DECIMAL = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?")
"""A decimal of at most 32 characters is finite: the exponent has two digits."""
DECIMAL_LENGTH = DURATION_LENGTH = 32
DURATION = re.compile(r"([0-9]+(\.[0-9]+)?(h|ms|m|s|us|µs|ns))+")
_LONGEST_NANOSECONDS = 2**63 - 1  # what Go's durations hold: 292 years
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(h|ms|m|s|us|µs|ns)")
_INT32 = 2**31 - 1
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def parse_duration(text: str) -> float | None:
    """Seconds of a Go duration such as `4h30m`, or None when the text is none."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


class Fields:
    """One mapping under a path; remembers which keys were read, so that the rest are unknown."""

    def __init__(self, value: object, path: str, faults: list[Fault]) -> None:
        self.path = path
        self.faults = faults
        self._known: set[str] = set()
        if isinstance(value, Mapping):
            self._values: Mapping[str, object] = value
        else:
            self._values = {}
            self.fault("", value, "use a mapping of fields")

    def at(self, name: str) -> str:
        """The full path of a field."""
        return f"{self.path}.{name}" if self.path and name else self.path or name

    def fault(self, name: str, value: object, expected: str) -> None:
        """Note a fault of the field `name` (empty: of this mapping itself)."""
        self.faults.append(Fault(self.at(name), value, expected))

    def has(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> object:
        """The value as it came, None when absent."""
        self._known.add(name)
        return self._values.get(name)

    def child(self, name: str, *, required: bool = False) -> Fields:
        """The mapping below `name`; an empty one when absent."""
        value = self.raw(name)
        if value is None:
            if required:
                self.fault(name, ABSENT, "is required")
            value = {}
        return Fields(value, self.at(name), self.faults)

    def inner(self, name: str) -> Fields:
        """The mapping below `name` read once more, to judge its values: notes no wrong type."""
        value = self._values.get(name)
        return Fields(value if isinstance(value, Mapping) else {}, self.at(name), self.faults)

    def text(
        self,
        name: str,
        default: str | None = None,
        *,
        required: bool = False,
        choices: Sequence[str] | None = None,
        pattern: str | None = None,
        longest: int = 253,
        hint: str = "",
    ) -> str:
        """A string; `choices` and `pattern` restrict it, `hint` says what would be right."""
        value = self._get(name, required=required)
        if value is None:
            return default if default is not None else ""
        if not isinstance(value, str):
            self.fault(name, value, hint or "use a string (quote it)")
        elif choices is not None and value not in choices:
            self.fault(name, value, f"use one of {', '.join(choices)}")
        elif pattern is not None and not re.fullmatch(pattern, value):
            self.fault(name, value, hint or f"must match {pattern}")
        elif len(value) > longest:
            self.fault(name, value, f"use at most {longest} characters")
        else:
            return value
        return default if default is not None else ""

    def optional_text(self, name: str, **rules: object) -> str | None:
        """As `text`, but None when absent."""
        if not self.has(name):
            self._known.add(name)
            return None
        return self.text(name, **rules)  # type: ignore[arg-type]  # same keywords as text

    def integer(
        self,
        name: str,
        default: int = 0,
        *,
        low: int | None = None,
        high: int | None = None,
        required: bool = False,
    ) -> int:
        """An integer within [low, high]."""
        value = self._get(name, required=required)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or (low is not None and value < low)
            or (high is not None and value > high)
        ):
            self.fault(name, value, f"use an integer{_range(low, high)}")
        else:
            return value
        return default

    def optional_integer(
        self, name: str, *, low: int | None = None, high: int | None = None
    ) -> int | None:
        """As `integer`, but None when absent."""
        return self.integer(name, low=low, high=high) if self._present(name) else None

    def number(
        self,
        name: str,
        default: float = 0.0,
        *,
        low: float | None = None,
        high: float | None = None,
        required: bool = False,
    ) -> float:
        """A finite JSON number within [low, high]."""
        value = self._get(name, required=required)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault(name, value, f"use a number{_range(low, high)}")
        elif not math.isfinite(value):
            self.fault(name, value, "use a finite number")
        elif (low is not None and value < low) or (high is not None and value > high):
            self.fault(name, value, f"use a number{_range(low, high)}")
        else:
            return float(value)
        return default

    def decimal(
        self, name: str, *, low: float | None = None, high: float | None = None
    ) -> float | None:
        """A decimal in a quoted string (API conventions ban floats); None when absent."""
        value = self._get(name)
        if value is None:
            return None
        if (
            not isinstance(value, str)
            or not DECIMAL.fullmatch(value)
            or len(value) > DECIMAL_LENGTH
        ):
            self.fault(name, value, _quoted(value))
            return None
        number = float(value)
        if (
            not math.isfinite(number)
            or (low is not None and number < low)
            or (high is not None and number > high)
        ):
            self.fault(name, value, f"use a decimal{_range(low, high)}")
            return None
        return number

    def duration(self, name: str) -> float | None:
        """Seconds of a positive Go duration; None when absent."""
        value = self._get(name)
        if value is None:
            return None
        if isinstance(value, str) and len(value) > DURATION_LENGTH:
            self.fault(name, value, f"use at most {DURATION_LENGTH} characters")
            return None
        seconds = parse_duration(value) if isinstance(value, str) else None
        if seconds is None or not 1 <= seconds * 1e9 <= _LONGEST_NANOSECONDS:
            self.fault(name, value, "must be a positive duration such as 4h30m")
            return None
        return seconds

    def boolean(self, name: str, default: bool = False) -> bool:
        """True or false, never a string."""
        value = self._get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault(name, value, "use true or false (not quoted)")
            return default
        return value

    def items(self, name: str, *, longest: int) -> tuple[object, ...]:
        """A list of at most `longest` items; empty when absent."""
        value = self._get(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            self.fault(name, value, "use a list")
            return ()
        if len(value) > longest:
            self.fault(name, f"{len(value)} items", f"use at most {longest}")
            return ()
        return tuple(value)

    def mapping(self, name: str, *, longest: int = 64) -> Mapping[str, object]:
        """A free mapping with string keys; empty when absent."""
        value = self._get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or any(not isinstance(key, str) for key in value):
            self.fault(name, value, "use a mapping with string keys")
            return {}
        if len(value) > longest:
            self.fault(name, f"{len(value)} entries", f"use at most {longest}")
            return {}
        return value

    def refuse_unknown(self) -> None:
        """Note a fault for every key that nobody has read."""
        known = ", ".join(sorted(self._known))
        for key in self._values:
            if key not in self._known:
                meant = nearest(str(key), sorted(self._known), otherwise=f"known here: {known}")
                self.fault(str(key), self._values[key], f"unknown field; {meant}")

    def _present(self, name: str) -> bool:
        self._known.add(name)
        return self.has(name)

    def _get(self, name: str, *, required: bool = False) -> object:
        value = self.raw(name)
        if value is None and required:
            self.fault(name, ABSENT, "is required")
        return value


def nearest(name: str, known: Sequence[str], *, otherwise: str) -> str:
    """`did you mean …?` where a known name is close, else what the caller says instead."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else otherwise


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise SpecError with all faults, if there are any."""
    if faults:
        raise SpecError(faults)


def _quoted(value: object) -> str:
    """What to write instead of a bare number: API conventions want decimals as strings."""
    bare = isinstance(value, int | float) and not isinstance(value, bool)
    return f'quote it: "{value}"' if bare else 'use a quoted decimal such as "0.93"'


def _range(low: float | None, high: float | None) -> str:
    if high is not None and high >= _INT32:  # a type's limit tells nobody anything
        high = None
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of at least {low}"
    return f" of at most {high}" if high is not None else ""

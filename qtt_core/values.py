"""Hyperparameter values as they arrive (text, numpy scalars, spellings of off) made canonical.

Used wherever a configuration enters: manifests, ledgers, job documents, ConfigSpace samples. A
value leaves as the equal member of the legal values: equal configurations have equal JSON.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from qtt_core.steps import Scalar

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WORDS: dict[str, bool] = {"true": True, "false": False}


def plain(value: object) -> object:
    """A numpy scalar as the Python value it holds; anything else as it is."""
    if isinstance(value, str):
        return str(value)  # np.str_ is a str, but torch and JSON writers may refuse it
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; booleans are not numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_off(value: object) -> bool:
    """Whether a value is one of the spellings of off: null, "none", false, 0."""
    return value is None or value == "none" or value is False or (is_number(value) and value == 0)


def match(value: object, legal: Sequence[Scalar], *, off: Scalar = None) -> Scalar:
    """The member of `legal` that equals `value`; any spelling of off is `off` where that is legal.

    Text is read as what it spells (`parse_value`); True is not 1; betas may be a list or tuple.

    Raises: ValueError if none is equal.
    """
    value = plain(value)
    for member in legal:
        if same(value, member):
            return member
    if off is not None and off in legal and is_off(value):
        return off
    if isinstance(value, str):
        return parse_value(value, legal, off=off)
    if isinstance(value, list | tuple):
        return _sequence(value, legal)
    raise ValueError(f"{value!r} is not one of {shown(legal)}")


def parse_value(text: str, legal: Sequence[Scalar], *, off: Scalar = None) -> Scalar:
    """A manifest's quoted value ("1e-3", "true", "none") as the equal member of `legal`.

    Raises: ValueError if none is equal.
    """
    text = text.strip()
    candidates: list[object] = [text]
    if text.lower() in _WORDS:
        candidates.append(_WORDS[text.lower()])
    if _NUMBER.fullmatch(text):
        candidates.append(float(text))
    for candidate in candidates:
        for member in legal:
            if same(candidate, member):
                return member
    if off is not None and off in legal and any(is_off(candidate) for candidate in candidates):
        return off
    if text[:1] in {"(", "["}:
        return _sequence(_literal(text), legal)
    raise ValueError(f"{text!r} is not one of {shown(legal)}")


def same(value: object, member: object) -> bool:
    """Equality that keeps booleans, numbers and text apart: True is not 1, and 1 is 1.0."""
    if isinstance(value, bool) or isinstance(member, bool):
        return value is member
    if is_number(value) and is_number(member):
        return value == member
    return type(value) is type(member) and value == member


def shown(legal: Sequence[Scalar]) -> str:
    """Legal values for a message, as a manifest would spell them."""
    return ", ".join(spelled(value) for value in legal)


def spelled(value: Scalar) -> str:
    """A value as a manifest spells it."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def split_choices(text: str) -> list[str]:
    """The items of a comma list; commas inside parentheses or brackets do not separate."""
    items, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            items.append(text[start:position].strip())
            start = position + 1
    return [*items, text[start:].strip()]


def _sequence(value: object, legal: Sequence[Scalar]) -> Scalar:
    """Betas: a pair of numbers equals the member whose text spells the same pair."""
    if isinstance(value, list | tuple):
        for member in legal:
            if isinstance(member, str) and _literal(member) == tuple(value):
                return member
    raise ValueError(f"{value!r} is not one of {shown(legal)}")


def _literal(text: str) -> object:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value

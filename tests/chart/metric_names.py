"""Which metrics and labels a PromQL expression names, and which ones the operator has."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qtt_operator.metrics import COUNTERS, GAUGES, HISTOGRAMS

NAMES = (*GAUGES, *COUNTERS, *HISTOGRAMS)
TARGET = {"job", "instance"}
"""Labels that Prometheus adds to all it scrapes; `namespace` too, where a metric has none."""


def series() -> dict[str, set[str]]:
    """Name of each series that the operator shows -> its labels."""
    found = {f"quicktune_{name}": set(labels) for name, (_, labels) in GAUGES.items()}
    found |= {f"quicktune_{name}_total": set(labels) for name, (_, labels) in COUNTERS.items()}
    for name, (_, labels, _) in HISTOGRAMS.items():
        found |= {f"quicktune_{name}_{part}": set(labels) for part in ("sum", "count")}
        found[f"quicktune_{name}_bucket"] = {*labels, "le"}
    return found


def faults(expression: str) -> Iterator[str]:
    """What an expression asks of us and we do not have."""
    known = series()
    for name, labels in re.findall(r"\b(quicktune_\w+)(?:\{([^}]*)\})?", expression):
        if name not in known:
            yield f"no metric {name}"
            continue
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels))
        yield from (f"{name} has no label {x}" for x in asked - known[name] - TARGET)

"""What an attempt's pod learns from how earlier ones ended: more memory, another node. Pure.

Works on the rendered pod, after everybody else: the template's own wishes stay in force.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

Object = dict[str, Any]

HOSTNAME = "kubernetes.io/hostname"
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"

_UNITS = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
}  # fmt: skip
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([0-9]{1,2})|([kMGTP]|[KMGTP]i)?)")


def enlarge(container: Object, factor: float) -> None:
    """Multiply the memory a container asks for and may use; devices have no such size."""
    for amounts in (container.get("resources") or {}).values():
        if isinstance(amounts, dict) and "memory" in amounts:
            amounts["memory"] = larger(amounts["memory"], factor)


def larger(quantity: object, factor: float) -> str:
    """A quantity of bytes times a factor, in whole MiB; one that we cannot read stays."""
    match = _QUANTITY.fullmatch(str(quantity))
    if match is None:
        return str(quantity)
    number, exponent, unit = match.groups()
    size = float(number) * (10 ** int(exponent) if exponent else _UNITS[unit or ""])
    return f"{math.ceil(size * factor / 2**20)}Mi"


def avoid(pod: Object, nodes: Sequence[str], *, must: bool) -> None:
    """Keep a pod off these nodes; without `must` only if there is another one."""
    if not nodes:
        return
    elsewhere = {"key": HOSTNAME, "operator": "NotIn", "values": list(nodes)}
    affinity = pod.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    if not must:
        term = {"weight": 100, "preference": {"matchExpressions": [elsewhere]}}
        affinity.setdefault(_PREFERRED, []).append(term)
        return
    required = affinity.setdefault(_REQUIRED, {})
    terms = required.setdefault("nodeSelectorTerms", []) or [{}]
    for term in terms:  # one of the terms must hold, so each of them must exclude the nodes
        term["matchExpressions"] = [*(term.get("matchExpressions") or ()), elsewhere]
    required["nodeSelectorTerms"] = terms

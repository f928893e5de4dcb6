"""A strategic merge of pod specs, as `kubectl patch` does it, for the few lists a pod has. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Object = dict[str, Any]

_KEYED = {
    "containers": "name", "initContainers": "name", "env": "name", "volumes": "name",
    "imagePullSecrets": "name", "volumeMounts": "mountPath",
}  # fmt: skip
_DEEP = frozenset({"containers", "initContainers"})
"""Lists whose members are merged; an environment variable, a volume or a mount has one source."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Object:
    """A strategic merge of pod specs: maps deeply, lists of named things by name, null removes.

    Tolerations are appended; every other list is replaced.
    """
    merged: Object = {key: _copy(value) for key, value in base.items()}
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        elif key in _KEYED and isinstance(merged.get(key), list):
            merged[key] = _merge_named(merged[key], value, _KEYED[key], deep=key in _DEEP)
        elif key == "tolerations" and isinstance(merged.get(key), list):
            merged[key] += [_copy(item) for item in value if item not in merged[key]]
        else:
            merged[key] = _copy(value)
    return merged


def _merge_named(
    base: Sequence[Object], over: Sequence[Object], key: str, *, deep: bool
) -> list[Object]:
    merged = {item.get(key): item for item in base}
    for item in over:
        known = merged.get(item.get(key), {}) if deep else {}
        merged[item.get(key)] = merge(known, item)
    return list(merged.values())


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value

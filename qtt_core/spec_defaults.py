"""What the API server fills into a manifest's `spec`; the parser fills in the same.

The defaults are the CRD's (30-kubernetes 1.2). They are filled in before anything is read, so that
the recorded spec of a local run equals the one a cluster would store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "": {
        "suspend": False,
        "suspendPolicy": "Drain",
        "stop": False,
        "parallelism": 1,
        "search": {"space": "native"},
        "objective": {},
        "fidelity": {"max": 50},
        "optimizer": {},
        "trainer": {},
        "weights": {},
        "failurePolicy": {},
        "gpuShare": "1",
        "deletionPolicy": "Retain",
    },
    "dataset": {
        "path": "",
        "format": "ImageFolder",
        "trainSplit": "train",
        "valSplit": "val",
        "testSplit": "test",
        "inChannels": 3,
    },
    "search": {"portfolio": "Auto", "hub": "timm24", "poolSize": 512},
    "search.configSpaceRef": {"key": "space.json"},
    "search.hubRef": {"key": "hub.json"},
    "objective": {"metric": "top1"},
    "fidelity": {"step": 1, "stepsPerJob": "Auto"},
    "optimizer": {
        "algorithm": "QuickTune",
        "acquisition": "EI",
        "costAware": True,
        "refit": "Auto",
    },
    "trainer": {"custom": False, "devices": 1},
    "checkpoint": {"subPath": "", "scope": "Run", "retention": "Incumbent", "topK": 3},
    "failurePolicy": {
        "maxAppFailuresPerConfig": 1,
        "maxInfraRetriesPerStep": 6,
        "onOOM": "FailConfig",
    },
}
"""What the API server fills in, per object; the objects of the first entry appear when absent."""


def with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The spec as an API server would store it: nulls dropped, defaults filled in.

    Null means absent everywhere but inside `template.spec`, which has no schema.
    """
    spec = {
        name: value if name == "template" else _without_nulls(value)
        for name, value in raw.items()
        if value is not None
    }
    for path, defaults in DEFAULTS.items():
        target: Any = spec
        for name in path.split(".") if path else ():
            target = target.get(name) if isinstance(target, dict) else None
        if isinstance(target, dict):
            for name, value in defaults.items():
                target.setdefault(name, dict(value) if isinstance(value, Mapping) else value)
    return spec


def _without_nulls(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, list | tuple) else value

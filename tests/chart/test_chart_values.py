"""What an install may not ask for is refused by `helm template` and by `helm install` alike."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Answer = Callable[..., subprocess.CompletedProcess[str]]
Object = dict[str, Any]

EXTERNAL = {"bundled": {"enabled": False}}
REFUSED: dict[str, tuple[Object, str]] = {
    "a misspelt key": ({"replica": 2}, "replica"),
    "a misspelt key inside": ({"redis": {"bundled": {"enable": False}}}, "enable"),
    "a misspelt key deep inside": ({"metrics": {"serviceMonitor": {"on": True}}}, "on"),
    "a trainer key of the manifest": ({"trainer": {"devices": 2}}, "devices"),
    "three replicas": ({"replicas": 3}, "replicas"),
    "no replica": ({"replicas": 0}, "replicas"),
    "replicas as a word": ({"replicas": "two"}, "replicas"),
    "a namespace that is none": ({"watchNamespaces": ["Vision"]}, "watchNamespaces"),
    "a namespace twice": ({"watchNamespaces": ["a", "a"]}, "watchNamespaces"),
    "namespaces as a word": ({"watchNamespaces": "a"}, "watchNamespaces"),
    "a password in the URL": (
        {"redis": {**EXTERNAL, "external": {"url": "redis://me:secret@host:6379"}}},
        "url",
    ),
    "a URL of another kind": ({"redis": {**EXTERNAL, "external": {"url": "http://host"}}}, "url"),
    "options in the URL": (
        {"redis": {**EXTERNAL, "external": {"url": "rediss://host?ssl_cert_reqs=none"}}},
        "url",
    ),
    "two stores": ({"redis": {"external": {"url": "redis://host"}}}, "redis.bundled.enabled=false"),
    "no store": ({"redis": EXTERNAL}, "no Redis"),
    "TLS without TLS": (
        {
            "redis": {
                **EXTERNAL,
                "external": {"url": "redis://host", "tls": {"secretName": "ca"}},
            }
        },
        "rediss://",
    ),
    "a certificate from nowhere": (
        {
            "redis": {
                **EXTERNAL,
                "external": {"url": "rediss://host", "tls": {"clientCertificate": True}},
            }
        },
        "secretName",
    ),
    "a volume without a number": ({"redis": {"bundled": {"storage": {"size": "big"}}}}, "size"),
    "weights fetched sometimes": ({"trainer": {"weights": {"fetch": "Always"}}}, "fetch"),
    "a hub with a password": (
        {"trainer": {"weights": {"endpoint": "https://me:secret@hub"}}},
        "endpoint",
    ),
    "memory in Kubernetes' units": ({"redis": {"bundled": {"maxMemory": "1Gi"}}}, "maxMemory"),
    "an access mode that is none": (
        {"trainer": {"checkpointDefaults": {"accessModes": ["RWO"]}}},
        "accessModes",
    ),
    "no access mode": ({"trainer": {"checkpointDefaults": {"accessModes": []}}}, "accessModes"),
    "a digest that is a tag": ({"image": {"digest": "v1"}}, "digest"),
    "an image without a name": ({"image": {"repository": ""}}, "repository"),
    "a pull policy that is none": ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    "a trainer on the host's network": (
        {"trainer": {"podDefaults": {"hostNetwork": True}}},
        "hostNetwork",
    ),
    "another account for trainers": (
        {"trainer": {"podDefaults": {"serviceAccountName": "admin"}}},
        "serviceAccountName",
    ),
    "no worker": ({"optimizer": {"workers": 0}}, "workers"),
    "nine workers": ({"optimizer": {"workers": 9}}, "workers"),
    "no Job of a run": ({"limits": {"maxParallelism": 0}}, "maxParallelism"),
    "more Jobs of a run than the CRD takes": (
        {"limits": {"maxParallelism": 513}},
        "maxParallelism",
    ),
    "an optimizer without a name": ({"optimizer": {"external": [""]}}, "external"),
    "a priors claim that is a path": ({"optimizer": {"priorsClaim": "/priors"}}, "priorsClaim"),
    "no call of the API": ({"api": {"qps": 0}}, "qps"),
    "a port of root's": ({"metrics": {"port": 80}}, "port"),
    "an interval without a unit": ({"metrics": {"serviceMonitor": {"interval": "30"}}}, "interval"),
    "two monitors of the same pods": (
        {"metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}},
        "metrics.podMonitor",
    ),
    "a lease of a second": ({"leaseSeconds": 1}, "leaseSeconds"),
    "a variable from a Secret": (
        {"extraEnv": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]},
        "valueFrom",
    ),
    "an account that nobody makes": ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
    "a limit without a number": ({"resources": {"limits": {"memory": True}}}, "memory"),
    "a name too long for a Lease": ({"fullnameOverride": "q" * 41}, "fullnameOverride"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_by_its_name(case: str, helm_template: Answer) -> None:
    values, named = REFUSED[case]

    done = helm_template(values)

    assert done.returncode != 0
    assert named in done.stderr


def test_every_value_that_the_schema_knows_has_a_default_and_the_reverse(chart: Path) -> None:
    schema = json.loads((chart / "values.schema.json").read_text())
    defaults = yaml.safe_load((chart / "values.yaml").read_text())

    assert sorted(_described(schema, schema)) == sorted({"global", *_given(defaults, schema)})


def test_no_object_of_the_schema_takes_unknown_keys(chart: Path) -> None:
    """Free maps are of strings or quantities; `global` is Helm's, a PodSpec goes by its names."""
    schema = json.loads((chart / "values.schema.json").read_text())

    open_ones = {
        path
        for path, node in _objects(schema, "")
        if node.get("additionalProperties") is not False
        and not isinstance(node.get("additionalProperties"), dict)
    }

    assert open_ones == {"/properties/global", "/properties/trainer/properties/podDefaults"}
    assert schema["properties"]["trainer"]["properties"]["podDefaults"]["propertyNames"]["enum"]


def _objects(node: Any, path: str) -> Iterator[tuple[str, Object]]:
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield path, node
        for key, value in node.items():
            yield from _objects(value, f"{path}/{key}")


def _resolved(node: Object, schema: Object) -> Object:
    found: Object = schema
    for part in node.get("$ref", "").split("/")[1:]:
        found = found[part]
    return found if "$ref" in node else node


def _described(node: Object, schema: Object, path: str = "") -> Iterator[str]:
    """Paths of all leaves; what stands in resources, lists and free maps is one leaf."""
    for name, child in node["properties"].items():
        inner, here = _resolved(child, schema), f"{path}{name}"
        if inner.get("properties") and name != "resources":
            yield from _described(inner, schema, f"{here}.")
        else:
            yield here


def _given(defaults: Object, schema: Object) -> Iterator[str]:
    def walk(value: Object, node: Object, path: str) -> Iterator[str]:
        for name, child in value.items():
            inner = _resolved(node["properties"][name], schema)
            if inner.get("properties") and name != "resources":
                yield from walk(child, inner, f"{path}{name}.")
            else:
                yield f"{path}{name}"

    return walk(defaults, schema, "")

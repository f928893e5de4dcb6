"""Sets of values that every check of rendered objects goes through, and how to pick objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Object = dict[str, Any]

VALUES: Mapping[str, Object] = {
    "default": {},
    "two-replicas": {"replicas": 2, "optimizer": {"workers": 3}, "priorityClassName": "high"},
    "namespaced": {
        "watchNamespaces": ["vision", "speech"],
        "trainer": {"podDefaults": {"nodeSelector": {"pool": "gpu"}}, "allowHostPath": True},
    },
    "external-redis": {
        "redis": {
            "bundled": {"enabled": False},
            "external": {
                "url": "rediss://tuner@redis.example:6380/2",
                "tls": {"secretName": "redis-ca", "clientCertificate": True},
            },
            "existingSecret": {"name": "redis-login", "key": "pw"},
        }
    },
    "monitored": {
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboards": {"annotations": {"grafana_folder": "Quick-Tune"}},
        },
        "networkPolicy": {
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"team": "monitoring"}}}]
        },
    },
    "everything": {
        "replicas": 2,
        "image": {"digest": f"sha256:{'0' * 64}"},
        "imagePullSecrets": [{"name": "login"}],
        "redis": {
            "existingSecret": {"name": "mine"},
            "bundled": {"storage": {"storageClassName": "fast"}},
        },
        "trainer": {
            "prepull": {"enabled": True, "tolerations": [{"operator": "Exists"}]},
            "checkpointDefaults": {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs"},
            "weights": {
                "claimName": "timm", "fetch": "Never", "endpoint": "http://mirror:8080/hub",
                "accessModes": ["ReadWriteMany"], "size": "9Gi", "storageClassName": "nfs",
            },
            "jobTTLSeconds": 10_000_000,
        },
        "optimizer": {"priorsClaim": "priors", "external": ["grid"]},
        "metrics": {"podMonitor": {"enabled": True, "interval": "15s", "labels": {"team": "ml"}}},
        "limits": {"maxParallelism": 16},
        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "4Gi"}},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "infra", "operator": "Exists", "effect": "NoSchedule"}],
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
        ],
        "podLabels": {"team": "vision"},
        "podAnnotations": {"a": "b"},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "serviceAccount": {"annotations": {"a": "b"}},
        "fullnameOverride": "tuner",
    },
    "bare": {
        "crds": {"install": False},
        "rbac": {"create": False},
        "serviceAccount": {"create": False, "name": "given"},
        "networkPolicy": {"enabled": False},
        "metrics": {"dashboards": {"enabled": False}},
    },
}  # fmt: skip


def one(objects: list[Object], kind: str, name: str = "quicktune-operator") -> Object:
    """The one object of a kind and name."""
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]

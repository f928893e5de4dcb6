"""NetworkPolicies of Jobs: nothing reaches a step and it reaches nothing; `weights` has a way out.

An operator of the whole cluster makes them with a run's first Job, since nobody knows the namespace
before; with `watchNamespaces` the chart does. One that is there stays as it is, whoever changed it.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from qtt_core.errors import ClusterError
from qtt_operator.cluster import Cluster, Resource
from qtt_operator.names import COMPONENT_LABEL, FETCHES

Object = dict[str, Any]

POLICIES = Resource(group="networking.k8s.io", version="v1", plural="networkpolicies")
NAME, WAY_OUT = "quicktune-steps", "quicktune-weights"
STEPS = {"app.kubernetes.io/name": "quicktune-step"}
CONFLICT = 409


async def isolate(cluster: Cluster, namespace: str, endpoint: str = "") -> None:
    """See to it that the policies are there. Raises: ClusterError."""
    for policy in (build_policy(namespace), build_way_out(namespace, endpoint)):
        if await cluster.get(POLICIES, namespace, policy["metadata"]["name"]) is not None:
            continue
        try:
            await cluster.create(POLICIES, namespace, policy)
        except ClusterError as error:
            if error.status != CONFLICT:
                raise


def build_policy(namespace: str) -> Object:
    """For every pod of a Job, whatever run it belongs to."""
    return _policy(NAME, namespace, {"podSelector": {"matchLabels": STEPS}})


def build_way_out(namespace: str, endpoint: str = "") -> Object:
    """For pods that fetch weights: names are looked up, a hub or a mirror is asked.

    Policies add up: what this one allows, the one for every pod does not take away.
    """
    names = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    ports = dict.fromkeys((443, _port_of(endpoint)))
    hosts = [{"port": port, "protocol": "TCP"} for port in ports]
    return _policy(
        WAY_OUT,
        namespace,
        {
            "podSelector": {"matchLabels": {**STEPS, COMPONENT_LABEL: FETCHES}},
            "egress": [{"ports": names}, {"ports": hosts}],
        },
    )


def _port_of(endpoint: str) -> int:
    parts = urlsplit(endpoint)
    return parts.port or (80 if parts.scheme == "http" else 443)


def _policy(name: str, namespace: str, spec: Object) -> Object:
    labels = {"app.kubernetes.io/managed-by": "quicktune-operator"}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {**spec, "policyTypes": ["Ingress", "Egress"]},
    }

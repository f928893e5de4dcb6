"""The NetworkPolicy that cuts steps off: nothing reaches them, and they reach nothing.

An operator of the whole cluster makes it with a run's first Job, since nobody knows the namespace
before; with `watchNamespaces` the chart does. One that is there stays as it is, whoever changed it.
"""

from __future__ import annotations

from typing import Any

from qtt_core.errors import ClusterError
from qtt_operator.cluster import Cluster, Resource

Object = dict[str, Any]

POLICIES = Resource(group="networking.k8s.io", version="v1", plural="networkpolicies")
NAME = "quicktune-steps"
STEPS = {"app.kubernetes.io/name": "quicktune-step"}
CONFLICT = 409


async def isolate(cluster: Cluster, namespace: str) -> None:
    """See to it that the policy is there. Raises: ClusterError."""
    if await cluster.get(POLICIES, namespace, NAME) is not None:
        return
    try:
        await cluster.create(POLICIES, namespace, build_policy(namespace))
    except ClusterError as error:
        if error.status != CONFLICT:
            raise


def build_policy(namespace: str) -> Object:
    """For every pod of a step, whatever run it belongs to."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": NAME,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": "quicktune-operator"},
        },
        "spec": {"podSelector": {"matchLabels": STEPS}, "policyTypes": ["Ingress", "Egress"]},
    }

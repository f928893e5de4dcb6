"""An operator for one namespace, with a Redis of its own, while the cluster's own one is away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from manifests import Object
from real_cluster import Kube, command


def narrowed(script: Path, shared: str, system: str, watched: str, *words: str) -> list[Object]:
    """What is installed in `shared` for all, for one namespace; `words` are Helm's."""
    own = ("--set", f"watchNamespaces={{{watched}}}", "--set", "crds.install=false", *words)
    text = command(str(script), *own).replace(shared, system)
    return [item for item in yaml.safe_load_all(text) if item and item["kind"] != "Namespace"]


@contextmanager
def own_operator(
    shared: Kube, system: Kube, watched: Kube, root: Path, *words: str
) -> Iterator[None]:
    """Install it into `system` for `watched`, and wait until it is ready."""
    shared.kubectl("scale", "deployment/quicktune-operator", "--replicas=0")
    try:
        shared.kubectl(
            "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/name=quicktune-operator"
        )
        script = root / "tests" / "testbed" / "operator.sh"
        items = narrowed(script, shared.namespace, system.namespace, watched.namespace, *words)
        for item in items:
            there = item["metadata"]["namespace"] == watched.namespace
            (watched if there else system).create(item)
        for workload in ("statefulset/redis", "deployment/quicktune-operator"):
            system.kubectl("rollout", "status", workload, "--timeout=120s")
        yield
    finally:
        shared.kubectl("scale", "deployment/quicktune-operator", "--replicas=1")

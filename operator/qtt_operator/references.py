"""What a TuningRun refers to on a cluster, resolved without building a space (a worker does that).

The main process stays small: ConfigSpace would bring SciPy and 75 MiB with it. `qtt lint` resolves
the same references from files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from qtt_core.errors import Fault, NotFoundError, SpecError
from qtt_core.hub import Hub, load_hub, read_hub, select
from qtt_core.spec import Reference, TuningRun
from qtt_core.steps import digest
from qtt_operator.cluster import CLAIMS, CONFIG_MAPS, Cluster
from qtt_operator.documents import Places
from qtt_operator.pods import CHECKPOINTS, DATA, SCRATCH, WEIGHTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A run's hub, cut to its models, and the text of its `configSpaceRef`, empty without one."""

    hub: Hub
    space_definition: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    """Field -> digest of the text it names, for the `run` event."""


async def resolve(cluster: Cluster, run: TuningRun) -> Resolved:
    """Read ConfigMaps and the hub. Raises: SpecError; ClusterError."""
    search, limits = run.spec.search, run.spec.search.model_limits
    texts: dict[str, str] = {}
    if search.hub_ref is None:
        hub = load_hub(search.hub)
    else:
        text = await _text(cluster, run.namespace, "spec.search.hubRef", search.hub_ref)
        texts["spec.search.hubRef"] = text
        hub = read_hub(search.hub_ref.name, text)
    ref, definition = search.config_space_ref, ""
    if ref is not None:
        definition = await _text(cluster, run.namespace, "spec.search.configSpaceRef", ref)
        texts["spec.search.configSpaceRef"] = definition
    hub = select(
        hub,
        models=search.models,
        max_params=limits.max_params,
        max_gmacs=limits.max_gmacs,
        licences=limits.licences,
        image_size=run.spec.dataset.image_size,
    )
    files = {name: _digest(name, text) for name, text in texts.items()}
    return Resolved(hub=hub, space_definition=definition, files=files)


def _digest(name: str, text: str) -> str:
    """A digest of the content, whatever its layout. Raises: SpecError."""
    try:
        return digest(json.loads(text, parse_constant=str))
    except ValueError as error:
        raise SpecError([Fault(name, "text", f"is no JSON: {error}")]) from error


async def require_claims(cluster: Cluster, run: TuningRun) -> None:
    """Raises: NotFoundError if a claim that the manifest names is not there; ClusterError."""
    named = {
        "spec.dataset.claimName": run.spec.dataset.claim_name,
        "spec.weights.claimName": run.spec.weights.claim_name,
    }
    for name, claim in named.items():
        if claim and await cluster.get(CLAIMS, run.namespace, claim) is None:
            remedy = f"no such PersistentVolumeClaim in {run.namespace}"
            raise NotFoundError([Fault(name, claim, remedy)])


async def _text(cluster: Cluster, namespace: str, name: str, reference: Reference) -> str:
    found = await cluster.get(CONFIG_MAPS, namespace, reference.name)
    if found is None:
        raise NotFoundError([Fault(name, reference.name, f"no such ConfigMap in {namespace}")])
    data = found.get("data") or {}
    if reference.key not in data:
        keys = ", ".join(sorted(data)) or "it is empty"
        raise SpecError([Fault(f"{name}.key", reference.key, f"the ConfigMap has {keys}")])
    return str(data[reference.key])


def places(run: TuningRun) -> Places:
    """Where a step finds things in its pod; it never uses the network."""
    weights = WEIGHTS if run.spec.weights.claim_name else ""
    return Places(data=DATA, root=CHECKPOINTS, weights=weights, cache=SCRATCH, offline=True)

"""What a TuningRun refers to on a cluster, resolved without building a space (a worker does that).

The main process stays small: ConfigSpace would bring SciPy and 75 MiB with it. `qtt lint` resolves
the same references from files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qtt_core.errors import Fault, NotFoundError, SpecError
from qtt_core.hub import Hub, load_hub, read_hub, select
from qtt_core.plan import Supply
from qtt_core.spec import Reference, TuningRun
from qtt_core.steps import digest
from qtt_operator.cluster import CLAIMS, CONFIG_MAPS, JOBS, Cluster, Object
from qtt_operator.documents import Places
from qtt_operator.names import FILLED_BY_ANNOTATION
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


async def require_claims(cluster: Cluster, run: TuningRun, supply: Supply, *, ours: bool) -> Supply:
    """The supply, without models to fetch where nobody can write to their claim.

    `ours`: we make the claim of weights. Raises: NotFoundError if another claim is not there, or a
    Job has yet to fill the data set's; ClusterError.
    """
    data = await _claim(cluster, run, "spec.dataset.claimName", run.spec.dataset.claim_name)
    await _require_filled(cluster, run, data)
    if not supply.claim or ours:
        return supply
    weights = await _claim(cluster, run, "spec.weights.claimName", supply.claim)
    fixed = set((weights.get("spec") or {}).get("accessModes") or ()) == {"ReadOnlyMany"}
    return replace(supply, models=()) if fixed else supply


async def _claim(cluster: Cluster, run: TuningRun, name: str, claim: str) -> Object:
    found = await cluster.get(CLAIMS, run.namespace, claim)
    if found is None:
        remedy = f"no such PersistentVolumeClaim in {run.namespace}"
        raise NotFoundError([Fault(name, claim, remedy)])
    return found


async def _require_filled(cluster: Cluster, run: TuningRun, claim: Object) -> None:
    """A claim may name the Job that fills it: applied together, a run waits for its images."""
    name = (claim["metadata"].get("annotations") or {}).get(FILLED_BY_ANNOTATION)
    if not name:
        return
    job = await cluster.get(JOBS, run.namespace, name)
    conditions = {} if job is None else (job.get("status") or {}).get("conditions") or ()
    true = {c["type"] for c in conditions if c["status"] == "True"}
    if "Complete" in true:
        return
    how = "has failed: see its log" if "Failed" in true else "has not filled it yet"
    how = f"is not there; remove the claim's annotation {FILLED_BY_ANNOTATION}" if not job else how
    remedy = f"Job {name} {how}"
    raise NotFoundError([Fault("spec.dataset.claimName", claim["metadata"]["name"], remedy)])


async def _text(cluster: Cluster, namespace: str, name: str, reference: Reference) -> str:
    found = await cluster.get(CONFIG_MAPS, namespace, reference.name)
    if found is None:
        raise NotFoundError([Fault(name, reference.name, f"no such ConfigMap in {namespace}")])
    data = found.get("data") or {}
    if reference.key not in data:
        keys = ", ".join(sorted(data)) or "it is empty"
        raise SpecError([Fault(f"{name}.key", reference.key, f"the ConfigMap has {keys}")])
    return str(data[reference.key])


def places(supply: Supply) -> Places:
    """Where a step finds things in its pod; it never uses the network."""
    weights = WEIGHTS if supply.claim else ""
    return Places(data=DATA, root=CHECKPOINTS, weights=weights, cache=SCRATCH, offline=True)

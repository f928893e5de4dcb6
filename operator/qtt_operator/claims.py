"""Claims for checkpoints: one a run, or one a configuration; their names, owners and nodes. Pure.

A claim of ours carries the run's labels. It is owned by the TuningRun, and so deleted with it, only
under `deletionPolicy: Delete` (30-kubernetes 5.7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtt_core.spec import RunSpec
from qtt_operator.names import CONFIG_LABEL, SHARED_WEIGHTS, checkpoint_claim, config_claim
from qtt_operator.owner import Object, RunObject, owner_labels, owner_reference
from qtt_operator.settings import ClaimDefaults

MANY_JOBS = 4
"""More parallel Jobs than this on one node's volume deserve a word."""


def is_per_config(spec: RunSpec) -> bool:
    """Whether every configuration has a claim of its own."""
    return spec.checkpoint is not None and spec.checkpoint.scope == "Config"


def claim_name(owner: RunObject, c: str = "") -> str:
    """The claim that holds the run's checkpoints, or those of configuration `c` (scope Config)."""
    checkpoint = owner.run.spec.checkpoint
    if checkpoint is not None and checkpoint.claim_name:
        return checkpoint.claim_name
    if is_per_config(owner.run.spec):
        return config_claim(owner.run.name, c, owner.uid)
    return checkpoint_claim(owner.run.name)


def build_claim(owner: RunObject, defaults: ClaimDefaults, c: str = "") -> Object | None:
    """The claim to make, None where the manifest names one that exists."""
    checkpoint = owner.run.spec.checkpoint
    if checkpoint is not None and checkpoint.claim_name:
        return None
    template = checkpoint.volume_claim_template if checkpoint is not None else None
    own = {CONFIG_LABEL: c} if is_per_config(owner.run.spec) else {}
    metadata: Object = {
        "name": claim_name(owner, c),
        "namespace": owner.run.namespace,
        "labels": {**owner_labels(owner), **own},
    }
    if owners(owner):
        metadata["ownerReferences"] = owners(owner)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": dict(template) if template else default_spec(defaults),
    }


def owners(owner: RunObject) -> list[Object]:
    """The owner references that a claim of ours should have now."""
    return [owner_reference(owner)] if owner.run.spec.deletion_policy == "Delete" else []


def wipes_shared_claim(spec: RunSpec) -> bool:
    """Whether the run's folder on a claim of the user's is to go with the TuningRun."""
    named = spec.checkpoint is not None and spec.checkpoint.claim_name
    return bool(named) and spec.deletion_policy == "Delete"


def access_modes(spec: RunSpec, defaults: ClaimDefaults) -> Sequence[str]:
    """What the claims that we make ask for; empty for a claim of the user's."""
    checkpoint = spec.checkpoint
    if checkpoint is not None and checkpoint.claim_name:
        return ()
    template = checkpoint.volume_claim_template if checkpoint is not None else None
    modes: Sequence[str] = template["accessModes"] if template else defaults.accessModes
    return modes


def is_on_one_node(spec: RunSpec, defaults: ClaimDefaults) -> bool:
    """Whether all pods of the run mount one claim that only one node can have.

    Whose claim it is knows what it can do: for one of the user's the template may say more.
    """
    modes = access_modes(spec, defaults)
    return bool(modes) and "ReadWriteMany" not in modes and not is_per_config(spec)


def unavailable(claim: Object) -> str:
    """What to say of a claim that nobody provides, and the way out."""
    name = claim["metadata"]["name"]
    kind = claim["spec"].get("storageClassName")
    of_class = f"class {kind}" if kind else "the default class"
    if name == SHARED_WEIGHTS:
        return (
            f"claim {name} asks {of_class} for ReadWriteMany and is still Pending; set"
            " the install's trainer.weights.storageClassName to a class that has it, or its"
            f" accessModes to [ReadWriteOnce]: a claim for each run (kubectl describe pvc {name})"
        )
    return (
        f"claim {name} asks {of_class} for ReadWriteMany and is still Pending; name a class that "
        "has it, or use accessModes [ReadWriteOnce]: all Jobs on one node, or with scope Config "
        f"one claim a configuration (kubectl describe pvc {name})"
    )


def one_node_advice(spec: RunSpec, defaults: ClaimDefaults) -> str:
    """What to say where many Jobs must share one node for their volume; empty where it is well."""
    if spec.parallelism <= MANY_JOBS or not is_on_one_node(spec, defaults):
        return ""
    return (
        f"{spec.parallelism} parallel Jobs share one ReadWriteOnce volume, so all run on one node; "
        "use checkpoint.volumeClaimTemplate with ReadWriteMany, or checkpoint.scope Config"
    )


def default_spec(defaults: ClaimDefaults) -> Mapping[str, Any]:
    """The spec of a claim that no manifest describes."""
    spec: Object = {
        "accessModes": list(defaults.accessModes),
        "resources": {"requests": {"storage": defaults.size}},
    }
    if defaults.storageClassName is not None:
        spec["storageClassName"] = defaults.storageClassName
    return spec

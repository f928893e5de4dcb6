"""Where a run's pretrained weights come from on a cluster: which claim, who fills it. Pure.

A claim that the manifest or the install names, else one of ours (30-kubernetes 5.5): one a run, or
one a namespace where the install's class has ReadWriteMany. Steps mount it read-only; one `weights`
Job may fill it. A hub whose weights ship with the trainer needs none of this.
"""

from __future__ import annotations

from qtt_core.hub import Hub
from qtt_core.plan import Supply
from qtt_core.spec import RunSpec, TuningRun
from qtt_operator.claims import default_spec
from qtt_operator.names import COMPONENT_LABEL, SHARED_WEIGHTS, weights_claim
from qtt_operator.owner import MANAGED, Object, RunObject, owner_reference
from qtt_operator.settings import OperatorSettings

HUB = "hub"
"""`weights` of a card whose file comes from a hub."""


def supply_of(run: TuningRun, hub: Hub, settings: OperatorSettings) -> Supply:
    """What the run's steps mount, and the models that a Job may fetch first."""
    wanted = tuple(card.name for card in hub.cards if card.weights == HUB)
    own = may_fetch(run.spec, settings)
    claim = run.spec.weights.claim_name or ""
    if not claim and wanted and not is_left_alone(run.spec):
        claim = settings.weights_claim or (own_claim(run.name, settings) if own else "")
    ref = run.spec.search.hub_ref
    return Supply(
        models=wanted if own and claim else (), claim=claim, offline=True,
        hub=ref.key if ref is not None else run.spec.search.hub,
    )  # fmt: skip


def may_fetch(spec: RunSpec, settings: OperatorSettings) -> bool:
    """Whether a Job with a way out may fill the claim."""
    asked = spec.weights.fetch or ("Never" if spec.trainer.custom else settings.weights_fetch)
    return asked == "Auto"


def is_left_alone(spec: RunSpec) -> bool:
    """Whether nobody but the user knows what weights are good for: the trainer is theirs."""
    return spec.trainer.custom and spec.weights.fetch is None


def own_claim(run: str, settings: OperatorSettings) -> str:
    """The claim that we make: of the run, or, where many nodes can mount it, of the namespace."""
    shared = "ReadWriteMany" in settings.weights_defaults.accessModes
    return SHARED_WEIGHTS if shared else weights_claim(run)


def build_weights_claim(owner: RunObject, claim: str, settings: OperatorSettings) -> Object | None:
    """The claim to make, None for one that somebody else makes.

    A run's own goes with the TuningRun, whatever `deletionPolicy` says: it holds copies only. It
    lacks the run's labels, by which claims of checkpoints are found.
    """
    if owner.run.spec.weights.claim_name or claim in {"", settings.weights_claim}:
        return None
    metadata: Object = {
        "name": claim,
        "namespace": owner.run.namespace,
        "labels": {**MANAGED, COMPONENT_LABEL: "weights"},
    }
    if claim != SHARED_WEIGHTS:
        metadata["ownerReferences"] = [owner_reference(owner)]
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": dict(default_spec(settings.weights_defaults)),
    }


def ties_to_one_node(run: TuningRun, claim: str, settings: OperatorSettings) -> bool:
    """Whether the run's weights lie on a volume of ours that only one node can have."""
    foreign = run.spec.weights.claim_name or settings.weights_claim
    return not foreign and claim == weights_claim(run.name)

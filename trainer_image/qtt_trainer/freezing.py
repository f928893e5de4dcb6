"""Which parameters train in which epoch: `pct_to_freeze`, `linear_probing`, LP-FT (20-trainer 3).

| Symbol | Meaning |
|---|---|
| n | layer groups of the backbone, from input to output |
| pct | share of the groups that is frozen |
| T | epochs of the whole curve; the switch of LP-FT lies at floor(T/2) |

Groups are timm's `group_matcher(coarse=False)`, without the classifier's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from timm.models import group_parameters
from timm.optim._param_groups import auto_group_layers
from torch import nn

from qtt_core.steps import Config, digest
from qtt_trainer.model import classifier_prefixes, is_head


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezePlan:
    """Names that train once the backbone does, and the epoch in which that begins.

    `head_only_until`: epochs before it train the classifier alone (T for pure linear probing).
    """

    head: frozenset[str]
    trainable: frozenset[str]
    head_only_until: int

    def names_at(self, epoch: int) -> frozenset[str]:
        """The parameters that train in an epoch (0-based)."""
        return self.head if epoch < self.head_only_until else self.trainable

    @property
    def digest(self) -> str:
        """Identity of the plan."""
        return digest([sorted(self.head), sorted(self.trainable), self.head_only_until])

    @property
    def backbone_trains(self) -> bool:
        """Whether any parameter outside the classifier ever trains."""
        return self.trainable != self.head


def layer_groups(model: nn.Module) -> dict[str, int]:
    """Parameter name -> group number, 0 next to the input; the head has the highest numbers.

    Source: timm's layer grouping, as for layer-wise learning-rate decay.
    """
    if hasattr(model, "group_matcher"):
        matcher = model.group_matcher(coarse=False)  # type: ignore[operator]  # a timm model
        groups = group_parameters(model, matcher, reverse=True)
        return {str(name): int(group) for name, group in groups.items()}
    return {str(name): int(group) for name, group in auto_group_layers(model).items()}  # type: ignore[no-untyped-call]


def frozen_names(model: nn.Module, pct: float) -> frozenset[str]:
    """Backbone parameters of the groups i with (i+1)/n <= pct: 0 is none, 1 is all."""
    prefixes = classifier_prefixes(model)
    groups = {name: i for name, i in layer_groups(model).items() if not is_head(name, prefixes)}
    order = {group: rank for rank, group in enumerate(sorted(set(groups.values())))}
    return frozenset(
        name for name, group in groups.items() if (order[group] + 1) / len(order) <= pct
    )


def plan_freezing(
    model: nn.Module, config: Config, *, max_fidelity: int, native: bool
) -> FreezePlan:
    """The plan of a configuration; depends on the absolute epoch and T only.

    Source: LP-FT, Kumar et al., ICLR 2022 (arXiv 2202.10054): probe first, then finetune. The
    public tool (our compat rule) probes for the whole run.
    """
    prefixes = classifier_prefixes(model)
    names = frozenset(name for name, _ in model.named_parameters())
    head = frozenset(name for name in names if is_head(name, prefixes))
    probing = bool(config.get("linear_probing"))
    pct = float(config.get("pct_to_freeze") or 0.0)
    trainable = names - frozen_names(model, pct)
    if not probing:
        return FreezePlan(head=head, trainable=trainable, head_only_until=0)
    if native:
        return FreezePlan(head=head, trainable=trainable, head_only_until=max_fidelity // 2)
    return FreezePlan(head=head, trainable=head, head_only_until=max_fidelity)


def apply_trainable(model: nn.Module, names: frozenset[str]) -> None:
    """Set `requires_grad`: a frozen prefix then builds no graph and stores no activations.

    Gradients of what no longer trains are dropped, so that no optimizer steps on them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None


def set_training_modes(model: nn.Module) -> None:
    """Train mode, but eval mode for every subtree whose parameters are all frozen.

    That stops BatchNorm statistics, dropout and drop-path inside the frozen part; a subtree without
    any parameter follows its parent.
    """
    model.train()
    _freeze_subtrees(model)


def _freeze_subtrees(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _freeze_subtrees(child)

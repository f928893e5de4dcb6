"""The four named spaces as tables: axes, when they are active, which exclude each other.

`space` turns these tables into a ConfigSpace; the trainer checks values against them without
loading ConfigSpace. Values are JSON scalars in canonical form (10-optimizer 2.1), off "none" or 0.
Sources: the tool paper's Table 3, the example space of the public tool, the space behind the
published curves (v1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qtt_core.steps import Scalar

Values = tuple[Scalar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One hyperparameter: legal values in order, our default, and what off is (None: nothing)."""

    name: str
    group: str
    values: Values
    default: Scalar
    ordinal: bool = True
    off: Scalar = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """`child` is active if every parent of `needs` and, if there are any, one of `any_of` holds.

    A parent holds when it is active itself and has one of the listed values.
    """

    child: str
    needs: Mapping[str, Values] = field(default_factory=dict)
    any_of: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """No configuration may have a listed value on every one of these axes."""

    axes: Mapping[str, Values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A named space; `model` stands for the hub's models, which `with_models` fills in."""

    space_id: str
    axes: tuple[Axis, ...]
    activations: tuple[Activation, ...]
    exclusions: tuple[Exclusion, ...] = ()
    batchnorm_only: tuple[str, ...] = ()
    """Axes that act only in models with BatchNorm."""
    sort_models: bool = False
    fixed: Mapping[str, Scalar] = field(default_factory=dict)
    """Axes that are not searched in this space."""

    def axis(self, name: str) -> Axis | None:
        """The axis of a name, None when the space has none."""
        return next((axis for axis in self.axes if axis.name == name), None)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, searched and fixed, in the table's order."""
        return tuple(axis.name for axis in self.axes)

    def with_models(self, models: Sequence[str], default: str, batchnorm: Sequence[str]) -> Table:
        """The table over a hub's models; `batchnorm` are those that have such layers."""
        names = tuple(sorted(models)) if self.sort_models else tuple(models)
        model = Axis(name="model", group="model", values=names, default=default, ordinal=False)
        rules = tuple(
            replace(rule, needs={**rule.needs, "model": tuple(batchnorm)})
            if rule.child in self.batchnorm_only
            else rule
            for rule in self.activations
        )
        return replace(
            self, axes=(model, *(a for a in self.axes if a.name != "model")), activations=rules
        )


BETAS: Values = ("(0.9, 0.999)", "(0.0, 0.99)", "(0.9, 0.99)", "(0.0, 0.999)")
ADAMS: Values = ("adam", "adamw", "adamp")
_REG: Values = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
_LR: Values = (1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2)


def _axis(name: str, group: str, values: Values, default: Scalar, off: Scalar = None) -> Axis:
    return Axis(name=name, group=group, values=values, default=default, off=off)


def _choice(name: str, group: str, values: Values, default: Scalar, off: Scalar = None) -> Axis:
    return Axis(name=name, group=group, values=values, default=default, ordinal=False, off=off)


_MODEL = _choice("model", "model", (), None)

_V1_AXES: tuple[Axis, ...] = (
    _MODEL,
    _axis("pct_to_freeze", "finetune", (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), 0.0, off=0.0),
    _axis("layer_decay", "finetune", ("none", 0.65, 0.75), "none", off="none"),
    _axis("linear_probing", "finetune", (False, True), False, off=False),
    _axis("stoch_norm", "finetune", (False, True), False, off=False),
    _axis("sp_reg", "finetune", _REG, 0.0, off=0.0),
    _axis("delta_reg", "finetune", _REG, 0.0, off=0.0),
    _axis("bss_reg", "finetune", _REG, 0.0, off=0.0),
    _axis("cotuning_reg", "finetune", (0.0, 0.5, 1.0, 2.0, 4.0), 0.0, off=0.0),
    _axis("mixup", "regularise", (0.0, 0.2, 0.4, 1.0, 2.0, 4.0, 8.0), 0.0, off=0.0),
    _axis("mixup_prob", "regularise", (0.0, 0.25, 0.5, 0.75, 1.0), 1.0, off=0.0),
    _axis("cutmix", "regularise", (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0), 0.0, off=0.0),
    _axis("drop", "regularise", (0.0, 0.1, 0.2, 0.3, 0.4), 0.0, off=0.0),
    _axis("smoothing", "regularise", (0.0, 0.05, 0.1), 0.1, off=0.0),
    _axis("clip_grad", "regularise", ("none", 1, 10), 1, off="none"),
    _choice(
        "data_augmentation",
        "augment",
        ("none", "trivial_augment", "random_augment", "auto_augment"),
        "trivial_augment",
        off="none",
    ),
    _choice("auto_augment", "augment", ("v0", "original"), "v0"),
    _axis("ra_num_ops", "augment", (2, 3), 2),
    _axis("ra_magnitude", "augment", (9, 17), 9),
    _axis("amp", "optimise", (False, True), True, off=False),
    _choice("opt", "optimise", ("sgd", "momentum", "adam", "adamw", "adamp"), "adamw"),
    _choice("opt_betas", "optimise", BETAS, BETAS[0]),
    _axis("momentum", "optimise", (0.0, 0.8, 0.9, 0.95, 0.99), 0.9),
    _axis("lr", "optimise", _LR, 1e-4),
    _axis("weight_decay", "optimise", (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1), 1e-2, off=0.0),
    _axis("batch_size", "optimise", (2, 4, 8, 16, 32, 64, 128, 256, 512), 32),
    _choice("sched", "schedule", ("cosine", "step", "multistep", "plateau"), "cosine"),
    _axis("warmup_epochs", "schedule", (0, 5, 10), 0, off=0),
    _axis("warmup_lr", "schedule", (0.0, 1e-6, 1e-5), 1e-6, off=0.0),
    _axis("decay_rate", "schedule", (0.1, 0.5), 0.1),
    _axis("decay_epochs", "schedule", (10, 20), 10),
    _axis("patience_epochs", "schedule", (2, 5), 5),
)


def _rows(*changed: Axis) -> tuple[Axis, ...]:
    """The axes of v1 with some of them replaced."""
    by_name = {axis.name: axis for axis in changed}
    return tuple(by_name.get(axis.name, axis) for axis in _V1_AXES)


def _nonzero(name: str) -> Values:
    values = next(axis.values for axis in _V1_AXES if axis.name == name)
    return tuple(value for value in values if value != 0)


def _when(child: str, parent: str, *values: Scalar) -> Activation:
    return Activation(child=child, needs={parent: values})


_V1_RULES: tuple[Activation, ...] = (
    _when("auto_augment", "data_augmentation", "auto_augment"),
    _when("ra_num_ops", "data_augmentation", "random_augment"),
    _when("ra_magnitude", "data_augmentation", "random_augment"),
    _when("opt_betas", "opt", *ADAMS),
    _when("momentum", "opt", "momentum"),
    _when("decay_rate", "sched", "step", "multistep"),
    _when("decay_epochs", "sched", "step", "multistep"),
    _when("patience_epochs", "sched", "plateau"),
)

# A backbone layer trains: not all are frozen, or linear probing ends at half time (20-trainer 3.3)
# and everything trains then, because pct_to_freeze is inactive and hence 0.
_BACKBONE_TRAINS: Mapping[str, Values] = {
    "pct_to_freeze": (0.0, 0.2, 0.4, 0.6, 0.8),
    "linear_probing": (True,),
}

_NATIVE_RULES: tuple[Activation, ...] = (
    *_V1_RULES,
    _when("pct_to_freeze", "linear_probing", False),
    *(
        Activation(child=name, any_of=_BACKBONE_TRAINS)
        for name in ("layer_decay", "sp_reg", "delta_reg", "bss_reg", "stoch_norm")
    ),
    Activation(
        child="mixup_prob", any_of={"mixup": _nonzero("mixup"), "cutmix": _nonzero("cutmix")}
    ),
    _when("warmup_lr", "warmup_epochs", 5, 10),
)

_PAPER_ROWS = (
    "model",
    "pct_to_freeze",
    "layer_decay",
    "linear_probing",
    "stoch_norm",
    "mixup",
    "mixup_prob",
    "cutmix",
    "drop",
    "data_augmentation",
    "auto_augment",
    "opt",
    "lr",
    "batch_size",
)

NATIVE = Table(
    space_id="native",
    axes=_V1_AXES,
    activations=_NATIVE_RULES,
    exclusions=(Exclusion(axes={name: _nonzero(name) for name in ("delta_reg", "cotuning_reg")}),),
    batchnorm_only=("stoch_norm",),
)
QUICKTUNE_V1 = Table(space_id="quicktune-v1", axes=_V1_AXES, activations=_V1_RULES)
QTT_COMPAT = Table(
    space_id="qtt-compat",
    axes=_rows(
        _axis("layer_decay", "finetune", (0.0, 0.65, 0.75), 0.0, off=0.0),
        _axis("clip_grad", "regularise", (0, 1, 10), 1, off=0),
        _choice(
            "data_augmentation",
            "augment",
            ("auto_augment", "random_augment", "trivial_augment", "none"),
            "trivial_augment",
            off="none",
        ),
        _axis("warmup_lr", "schedule", (0.0, 1e-5, 1e-6), 1e-6, off=0.0),
        _axis("patience_epochs", "schedule", (2, 5, 10), 5),
    ),
    activations=_V1_RULES,
    sort_models=True,
)
PAPER_TABLE3 = Table(
    space_id="paper-table3",
    axes=_rows(_axis("lr", "optimise", (*_LR, 1e-1), 1e-4)),
    activations=_V1_RULES,
    fixed={axis.name: axis.default for axis in _V1_AXES if axis.name not in _PAPER_ROWS},
)

TABLES: Mapping[str, Table] = {
    table.space_id: table for table in (NATIVE, QUICKTUNE_V1, QTT_COMPAT, PAPER_TABLE3)
}

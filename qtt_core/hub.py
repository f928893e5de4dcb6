"""Hubs are data: lists of model cards. The card, not the name, is what predictors see.

A hub gives the search space its `model` choices, the trainer its timm tag and preprocessing, and
the optimizer sizes and accuracies (10-optimizer 2.2). It is read from package data or from the
user's JSON, never from timm: this module must stay free of torch, timm and ConfigSpace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from qtt_core.errors import ABSENT, Fault, SpecError
from qtt_core.fields import Fields, nearest, raise_faults
from qtt_core.steps import digest

HUBS = ("timm24", "tiny")
NORMALISATIONS = ("imagenet", "half", "none")
"""Mean and standard deviation: ImageNet's, .5 and .5, or 0 and 1."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_WEIGHTS = r"hub|package:[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors"
_MAX_CARDS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One pretrained architecture."""

    name: str
    """What the space calls it."""
    tag: str
    """timm `architecture.pretrained_tag`, or an architecture when `weights` is a package file."""
    family: str
    params: int
    gmacs: float
    """At `input_size`."""
    input_size: int
    fixed_size: bool = False
    """The architecture is built for one image size (`img_size=` must be passed to change it)."""
    resizable_weights: bool = True
    """Pretrained weights load at other sizes (VOLO's do not)."""
    batchnorm: bool = True
    pretraining: str = ""
    accuracy: float | None = None
    """A fraction; `accuracy_kind` says of what (ImageNet-ReaL for timm24)."""
    accuracy_kind: str = ""
    normalisation: str = "imagenet"
    crop_pct: float = 1.0
    """As published; values above 1 would pad the image and are clamped by the trainer."""
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    licence: str = ""
    weights: str = "hub"
    """`hub` (timm's, from a cache) or `package:<file>` (package data of the trainer)."""
    default: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above."""
        return {name: getattr(self, name) for name in self.__slots__}

    def gmacs_at(self, image_size: int | None) -> float:
        """GMACs at an image size, scaled by area; None = the model's own size."""
        return (
            self.gmacs if image_size is None else self.gmacs * (image_size / self.input_size) ** 2
        )

    def fits(self, image_size: int | None) -> bool:
        """Whether the pretrained weights can be used at an image size."""
        return image_size in (None, self.input_size) or self.resizable_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """An ordered list of cards; exactly one is the default."""

    name: str
    cards: tuple[ModelCard, ...]

    @property
    def default(self) -> ModelCard:
        """The card marked `default: true`, or the first when a limit removed it."""
        return next((card for card in self.cards if card.default), self.cards[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, in order."""
        return tuple(card.name for card in self.cards)

    def card(self, name: str) -> ModelCard:
        """The card of a model. Raises: SpecError that lists the known names."""
        for card in self.cards:
            if card.name == name:
                return card
        raise SpecError([_unknown_model("model", name, self)])

    def to_json(self) -> dict[str, Any]:
        """{"name": …, "cards": [...]}; `from_json` reads it back."""
        return {"name": self.name, "cards": [card.to_json() for card in self.cards]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Hub:
        """A hub that was checked once; not `parse_hub`: a limit may have removed its default card.

        Raises: SpecError for a card with a fault.
        """
        return cls(name=str(raw["name"]), cards=tuple(parse_card(card) for card in raw["cards"]))

    @property
    def digest(self) -> str:
        """SHA-256 of the cards."""
        return digest([card.to_json() for card in self.cards])


def parse_card(raw: Mapping[str, Any]) -> ModelCard:
    """Read one card. Raises: SpecError with every fault."""
    faults: list[Fault] = []
    card = _card(Fields(raw, "card", faults))
    raise_faults(faults)
    return card


def parse_hub(name: str, raw: object) -> Hub:
    """Read a hub from JSON: {"cards": [...]}.

    Raises: SpecError with every fault: bad cards, none, two of one name, not exactly one default.
    """
    faults: list[Fault] = []
    top = Fields(raw, f"hub {name}", faults)
    top.raw("name")  # written by `Hub.to_json`; the caller's name counts
    items = top.items("cards", longest=_MAX_CARDS)
    cards = tuple(
        _card(Fields(item, top.at(f"cards[{i}]"), faults)) for i, item in enumerate(items)
    )
    top.refuse_unknown()
    if not faults:
        _check_hub(top, cards)
    raise_faults(faults)
    return Hub(name=name, cards=cards)


def load_hub(name: str) -> Hub:
    """A shipped hub, `timm24` or `tiny`. Raises: SpecError that lists the known names."""
    if name not in HUBS:
        raise SpecError(
            [Fault("spec.search.hub", name, f"use one of {', '.join(HUBS)}, or hubRef")]
        )
    file = resources.files("qtt_core").joinpath("data", "hubs", f"{name}.json")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        problem = f"its file data/hubs/{name}.json is missing from this installation; reinstall"
        raise SpecError([Fault("spec.search.hub", name, problem)]) from error
    return read_hub(name, text)


def read_hub(name: str, text: str) -> Hub:
    """A hub from JSON text such as a `hubRef`'s file. Raises: SpecError, also for bad JSON."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"hub {name}, line {error.lineno}, column {error.colno}"
        raise SpecError(
            [Fault(where, error.msg, "use a JSON object with a list of cards")]
        ) from error
    return parse_hub(name, raw)


def select(
    hub: Hub,
    *,
    models: Sequence[str] = (),
    max_params: int | None = None,
    max_gmacs: float | None = None,
    licences: Sequence[str] = (),
    image_size: int | None = None,
) -> Hub:
    """The hub with the cards that pass; GMACs are scaled to `image_size` by area.

    Cards whose weights cannot be resized are dropped at another image size; asking for one by name
    is an error. The result has a default: the hub's own, or the first card that is left.

    Raises: SpecError if a model is unknown or none is left.
    """
    faults = [
        _unknown_model("spec.search.models", name, hub) for name in models if name not in hub.names
    ]
    for card in hub.cards:
        if card.name in models and not card.fits(image_size):
            remedy = (
                f"its weights load at {card.input_size} px only; drop it or spec.dataset.imageSize"
            )
            faults.append(Fault("spec.search.models", card.name, remedy))
    raise_faults(faults)
    kept = [
        card
        for card in hub.cards
        if (not models or card.name in models)
        and (max_params is None or card.params <= max_params)
        and (max_gmacs is None or card.gmacs_at(image_size) <= max_gmacs)
        and (not licences or card.licence.lower() in {licence.lower() for licence in licences})
        and card.fits(image_size)
    ]
    if not kept:
        raise SpecError([_none_left(hub, max_params, max_gmacs, licences, image_size)])
    if not any(card.default for card in kept):
        kept[0] = replace(kept[0], default=True)
    return Hub(name=hub.name, cards=tuple(kept))


def _card(fields: Fields) -> ModelCard:
    size = {"low": 8, "high": 2048}
    card = ModelCard(
        name=fields.text("name", required=True, pattern=_NAME, longest=128, hint=_name_hint()),
        tag=fields.text("tag", required=True, pattern=_NAME, longest=128),
        family=fields.text("family", required=True, pattern=_NAME, longest=64),
        params=fields.integer("params", 1, low=1, required=True),
        gmacs=_positive(fields, "gmacs", required=True),
        input_size=fields.integer("input_size", 224, required=True, **size),
        fixed_size=fields.boolean("fixed_size"),
        resizable_weights=fields.boolean("resizable_weights", True),
        batchnorm=fields.boolean("batchnorm", True),
        pretraining=fields.text("pretraining"),
        accuracy=_fraction(fields, "accuracy"),
        accuracy_kind=fields.text("accuracy_kind", longest=64),
        normalisation=fields.text("normalisation", "imagenet", choices=NORMALISATIONS),
        crop_pct=_positive(fields, "crop_pct", 1.0),
        crop_mode=fields.text("crop_mode", "center", choices=("center", "squash", "border")),
        interpolation=fields.text("interpolation", "bicubic", choices=("bilinear", "bicubic")),
        licence=fields.text("licence", longest=64),
        weights=fields.text(
            "weights", "hub", pattern=_WEIGHTS, hint="use hub or package:<file>.safetensors"
        ),
        default=fields.boolean("default"),
    )
    fields.refuse_unknown()
    return card


def _name_hint() -> str:
    return "use letters, digits, dots, dashes and underscores"


def _positive(fields: Fields, name: str, default: float = 1.0, *, required: bool = False) -> float:
    value = fields.number(name, default, low=0, required=required)
    if value == 0:
        fields.fault(name, value, "use a number above 0")
    return value


def _fraction(fields: Fields, name: str) -> float | None:
    known = fields.has(name)
    value = fields.number(name, low=0, high=1)
    return value if known else None


def _check_hub(top: Fields, cards: Sequence[ModelCard]) -> None:
    names = [card.name for card in cards]
    if not cards:
        top.fault("cards", ABSENT, "list at least one card")
    for name in sorted({name for name in names if names.count(name) > 1}):
        top.fault("cards", name, "each name may stand once")
    defaults = [card.name for card in cards if card.default]
    if cards and len(defaults) != 1:
        top.fault("cards", defaults, "mark exactly one card default: true")


def _unknown_model(field: str, name: str, hub: Hub) -> Fault:
    return Fault(
        field,
        name,
        nearest(name, hub.names, otherwise=f"hub {hub.name} has {', '.join(hub.names)}"),
    )


def _none_left(
    hub: Hub,
    max_params: int | None,
    max_gmacs: float | None,
    licences: Sequence[str],
    image_size: int | None,
) -> Fault:
    """Names the cheapest model, so that the user sees how far off the limits are."""
    limits = {
        "maxParams": max_params,
        "maxGMACs": max_gmacs,
        "licences": list(licences) or None,
        "imageSize": image_size,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    least = min(hub.cards, key=lambda card: card.params)
    known = sorted({card.licence for card in hub.cards})
    smallest = f"{least.name}: {least.params} parameters, {least.gmacs_at(image_size):.3g} GMACs"
    licences_text = f"its licences are {', '.join(known)}"
    remedy = f"leaves no model of hub {hub.name}; its smallest is {smallest}; {licences_text}"
    return Fault("spec.search.modelLimits", given, remedy)

"""Hubs are data: lists of model cards (10-optimizer 2.2). The card, not the name, is what predictors see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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
    licence: str = ""
    weights: str = "hub"
    """`hub` (timm's, from a cache) or `package:<file>` (package data of the trainer)."""
    default: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names above."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """An ordered list of cards; exactly one is the default."""

    name: str
    cards: tuple[ModelCard, ...]

    @property
    def default(self) -> ModelCard:
        """The card marked `default: true`, or the first when a limit removed it."""
        return next((card for card in self.cards if card.default), self.cards[0])

    def card(self, name: str) -> ModelCard:
        """The card of a model. Raises: SpecError that lists the known names."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """SHA-256 of the cards."""
        raise NotImplementedError


def parse_card(raw: Mapping[str, Any]) -> ModelCard:
    """Read one card. Raises: SpecError."""
    raise NotImplementedError


def parse_hub(name: str, raw: object) -> Hub:
    """Read a hub from JSON: {"cards": [...]}. Raises: SpecError."""
    raise NotImplementedError


def load_hub(name: str) -> Hub:
    """A shipped hub, `timm24` or `tiny`. Raises: SpecError that lists the known names."""
    raise NotImplementedError


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

    Raises: SpecError if a model is unknown or none is left.
    """
    raise NotImplementedError

"""Where a model card's weights lie: inside this package, or in a cache that was filled before.

Asked by `prepare`: which models lack weights, and which one can measure landmarkers? It opens no
connection and reads no tensor. The places are those that `model.build_model` loads from.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from qtt_core.hub import ModelCard

FILES = ("model.safetensors", "pytorch_model.bin")
"""In the order in which timm tries them."""

PACKAGE = "package:"


def find_weights(card: ModelCard, cache: str = "") -> Path | None:
    """The weights file of a card, or None if no step could load it without a network.

    `cache` is a folder in huggingface_hub's layout; empty = that library's usual place.
    """
    if card.weights.startswith(PACKAGE):
        shipped = package_folder() / card.weights.removeprefix(PACKAGE)
        return shipped if shipped.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    for file in FILES:
        found = try_to_load_from_cache(f"timm/{card.tag}", file, cache_dir=cache or None)
        if isinstance(found, str) and Path(found).is_file():
            return Path(found)
    return None


def missing_weights(cards: Iterable[ModelCard], cache: str = "") -> list[str]:
    """Names of the cards whose weights are not at hand, in the order given."""
    return [card.name for card in cards if find_weights(card, cache) is None]


def package_folder() -> Path:
    """The folder of weights that ship with the trainer."""
    return Path(str(resources.files("qtt_trainer"))) / "weights"

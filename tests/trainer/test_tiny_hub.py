"""The shipped `tiny` hub: its cards say the truth, its weights load, and they are worth having."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open

from qtt_core.hub import ModelCard, load_hub
from qtt_trainer.landmarkers import nearest_neighbour
from qtt_trainer.model import BuildRequest, build_model, has_batchnorm, rebuild_model
from qtt_trainer.pretrained import find_weights, missing_weights, package_folder
from qtt_trainer.transforms import build_transforms

HUB = load_hub("tiny")
each_card = pytest.mark.parametrize("card", HUB.cards, ids=lambda card: card.name)


@pytest.fixture(scope="module")
def maker(root: Path) -> ModuleType:
    """The script that made the weights."""
    path = root / "benchmarks/make_tiny_hub.py"
    spec = importlib.util.spec_from_file_location("make_tiny_hub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)  # for its dataclasses
        spec.loader.exec_module(module)
    return module


def request(card: ModelCard, **changes: object) -> BuildRequest:
    return BuildRequest(**{"card": card, "num_classes": 10, "offline": True, **changes})


def test_the_hub_is_small_varied_and_has_one_default():
    sizes = [path.stat().st_size for path in package_folder().glob("*.safetensors")]

    assert len(HUB.cards) >= 4
    assert sum(sizes) <= 8e6
    assert len({card.family for card in HUB.cards}) == len(HUB.cards)
    assert {card.batchnorm for card in HUB.cards} == {True, False}
    assert sum(card.default for card in HUB.cards) == 1
    assert max(c.gmacs for c in HUB.cards) >= 3 * min(c.gmacs for c in HUB.cards)


def test_every_weight_file_belongs_to_a_card():
    files = {path.name for path in package_folder().iterdir()}

    assert files == {card.weights.removeprefix("package:") for card in HUB.cards}
    assert missing_weights(HUB.cards) == []


@each_card
def test_a_card_describes_its_model(card, maker):
    source = find_weights(card)
    with safe_open(source, framework="pt") as file:
        classes = int(file.metadata()["num_classes"])
    model = rebuild_model(request(card, num_classes=classes)).model

    assert classes == len(maker.LETTERS)
    assert sum(p.numel() for p in model.parameters()) == card.params
    assert has_batchnorm(model) == card.batchnorm
    # how attention is counted differs by 1.4 % between versions of torch
    assert maker.gmacs(model) == pytest.approx(card.gmacs, rel=0.02)
    assert card.input_size == maker.PIXELS
    assert card.licence == "apache-2.0"


def test_cards_state_the_accuracy_their_weights_reach(maker):
    pictures, labels = maker.draw_set(296, seed=77)

    for card in HUB.cards:
        classes = len(maker.LETTERS)
        built = build_model(request(card, num_classes=classes, keep_source_head=True))
        model = built.model
        mean, std = (torch.tensor(built.data_config[name]) for name in ("mean", "std"))
        features = _features(model, maker.normalised(pictures, mean, std))
        with torch.no_grad():
            right = (built.source_head(features).argmax(1) == labels).float().mean().item()
        assert right == pytest.approx(card.accuracy, abs=0.06), card.name


@each_card
def test_weights_load_at_other_sizes(card, draw_glyph):
    built = build_model(request(card, img_size=48))
    transform = build_transforms(built.data_config, {}, 48, train=False)
    image = transform(draw_glyph("3", np.random.default_rng(0), 40))[None]

    assert image.shape == (1, 3, 48, 48)
    assert built.model.eval()(image).shape == (1, 10)


def test_frozen_features_know_new_characters_better_than_chance_weights(draw_glyph):
    """Digits were not among the letters: what transfers is shape, not a label."""
    rng = np.random.default_rng(0)
    texts = [str(number % 10) for number in range(160)]
    images = [draw_glyph(text, rng, 32) for text in texts]
    labels = np.array([int(text) for text in texts])

    gains = []
    for card in HUB.cards:
        scores = []
        for build in (build_model, rebuild_model):
            torch.manual_seed(0)
            built = build(request(card))
            transform = build_transforms(built.data_config, {}, None, train=False)
            x = _features(built.model, torch.stack([transform(image) for image in images])).numpy()
            scores.append(nearest_neighbour(x[:80], labels[:80], x[80:], labels[80:]))
        gains.append(scores[0] - scores[1])

    assert min(gains) > 0
    assert np.mean(gains) > 0.25


def test_making_the_hub_is_repeatable_and_skips_what_is_there(maker, tmp_path):
    recipe = maker.Recipe(arch="test_vit", family="vit", epochs=1, batch=16)
    calls = []

    def sets():
        calls.append(1)
        return maker.draw_set(37 * 2, 1), maker.draw_set(37, 2)

    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        options = {"work": tmp_path / name, "weights": tmp_path / name, "seed": 0}
        entry = maker.make(recipe, sets, **options)
        assert maker.make(recipe, sets, **options) == entry
        made.append((entry, (tmp_path / name / "test_vit.safetensors").read_bytes()))

    assert made[0] == made[1]
    assert len(calls) == 2


def _features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features = model.eval().forward_features(images)
        return model.forward_head(features, pre_logits=True).flatten(1)

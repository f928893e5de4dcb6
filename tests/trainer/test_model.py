"""Building models: pretrained weights really arrive, and every failure names its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from qtt_core.hub import ModelCard, load_hub
from qtt_core.results import State
from qtt_trainer import volume
from qtt_trainer.endings import EndedError
from qtt_trainer.model import (
    NORMALISATIONS,
    BuildRequest,
    HeadInput,
    build_model,
    classifier_prefixes,
    count_parameters,
    rebuild_model,
)
from qtt_trainer.pretrained import find_weights
from qtt_trainer.transforms import build_transforms

TINY = load_hub("tiny").cards


def request(card: ModelCard, **fields: Any) -> BuildRequest:
    return BuildRequest(**{"card": card, "num_classes": 7, "offline": True, **fields})


@pytest.mark.parametrize("card", TINY, ids=lambda card: card.name)
def test_shipped_weights_arrive_in_the_backbone_and_the_head_is_new(card: ModelCard) -> None:
    built = build_model(request(card))

    path = find_weights(card)
    assert path is not None
    stored = load_file(path)
    prefixes = classifier_prefixes(built.model)
    for name, tensor in built.model.state_dict().items():
        if not name.startswith(prefixes):
            torch.testing.assert_close(tensor, stored[name].to(tensor.dtype), msg=name)
    assert built.model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert built.weights_sha256 == volume.file_sha256(path)
    assert built.data_config["input_size"] == (3, 32, 32)
    assert built.data_config["mean"] == NORMALISATIONS[card.normalisation][0]


@pytest.mark.parametrize("name", sorted(NORMALISATIONS))
@pytest.mark.parametrize("train", [True, False])
def test_the_cards_normalisation_reaches_the_pixels(name: str, train: bool) -> None:
    """White minus the mean, over the deviation: by hand, not by the code under test."""
    card = replace(TINY[0], normalisation=name)
    built = build_model(request(card))
    transform = build_transforms(built.data_config, {"data_augmentation": "none"}, None, train)

    pixels = transform(Image.new("RGB", (40, 40), "white"))

    means = {"imagenet": (0.485, 0.456, 0.406), "half": (0.5,) * 3, "none": (0.0,) * 3}[name]
    stds = {"imagenet": (0.229, 0.224, 0.225), "half": (0.5,) * 3, "none": (1.0,) * 3}[name]
    wanted = [(1 - mean) / std for mean, std in zip(means, stds, strict=True)]
    for channel, value in zip(pixels, wanted, strict=True):
        brightest = channel.max().item()  # colour jitter may darken a training image
        assert brightest <= value + 1e-4 if train else brightest == pytest.approx(value, abs=1e-4)
    black = build_transforms(built.data_config, {}, None, train)(Image.new("RGB", (40, 40)))
    for channel, mean, std in zip(black, means, stds, strict=True):
        assert channel.min().item() == pytest.approx(-mean / std, abs=1e-4)


@pytest.mark.parametrize("card", TINY, ids=lambda card: card.name)
def test_the_classifiers_input_reproduces_the_logits(card: ModelCard) -> None:
    """Regularisers read features there: it must be what the logits are made of."""
    model = build_model(request(card)).model.eval()
    head = HeadInput(model)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    logits = model(x)

    assert head.features.shape[0] == 4
    torch.testing.assert_close(model.get_classifier()(head.raw).flatten(1), logits)  # type: ignore[operator]


def test_the_source_head_is_the_pretrained_one_on_the_pretrained_features() -> None:
    card = TINY[0]

    built = build_model(request(card, keep_source_head=True), keep_pretrained=True)

    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert built.pretrained is not None
    assert built.source_head is not None
    head = HeadInput(built.pretrained)
    source = built.pretrained(x)
    torch.testing.assert_close(built.source_head(head.raw).flatten(1), source)
    assert source.shape[1] != 7
    assert not any(p.requires_grad for p in built.pretrained.parameters())
    assert built.model.eval()(x).shape == (2, 7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [32, 48])
@pytest.mark.parametrize("card", TINY, ids=lambda card: card.name)
def test_other_sizes_and_channels_load_where_the_card_allows_them(
    card: ModelCard, side: int, channels: int
) -> None:
    built = build_model(request(card, img_size=side, in_chans=channels))

    assert built.model.eval()(torch.zeros(1, channels, side, side)).shape == (1, 7)


def test_a_rebuilt_model_takes_a_checkpoints_weights() -> None:
    card = TINY[0]
    built = build_model(request(card))

    again = rebuild_model(request(card))

    again.model.load_state_dict(built.model.state_dict())
    assert again.data_config == built.data_config
    assert count_parameters(again.model) == count_parameters(built.model)


def test_dropout_reaches_the_classifier() -> None:
    model = build_model(request(TINY[0], drop=0.4)).model

    assert 0.4 in {getattr(m, "drop_rate", getattr(m, "p", None)) for m in model.modules()}


@pytest.mark.parametrize(
    ("change", "state", "code"),
    [
        ({"tag": "resnet_of_the_moon"}, State.INVALID_CONFIG, 64),
        ({"weights": "package:gone.safetensors"}, State.WEIGHTS_UNAVAILABLE, 75),
        ({"resizable_weights": False}, State.INFEASIBLE, 0),
    ],
)
def test_what_cannot_be_built_says_whose_fault_it_is(
    change: dict[str, Any], state: State, code: int
) -> None:
    card = replace(TINY[0], **change)

    with pytest.raises(EndedError, match=card.name) as caught:
        build_model(request(card, img_size=48))

    assert (caught.value.state, caught.value.exit_code) == (state, code)


def test_hub_weights_that_are_not_in_the_cache_are_unavailable_without_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # restored after the test
    card = next(c for c in load_hub("timm24").cards if c.name == "edgenext_xx_small")

    with pytest.raises(EndedError, match="edgenext_xx_small") as caught:
        build_model(request(card, weights_cache=str(tmp_path)))

    assert (caught.value.state, caught.value.exit_code) == (State.WEIGHTS_UNAVAILABLE, 75)


def test_damaged_weights_are_told_from_missing_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtt_trainer import model

    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / TINY[0].weights.partition(":")[2]).write_bytes(b"\x10\0\0\0\0\0\0\0 no tensors")
    monkeypatch.setattr(model.importlib.resources, "files", lambda package: tmp_path)

    with pytest.raises(EndedError) as caught:
        build_model(request(TINY[0]))

    assert caught.value.state is State.WEIGHTS_CORRUPT


def test_the_24_models_heads_are_known_by_their_names() -> None:
    for card in load_hub("timm24").cards:
        config = timm.get_pretrained_cfg(card.tag)
        assert config is not None
        assert config.classifier, card.name

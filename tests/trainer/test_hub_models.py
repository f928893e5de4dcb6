"""All 24 models of the hub `timm24`: built, grouped, frozen, converted, and one real update each.

At 64 pixels and without their pretrained weights, which are gigabytes; how weights arrive is
`test_model.py`'s matter. The small ones run with `make test`, all of them with `make slow`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from one_epoch import Trained, train_one_epoch
from timm.layers import BatchNormAct2d
from torch import nn

from qtt_core.hub import ModelCard, load_hub
from qtt_core.jobs import parse_job
from qtt_core.results import State
from qtt_trainer import model as building
from qtt_trainer import prepare
from qtt_trainer.freezing import frozen_names, layer_groups
from qtt_trainer.model import BuildRequest, HeadInput, build_model, classifier_prefixes, is_head
from qtt_trainer.stoch_norm import convert_stoch_norm

PIXELS = 64

# BatchNorm layers, whether they hold an activation, layer groups with the head's (timm 1.0.31).
LAYERS: dict[str, tuple[int, bool, int]] = {
    "beit_large_patch16_512": (0, False, 26),
    "volo_d5_512": (3, False, 53),
    "volo_d5_448": (3, False, 53),
    "volo_d4_448": (3, False, 41),
    "swinv2_base_window12to24_192to384_22kft1k": (0, False, 26),
    "beit_base_patch16_384": (0, False, 14),
    "volo_d3_448": (3, False, 41),
    "tf_efficientnet_b7_ns": (163, True, 57),
    "convnext_small_384_in22ft1k": (0, False, 38),
    "tf_efficientnet_b6_ns": (134, True, 47),
    "volo_d1_384": (3, False, 23),
    "xcit_small_12_p8_384_dist": (15, False, 16),
    "deit3_small_patch16_384_in21ft1k": (0, False, 14),
    "tf_efficientnet_b4_ns": (96, True, 34),
    "xcit_tiny_24_p8_384_dist": (27, False, 28),
    "xcit_tiny_12_p8_384_dist": (15, False, 16),
    "edgenext_small": (0, False, 20),
    "xcit_nano_12_p8_384_dist": (15, False, 16),
    "mobilevitv2_075": (25, True, 11),
    "edgenext_x_small": (0, False, 20),
    "mobilevit_xs": (32, True, 12),
    "edgenext_xx_small": (0, False, 14),
    "mobilevit_xxs": (32, True, 12),
    "dla46x_c": (48, False, 12),
}
QUICK = {"edgenext_xx_small", "mobilevit_xxs", "dla46x_c", "xcit_nano_12_p8_384_dist"}

each_model = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYERS],
)


@pytest.fixture(autouse=True)
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Architectures as timm draws them: the files are not here, and loading is not the subject."""
    original = building._construct

    def bare(request: BuildRequest, **options: Any) -> nn.Module:
        return original(request, **{**options, "pretrained": False})

    monkeypatch.setattr(building, "_construct", bare)


@pytest.fixture(scope="module")
def four_images(tmp_path_factory: pytest.TempPathFactory, make_folder: Any) -> Path:
    folder: Path = make_folder(
        tmp_path_factory.mktemp("four"), {"train": {"0": 2, "1": 2}, "val": {"0": 1, "1": 1}}
    )
    return folder


def card_of(name: str) -> ModelCard:
    """The card; VOLO's weights fit one size only, but there are none here."""
    return replace(load_hub("timm24").card(name), resizable_weights=True)


def built(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    request = BuildRequest(
        card=card_of(name), num_classes=5, img_size=PIXELS, offline=True, **fields
    )
    return build_model(request).model.eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))


def test_the_table_is_the_hub() -> None:
    assert set(LAYERS) == set(load_hub("timm24").names)
    assert {c.name for c in load_hub("timm24").cards if c.batchnorm} == {
        name for name, (norms, _, _) in LAYERS.items() if norms
    }


@each_model
def test_its_layers_are_grouped_and_the_head_is_known(name: str) -> None:
    model = built(name)

    groups = layer_groups(model)
    prefixes = classifier_prefixes(model)
    names = {n for n, _ in model.named_parameters()}
    heads = {n for n in names if is_head(n, prefixes)}
    assert groups.keys() == names
    assert len(set(groups.values())) == LAYERS[name][2]
    assert heads
    assert {groups[n] for n in heads} == {max(groups.values())}
    assert frozen_names(model, 1.0) == names - heads
    part = frozen_names(model, 0.4)
    assert part
    assert part < frozen_names(model, 0.8) < names - heads


@each_model
def test_its_pre_logits_are_what_the_classifier_is_fed(name: str) -> None:
    model = built(name)
    head = HeadInput(model)

    with torch.no_grad():
        logits = model(images())
        again = model.get_classifier()(head.raw).flatten(1)

    assert head.features.shape == (2, model.num_features)
    assert logits.shape == (2, 5)
    if name.startswith("volo"):  # adds half of the largest auxiliary logit of its tokens
        assert again.shape == logits.shape
    else:
        torch.testing.assert_close(again, logits)


@each_model
def test_stochastic_normalisation_changes_no_evaluation(name: str) -> None:
    norms, with_activation, _ = LAYERS[name]
    model = built(name)
    found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(found) == norms
    assert sum(isinstance(m, BatchNormAct2d) for m in found) == (norms if with_activation else 0)
    with torch.no_grad():
        before = model(images())
        count = convert_stoch_norm(model, frozenset(n for n, _ in model.named_parameters()))
        after = model.eval()(images())

    assert count == norms
    assert torch.equal(before, after)


STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {"batch_size": 4},
    "partly-frozen": {
        "batch_size": 4, "pct_to_freeze": 0.4, "layer_decay": 0.75, "stoch_norm": True,
        "sp_reg": 0.1, "clip_grad": 1, "drop": 0.2,
    },
    "delta": {"batch_size": 4, "delta_reg": 0.1},
    "co-tuning": {"batch_size": 4, "cotuning_reg": 1.0},
}  # fmt: skip


def update(jobs: Any, data: Path, name: str, settings: dict[str, Any]) -> Trained:
    maker = type(jobs)(root=jobs.root.with_name("models"), data=data)
    done = prepare.run(parse_job(maker.base(), command="prepare"))
    assert done.state is State.OK, done.reason
    job = {"opt": "sgd", "lr": 0.1, "data_augmentation": "none", **settings}
    fields = {"card": card_of(name).to_json(), "task": {"img_size": PIXELS}, "horizon": 2}
    # `step` looks its card up in the tiny hub: any name there will do until `card` replaces it.
    original = maker.step

    def step(to: int, *, model: str, **given: Any) -> Any:
        document = original(to, **given)
        document["config"]["model"] = model
        return document

    object.__setattr__(maker, "step", step)
    return train_one_epoch(maker, job, model=name, space="native", **fields)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@each_model
def test_one_real_update(jobs: Any, four_images: Path, name: str, strategy: str) -> None:
    settings = STRATEGIES[strategy]

    run = update(jobs, four_images, name, settings)

    after = run.states[-1]
    parameters = {n for n, _ in run.before.named_parameters()}
    moved = {n for n in parameters if not torch.equal(run.start[n], after[n])}
    frozen = frozen_names(run.before, settings.get("pct_to_freeze", 0.0))
    prefixes = classifier_prefixes(run.before)
    assert not moved & frozen
    assert any(is_head(n, prefixes) for n in moved)
    assert any(not is_head(n, prefixes) for n in moved), "the backbone learns"
    assert all(bool(torch.isfinite(after[n]).all()) for n in parameters)
    norms, _, _ = LAYERS[name]
    inert = {"stoch_norm"} if settings.get("stoch_norm") and not norms else set()
    assert set(run.session.inert) == inert

"""Hubs: the paper's Table 4 value by value, cards against timm itself, limits, faults."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

from qtt_core.errors import SpecError
from qtt_core.hub import HUBS, Hub, ModelCard, load_hub, parse_card, parse_hub, read_hub, select

# The tool paper's Table 4: parameters (millions), ImageNet-ReaL top-1 (percent), pixels, GMACs.
TABLE_4 = {
    "beit_large_patch16_512": (305.67, 90.691, 512, 362.0),
    "volo_d5_512": (296.09, 90.610, 512, 424.6),
    "volo_d5_448": (295.91, 90.584, 448, 314.7),
    "volo_d4_448": (193.41, 90.507, 448, 196.8),
    "swinv2_base_window12to24_192to384_22kft1k": (87.92, 90.401, 384, 55.1),
    "beit_base_patch16_384": (86.74, 90.371, 384, 55.5),
    "volo_d3_448": (86.63, 90.168, 448, 96.1),
    "tf_efficientnet_b7_ns": (66.35, 90.093, 600, 37.7),
    "convnext_small_384_in22ft1k": (50.22, 89.803, 384, 25.5),
    "tf_efficientnet_b6_ns": (43.04, 89.784, 528, 19.1),
    "volo_d1_384": (26.78, 89.698, 384, 22.7),
    "xcit_small_12_p8_384_dist": (26.21, 89.515, 384, 54.7),
    "deit3_small_patch16_384_in21ft1k": (22.21, 89.367, 384, 15.5),
    "tf_efficientnet_b4_ns": (19.34, 89.303, 380, 4.39),
    "xcit_tiny_24_p8_384_dist": (12.11, 88.778, 384, 26.9),
    "xcit_tiny_12_p8_384_dist": (6.71, 88.101, 384, 14.0),
    "edgenext_small": (5.59, 87.504, 256, 1.25),
    "xcit_nano_12_p8_384_dist": (3.05, 85.025, 384, 6.27),
    "mobilevitv2_075": (2.87, 82.806, 256, 1.03),
    "edgenext_x_small": (2.34, 81.897, 256, 0.53),
    "mobilevit_xs": (2.32, 81.574, 256, 1.03),
    "edgenext_xx_small": (1.33, 78.698, 256, 0.26),
    "mobilevit_xxs": (1.27, 76.602, 256, 0.41),
    "dla46x_c": (1.07, 73.632, 224, 0.53),
}
MEANS = {0.485: "imagenet", 0.5: "half", 0.0: "none"}

CARD = {
    "name": "mine",
    "tag": "test_vit.r160_in1k",
    "family": "vit",
    "params": 370_000,
    "gmacs": 0.05,
    "input_size": 160,
    "default": True,
}


def card(**changes: object) -> ModelCard:
    return parse_card({**CARD, **changes})


def hub_of(*cards: ModelCard) -> Hub:
    return Hub(name="mine", cards=cards)


def faults_of(call: object, *args: object, **kwargs: object) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    found: dict[str, str] = {}
    for fault in caught.value.faults:
        found[fault.field] = f"{found.get(fault.field, '')}{fault}\n"
    return found


def test_timm24_lists_the_models_of_table_4_in_its_order() -> None:
    assert load_hub("timm24").names == tuple(TABLE_4)


@pytest.mark.parametrize("name", TABLE_4)
def test_a_card_of_timm24_states_what_table_4_states(name: str) -> None:
    params, accuracy, pixels, gmacs = TABLE_4[name]

    ours = load_hub("timm24").card(name)

    assert round(ours.params / 1e6, 2) == params
    assert ours.accuracy is not None
    assert round(ours.accuracy * 100, 3) == accuracy
    assert (ours.input_size, ours.gmacs, ours.accuracy_kind) == (pixels, gmacs, "imagenet-real")


def test_the_default_of_timm24_is_the_small_model_of_the_table() -> None:
    assert load_hub("timm24").default.name == "edgenext_small"


def test_only_volo_cannot_take_other_image_sizes() -> None:
    stuck = [card.name for card in load_hub("timm24").cards if not card.resizable_weights]

    assert stuck == [name for name in TABLE_4 if name.startswith("volo")]


@pytest.mark.parametrize(
    "large", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_every_card_agrees_with_timm(large: bool) -> None:
    """Tags resolve; parameters, BatchNorm, preprocessing and licence are timm's own."""
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    chosen = [card for card in load_hub("timm24").cards if (card.params > 10_000_000) is large]
    assert len(chosen) in {9, 15}
    for ours in chosen:
        config = timm.models.get_pretrained_cfg(ours.tag)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # initialisers of the meta device
            model = timm.create_model(ours.tag, pretrained=False)
        norm = torch.nn.modules.batchnorm._BatchNorm

        stated = (
            sum(parameter.numel() for parameter in model.parameters()),
            any(isinstance(module, norm) for module in model.modules()),
            config.input_size[1],
            bool(config.fixed_input_size),
            MEANS[config.mean[0]],
            (config.crop_pct, config.crop_mode, config.interpolation),
            config.license,
        )

        assert stated == (
            ours.params,
            ours.batchnorm,
            ours.input_size,
            ours.fixed_size,
            ours.normalisation,
            (ours.crop_pct, ours.crop_mode, ours.interpolation),
            ours.licence,
        ), ours.name


@pytest.mark.parametrize("name", HUBS)
def test_a_shipped_hub_survives_a_round_trip_through_json(name: str) -> None:
    hub = load_hub(name)

    again = read_hub(name, json.dumps(hub.to_json()))

    assert again == hub
    assert again.digest == hub.digest


def test_the_digest_changes_with_any_field_of_any_card() -> None:
    hub = load_hub("timm24")
    other = dataclasses.replace(hub.cards[3], gmacs=1.0)

    changed = Hub(name=hub.name, cards=(*hub.cards[:3], other, *hub.cards[4:]))

    assert changed.digest != hub.digest


def test_the_tiny_hub_needs_no_download() -> None:
    hub = load_hub("tiny")

    assert len(hub.cards) >= 4
    assert all(card.weights.startswith("package:") for card in hub.cards)


def test_an_unknown_hub_names_the_known_ones() -> None:
    assert "timm24, tiny" in faults_of(load_hub, "timm")["spec.search.hub"]


def test_a_card_is_read_with_its_defaults() -> None:
    ours = card()

    assert (ours.weights, ours.fixed_size, ours.accuracy) == ("hub", False, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "a,b"),
        ("name", ""),
        ("name", None),
        ("tag", "../x"),
        ("params", 0),
        ("params", 1.5),
        ("params", True),
        ("gmacs", 0),
        ("gmacs", "1"),
        ("gmacs", float("nan")),
        ("input_size", 7),
        ("batchnorm", "yes"),
        ("accuracy", 90.7),
        ("normalisation", "caffe"),
        ("crop_mode", "stretch"),
        ("weights", "package:../etc/passwd"),
        ("weights", "package:weights.bin"),
        ("weights", "https://example.org/x.safetensors"),
        ("tga", "x"),
    ],
)
def test_a_bad_field_of_a_card_is_named(field: str, value: object) -> None:
    assert f"card.{field}" in faults_of(parse_card, {**CARD, field: value})


def test_all_faults_of_a_hub_are_told_at_once() -> None:
    raw = {"cards": [{**CARD, "params": -1}, {**CARD, "gmacs": None}], "card": []}

    faults = faults_of(parse_hub, "mine", raw)

    assert set(faults) == {"hub mine.cards[0].params", "hub mine.cards[1].gmacs", "hub mine.card"}


@pytest.mark.parametrize(
    ("cards", "word"),
    [
        ([], "at least one"),
        ([CARD, CARD], "may stand once"),
        ([{**CARD, "default": False}], "exactly one card default"),
        ([CARD, {**CARD, "name": "b"}], "exactly one card default"),
    ],
    ids=["none", "same name", "no default", "two defaults"],
)
def test_a_hub_needs_distinct_cards_and_one_default(cards: list[object], word: str) -> None:
    assert word in faults_of(parse_hub, "mine", {"cards": cards})["hub mine.cards"]


@pytest.mark.parametrize("raw", [None, [], "cards", 3, {"cards": {}}, {"cards": [3]}])
def test_a_hub_of_another_shape_is_refused(raw: object) -> None:
    assert faults_of(parse_hub, "mine", raw)


def test_broken_json_is_reported_with_its_place() -> None:
    assert "hub mine, line 2, column 1" in faults_of(read_hub, "mine", '{"cards":\n')


def test_an_unknown_model_is_answered_with_the_nearest_name() -> None:
    assert (
        "did you mean edgenext_small?"
        in faults_of(load_hub("timm24").card, "edgenet_small")["model"]
    )


# --- select --------------------------------------------------------------------------------------


def test_no_limit_keeps_every_card() -> None:
    hub = load_hub("timm24")

    assert select(hub) == hub


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({"max_params": 1_300_000}, {"mobilevit_xxs", "dla46x_c"}),
        ({"max_gmacs": 0.41}, {"edgenext_xx_small", "mobilevit_xxs"}),
        (
            {"licences": ["CVNets-License"]},
            {"mobilevitv2_075", "mobilevit_xs", "mobilevit_xxs"},
        ),
        ({"models": ["dla46x_c", "edgenext_small"]}, {"dla46x_c", "edgenext_small"}),
        ({"models": ["dla46x_c", "edgenext_small"], "max_params": 2_000_000}, {"dla46x_c"}),
        # 0.53 GMACs at 224 px are 0.0433 at 64 px; 0.53 at 256 px are 0.0331.
        (
            {"max_gmacs": 0.04, "image_size": 64},
            {"edgenext_x_small", "edgenext_xx_small", "mobilevit_xxs"},
        ),
    ],
    ids=["parameters", "GMACs", "licence", "names", "both", "scaled GMACs"],
)
def test_limits_keep_the_cards_that_pass(limits: dict[str, object], names: set[str]) -> None:
    assert set(select(load_hub("timm24"), **limits).names) == names  # type: ignore[arg-type]


def test_a_limited_hub_still_has_exactly_one_default() -> None:
    hub = select(load_hub("timm24"), models=["mobilevit_xs", "mobilevit_xxs"])

    assert [card.default for card in hub.cards] == [True, False]
    assert parse_hub(hub.name, hub.to_json()) == hub


def test_models_that_cannot_be_resized_are_left_out_at_another_size() -> None:
    names = select(load_hub("timm24"), image_size=448).names

    assert "volo_d5_448" in names
    assert "volo_d5_512" not in names


def test_asking_by_name_for_a_model_that_cannot_be_resized_is_a_fault() -> None:
    faults = faults_of(select, load_hub("timm24"), models=["volo_d1_384"], image_size=64)

    assert "384 px only" in faults["spec.search.models"]


def test_limits_that_leave_nothing_name_the_smallest_model() -> None:
    faults = faults_of(select, load_hub("timm24"), max_params=1000)

    assert "dla46x_c: 1068440 parameters" in faults["spec.search.modelLimits"]


def test_an_unknown_model_among_the_chosen_is_named() -> None:
    faults = faults_of(select, hub_of(card()), models=["mine", "yours"])

    assert "'yours'" in faults["spec.search.models"]

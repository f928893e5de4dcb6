"""Spaces: the paper's Table 3 value by value, canonical form, conditions, overrides, digests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from ConfigSpace import (
    CategoricalHyperparameter,
    ConfigurationSpace,
    Constant,
    EqualsCondition,
    Float,
    ForbiddenAndConjunction,
    ForbiddenEqualsClause,
    ForbiddenGreaterThanRelation,
    Integer,
    OrdinalHyperparameter,
)

from qtt_core.errors import SpecError
from qtt_core.hub import load_hub, select
from qtt_core.space import (
    SPACES,
    SearchSpace,
    build_space,
    check_values,
    custom_space,
    parse_value,
)
from qtt_core.steps import Config, canonical_json

# The tool paper's Table 3 (14 rows; the models are its Table 4), in the paper's order of values.
TABLE_3: Mapping[str, list[object]] = {
    "pct_to_freeze": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
    "layer_decay": ["none", 0.65, 0.75],
    "linear_probing": [False, True],
    "stoch_norm": [False, True],
    "mixup": [0.0, 0.2, 0.4, 1.0, 2.0, 4.0, 8.0],
    "mixup_prob": [0.0, 0.25, 0.5, 0.75, 1.0],
    "cutmix": [0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0],
    "drop": [0.0, 0.1, 0.2, 0.3, 0.4],
    "data_augmentation": ["none", "trivial_augment", "random_augment", "auto_augment"],
    "auto_augment": ["v0", "original"],
    "opt": ["sgd", "momentum", "adam", "adamw", "adamp"],
    "lr": [1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 1e-1],
    "batch_size": [2, 4, 8, 16, 32, 64, 128, 256, 512],
}

# What the tool paper's table leaves out and the published curves searched too.
V1_ONLY: Mapping[str, list[object]] = {
    "sp_reg": [0.0, 1e-4, 1e-3, 1e-2, 1e-1],
    "delta_reg": [0.0, 1e-4, 1e-3, 1e-2, 1e-1],
    "bss_reg": [0.0, 1e-4, 1e-3, 1e-2, 1e-1],
    "cotuning_reg": [0.0, 0.5, 1.0, 2.0, 4.0],
    "smoothing": [0.0, 0.05, 0.1],
    "clip_grad": ["none", 1, 10],
    "ra_num_ops": [2, 3],
    "ra_magnitude": [9, 17],
    "amp": [False, True],
    "opt_betas": ["(0.9, 0.999)", "(0.0, 0.99)", "(0.9, 0.99)", "(0.0, 0.999)"],
    "momentum": [0.0, 0.8, 0.9, 0.95, 0.99],
    "weight_decay": [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
    "sched": ["cosine", "step", "multistep", "plateau"],
    "warmup_epochs": [0, 5, 10],
    "warmup_lr": [0.0, 1e-6, 1e-5],
    "decay_rate": [0.1, 0.5],
    "decay_epochs": [10, 20],
    "patience_epochs": [2, 5],
}

DEFAULTS: Mapping[str, object] = {
    "model": "edgenext_small",
    "pct_to_freeze": 0.0,
    "layer_decay": "none",
    "linear_probing": False,
    "sp_reg": 0.0,
    "delta_reg": 0.0,
    "bss_reg": 0.0,
    "cotuning_reg": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop": 0.0,
    "smoothing": 0.1,
    "clip_grad": 1,
    "data_augmentation": "trivial_augment",
    "amp": True,
    "opt": "adamw",
    "opt_betas": "(0.9, 0.999)",
    "lr": 1e-4,
    "weight_decay": 1e-2,
    "batch_size": 32,
    "sched": "cosine",
    "warmup_epochs": 0,
}

HUB = load_hub("timm24")


def space_of(name: str = "native", **kwargs: object) -> SearchSpace:
    return build_space(name, HUB, max_fidelity=50, **kwargs)  # type: ignore[arg-type]


def faults_of(call: object, *args: object, **kwargs: object) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    return {fault.field: str(fault) for fault in caught.value.faults}


def typed(config: Config) -> list[tuple[str, type, object]]:
    """Distinguishes True from 1 and 1 from 1.0, which == does not."""
    return [(name, type(value), value) for name, value in config.items()]


# --- what the spaces hold ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE_3)
def test_paper_table3_offers_the_values_of_table_3(name: str) -> None:
    legal = space_of("paper-table3").legal(name)

    assert legal is not None
    assert typed(dict(enumerate(legal))) == typed(dict(enumerate(TABLE_3[name])))  # type: ignore[arg-type]


def test_paper_table3_searches_the_14_rows_and_fixes_all_else_at_our_default() -> None:
    space = space_of("paper-table3")

    searched = {name for name in space.names if len(space.legal(name) or ()) > 1}
    fixed = {name: (space.legal(name) or ())[0] for name in space.names if name not in searched}

    assert searched == {"model", *TABLE_3}
    assert space.legal("model") == HUB.names
    assert fixed == {
        "sp_reg": 0.0,
        "delta_reg": 0.0,
        "bss_reg": 0.0,
        "cotuning_reg": 0.0,
        "smoothing": 0.1,
        "clip_grad": 1,
        "ra_num_ops": 2,
        "ra_magnitude": 9,
        "amp": True,
        "opt_betas": "(0.9, 0.999)",
        "momentum": 0.9,
        "weight_decay": 1e-2,
        "sched": "cosine",
        "warmup_epochs": 0,
        "warmup_lr": 1e-6,
    }


@pytest.mark.parametrize("name", ["native", "quicktune-v1"])
def test_the_axes_of_v1_are_complete(name: str) -> None:
    space = space_of(name)
    expected = {**TABLE_3, **V1_ONLY, "lr": TABLE_3["lr"][:-1], "model": list(HUB.names)}

    assert {axis: list(space.legal(axis) or ()) for axis in space.names} == expected


def test_qtt_compat_keeps_the_tools_own_spelling_and_order() -> None:
    space = space_of("qtt-compat")

    assert space.legal("layer_decay") == (0.0, 0.65, 0.75)
    assert space.legal("clip_grad") == (0, 1, 10)
    assert space.legal("warmup_lr") == (0.0, 1e-5, 1e-6)
    assert space.legal("patience_epochs") == (2, 5, 10)
    assert space.legal("data_augmentation") == (
        "auto_augment",
        "random_augment",
        "trivial_augment",
        "none",
    )
    assert space.legal("model") == tuple(sorted(HUB.names))


@pytest.mark.parametrize("name", SPACES)
def test_the_default_is_ours_and_not_the_first_item_of_every_list(name: str) -> None:
    default = space_of(name).default()

    off = 0.0 if name == "qtt-compat" else "none"
    expected = {**DEFAULTS, "layer_decay": off}
    assert {key: default[key] for key in expected} == expected


@pytest.mark.parametrize("name", SPACES)
def test_every_hyperparameter_names_its_group(name: str) -> None:
    groups = {hp.meta["type"] for hp in space_of(name).configspace.values()}

    assert groups == {"model", "finetune", "regularise", "augment", "optimise", "schedule"}


# --- canonical form ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_samples_are_canonical_plain_json_and_legal_for_the_trainer(name: str) -> None:
    space = space_of(name)

    for config in space.sample(300, np.random.default_rng(0)):
        assert typed(space.canonical(config)) == typed(config)
        assert typed(json.loads(canonical_json(config))) == sorted(typed(config))
        assert typed(check_values(name, config)) == typed(config)
        assert all(type(value) in (str, int, float, bool) for value in config.values())


@pytest.mark.parametrize("name", SPACES)
def test_canonical_is_idempotent_for_any_spelling(name: str) -> None:
    space = space_of(name)
    for config in space.sample(100, np.random.default_rng(1)):
        text = {key: str(value) for key, value in config.items()}
        numpy = {
            key: np.str_(value) if isinstance(value, str) else np.asarray(value)[()]
            for key, value in config.items()
        }

        assert typed(space.canonical(text)) == typed(config)
        assert typed(space.canonical(numpy)) == typed(config)


def test_every_value_of_every_axis_is_drawn() -> None:
    space = space_of("native")
    drawn = space.sample(3000, np.random.default_rng(3))

    for name in space.names:
        assert {c[name] for c in drawn if name in c} == set(space.legal(name) or ()), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_decay", None),
        ("layer_decay", 0),
        ("layer_decay", 0.0),
        ("layer_decay", "none"),
        ("layer_decay", "0"),
        ("layer_decay", np.float64(0)),
        ("clip_grad", None),
        ("clip_grad", 0),
        ("clip_grad", "0.0"),
        ("sp_reg", None),
        ("sp_reg", "none"),
        ("mixup", "none"),
        ("stoch_norm", None),
        ("stoch_norm", "none"),
        ("stoch_norm", 0),
        ("stoch_norm", "False"),
        ("data_augmentation", None),
        ("weight_decay", 0),
        ("warmup_epochs", 0.0),
    ],
)
@pytest.mark.parametrize("space_id", ["native", "quicktune-v1"])
def test_every_spelling_of_off_becomes_one(space_id: str, name: str, value: object) -> None:
    off = {
        "layer_decay": "none",
        "clip_grad": "none",
        "sp_reg": 0.0,
        "mixup": 0.0,
        "stoch_norm": False,
        "data_augmentation": "none",
        "weight_decay": 0.0,
        "warmup_epochs": 0,
    }[name]

    checked = check_values(space_id, {name: value})

    assert typed(checked) == [(name, type(off), off)]


@pytest.mark.parametrize(
    "value", ["(0.0, 0.99)", "(0,.99)", "[0.0, 0.99]", (0, 0.99), [0.0, 0.99], " (0.0,0.99) "]
)
def test_betas_have_one_text_form(value: object) -> None:
    checked = check_values("native", {"opt": "adam", "opt_betas": value})

    assert checked["opt_betas"] == "(0.0, 0.99)"


@pytest.mark.parametrize(
    "text", ["__import__('os').getcwd()", "(0.9,", "(" * 5000, "[1, 2]", "(0.9, 0.999, 1)"]
)
def test_betas_of_another_form_are_refused_and_never_run(text: str) -> None:
    assert "config.opt_betas" in faults_of(check_values, "native", {"opt_betas": text})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.3),
        ("lr", "fast"),
        ("lr", None),
        ("lr", True),
        ("lr", float("nan")),
        ("batch_size", 0),
        ("batch_size", 33),
        ("batch_size", True),
        ("amp", 1),
        ("amp", "yes"),
        ("opt", 0),
        ("opt", "lion"),
        ("model", 3),
        ("model", ""),
        ("ra_num_ops", 0),
        ("epochs", 50),
    ],
)
def test_an_illegal_value_is_named_with_the_legal_ones(name: str, value: object) -> None:
    if name == "lr" and value is None:
        assert check_values("native", {"lr": None}) == {}  # left out: the default holds
        return

    assert f"config.{name}" in faults_of(check_values, "native", {name: value})


def test_all_illegal_values_are_named_at_once() -> None:
    faults = faults_of(space_of().canonical, {"lr": 7, "modle": "x", "opt": "lion", "mixup": -1})

    assert set(faults) == {"lr", "modle", "opt", "mixup"}
    assert "did you mean model?" in faults["modle"]
    assert "1e-05, 5e-05" in faults["lr"]


def test_left_out_names_take_the_default() -> None:
    config = space_of().canonical({"model": "dla46x_c", "lr": "1e-3"})

    assert config == {**space_of().default(), "model": "dla46x_c", "lr": 1e-3, "stoch_norm": False}


def test_legal_but_inactive_names_are_dropped_so_that_equal_trainings_are_equal() -> None:
    space = space_of()

    with_rest = space.canonical({"opt": "sgd", "momentum": 0.99, "opt_betas": "(0.0, 0.99)"})

    assert with_rest == space.canonical({"opt": "sgd"})
    assert "momentum" in faults_of(space.canonical, {"opt": "sgd", "momentum": 3})


def test_an_unknown_space_is_refused_by_the_trainers_check() -> None:
    assert "another version" in faults_of(check_values, "native-v2", {"lr": 1e-3})["space_id"]


# --- conditions of the native space --------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "absent", "present"),
    [
        ({}, "stoch_norm momentum warmup_lr mixup_prob auto_augment", "opt_betas layer_decay"),
        ({"linear_probing": True}, "pct_to_freeze", "layer_decay sp_reg delta_reg bss_reg"),
        ({"pct_to_freeze": 1.0}, "layer_decay sp_reg delta_reg bss_reg", "cotuning_reg"),
        ({"pct_to_freeze": 0.8}, "stoch_norm", "layer_decay sp_reg"),
        ({"model": "mobilevit_xs"}, "", "stoch_norm"),
        ({"model": "mobilevit_xs", "pct_to_freeze": 1.0}, "stoch_norm", ""),
        ({"model": "mobilevit_xs", "linear_probing": True}, "pct_to_freeze", "stoch_norm"),
        ({"mixup": 0.2}, "", "mixup_prob"),
        ({"cutmix": 4.0}, "", "mixup_prob"),
        ({"warmup_epochs": 5}, "", "warmup_lr"),
        ({"data_augmentation": "auto_augment"}, "ra_num_ops ra_magnitude", "auto_augment"),
        ({"data_augmentation": "random_augment"}, "auto_augment", "ra_num_ops ra_magnitude"),
        ({"opt": "momentum"}, "opt_betas", "momentum"),
        ({"sched": "step"}, "patience_epochs", "decay_rate decay_epochs"),
        ({"sched": "multistep"}, "patience_epochs", "decay_rate decay_epochs"),
        ({"sched": "plateau"}, "decay_rate decay_epochs", "patience_epochs"),
    ],
)
def test_the_native_space_has_no_dead_dimensions(
    given: dict[str, object], absent: str, present: str
) -> None:
    config = space_of().canonical(given)

    assert not set(absent.split()) & set(config)
    assert set(present.split()) <= set(config)


def test_stoch_norm_acts_in_the_16_models_with_batchnorm() -> None:
    space = space_of()

    active = [name for name in HUB.names if "stoch_norm" in space.canonical({"model": name})]

    assert active == [card.name for card in HUB.cards if card.batchnorm]
    assert len(active) == 16


def test_stoch_norm_is_gone_where_no_model_has_batchnorm() -> None:
    hub = select(HUB, models=["edgenext_small", "edgenext_x_small"])

    assert "stoch_norm" not in build_space("native", hub, max_fidelity=3).names


def test_delta_and_cotuning_exclude_each_other() -> None:
    space = space_of()

    faults = faults_of(space.canonical, {"delta_reg": 0.1, "cotuning_reg": 1.0})

    assert "cotuning_reg and delta_reg" in faults
    assert space.canonical({"delta_reg": 0.1})["cotuning_reg"] == 0.0
    assert not any(
        config.get("delta_reg") and config.get("cotuning_reg")
        for config in space.sample(500, np.random.default_rng(5))
    )


def test_qtt_compat_has_only_the_tools_conditions() -> None:
    config = space_of("qtt-compat").canonical({"linear_probing": True})

    assert {"pct_to_freeze", "layer_decay", "stoch_norm", "mixup_prob", "warmup_lr"} <= set(config)


def test_policies_for_colour_images_are_left_out_for_other_channels() -> None:
    space = build_space("native", HUB, max_fidelity=3, in_channels=4)

    assert space.legal("data_augmentation") == ("none",)
    assert "auto_augment" not in space.names


# --- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("amp", "true", (True,)),
        ("amp", "False", (False,)),
        ("lr", "1e-3", (1e-3,)),
        ("lr", "0.001, 1e-4", (1e-4, 1e-3)),
        ("batch_size", "64,32,64", (32, 64)),
        ("layer_decay", "none,.75", ("none", 0.75)),
        ("layer_decay", "0", ("none",)),
        ("opt", "adamw,sgd", ("sgd", "adamw")),
        ("model", "dla46x_c", ("dla46x_c",)),
        ("opt_betas", "(0.9, 0.999),(0.0,0.99)", ("(0.9, 0.999)", "(0.0, 0.99)")),
    ],
)
def test_an_override_fixes_or_narrows(name: str, text: str, values: tuple[object, ...]) -> None:
    space = space_of(overrides={name: text})

    assert space.legal(name) == values
    assert space.default()[name] in values
    assert {c[name] for c in space.sample(200, np.random.default_rng(0)) if name in c} == {*values}


@pytest.mark.parametrize(
    ("overrides", "field", "word"),
    [
        ({"lrr": "1"}, "lrr", "did you mean lr?"),
        ({"lr": "2e-3"}, "lr", "is no choice"),
        ({"lr": ""}, "lr", "empty choice"),
        ({"lr": "1e-3,"}, "lr", "empty choice"),
        ({"lr": ",1e-3"}, "lr", "empty choice"),
        ({"amp": "1"}, "amp", "false, true"),
        ({"model": "resnet50"}, "model", "edgenext_small"),
        ({"epochs": "10"}, "epochs", "space native has"),
    ],
)
def test_a_bad_override_is_named(overrides: dict[str, str], field: str, word: str) -> None:
    faults = faults_of(space_of, overrides=overrides)

    assert word in faults[f"spec.search.overrides.{field}"]


def test_all_bad_overrides_are_named_at_once() -> None:
    faults = faults_of(
        space_of, overrides={"lrr": "1", "amp": "maybe", "opt": "lion", "mixup": "0"}
    )

    assert len(faults) == 3


def test_a_lost_default_moves_to_its_neighbour_on_the_axis() -> None:
    space = space_of(overrides={"lr": "1e-2,5e-4", "opt": "sgd,adam"})

    assert space.default()["lr"] == 5e-4
    assert space.default()["opt"] == "sgd"


@pytest.mark.parametrize(
    ("overrides", "gone", "unconditional"),
    [
        ({"linear_probing": "true"}, {"pct_to_freeze"}, {"layer_decay", "sp_reg"}),
        ({"linear_probing": "false"}, set(), {"pct_to_freeze"}),
        (
            {"pct_to_freeze": "1", "linear_probing": "false"},
            {"layer_decay", "sp_reg", "delta_reg", "bss_reg", "stoch_norm"},
            set(),
        ),
        ({"opt": "sgd"}, {"momentum", "opt_betas"}, set()),
        ({"opt": "adam,adamw"}, {"momentum"}, {"opt_betas"}),
        ({"mixup": "0", "cutmix": "0"}, {"mixup_prob"}, set()),
        ({"mixup": "0.2,8"}, set(), {"mixup_prob"}),
        ({"sched": "cosine"}, {"decay_rate", "decay_epochs", "patience_epochs"}, set()),
        ({"data_augmentation": "none"}, {"auto_augment", "ra_num_ops", "ra_magnitude"}, set()),
        ({"warmup_epochs": "5"}, set(), {"warmup_lr"}),
    ],
)
def test_conditions_follow_an_override(
    overrides: dict[str, str], gone: set[str], unconditional: set[str]
) -> None:
    space = space_of(overrides=overrides)

    conditional = set(space.configspace.conditional_hyperparameters)
    assert not gone & set(space.names)
    assert unconditional <= set(space.names) - conditional
    for config in space.sample(50, np.random.default_rng(0)):
        assert space.canonical(config) == config


def test_names_lost_to_an_override_may_still_be_given_if_they_are_legal() -> None:
    space = space_of(overrides={"opt": "sgd"})

    assert space.canonical({"momentum": "0.9"}) == space.default()
    assert "momentum" in faults_of(space.canonical, {"momentum": "0.5"})


def test_overrides_that_leave_no_configuration_are_a_fault() -> None:
    faults = faults_of(space_of, overrides={"delta_reg": "0.1", "cotuning_reg": "1,2"})

    assert "exclude each other" in faults["spec.search.overrides"]


def test_a_fixed_row_of_the_paper_can_be_overridden_to_another_value() -> None:
    space = space_of("paper-table3", overrides={"amp": "false", "weight_decay": "0,1e-2"})

    assert space.legal("amp") == (False,)
    assert space.legal("weight_decay") == (0.0, 1e-2)


# --- digests -------------------------------------------------------------------------------------


def test_the_digest_tells_spaces_apart_and_not_training_lengths() -> None:
    digests = {space_of(name).sha for name in SPACES}
    digests |= {space_of(overrides={"amp": "true"}).sha}
    digests |= {build_space("native", select(HUB, models=["dla46x_c"]), max_fidelity=50).sha}

    assert len(digests) == 6
    assert build_space("native", HUB, max_fidelity=3).sha == space_of("native").sha


def test_the_order_of_an_overrides_items_does_not_change_the_digest() -> None:
    one = space_of(overrides={"lr": "1e-3,1e-4", "amp": "true"})
    other = space_of(overrides={"amp": "true", "lr": "0.0001, 0.001"})

    assert one.sha == other.sha


def test_digest_and_samples_are_the_same_in_a_process_with_another_hash_seed() -> None:
    code = (
        "import numpy as np, hashlib\n"
        "from qtt_core.hub import load_hub\n"
        "from qtt_core.space import build_space\n"
        "s = build_space('native', load_hub('timm24'), max_fidelity=50)\n"
        "rng = np.random.default_rng(11)\n"
        "print(s.sha, hashlib.sha256(repr(s.sample(50, rng)).encode()).hexdigest(), "
        "hashlib.sha256(repr(s.neighbours(s.default(), rng, 5)).encode()).hexdigest())\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }

    assert len(answers) == 1


def test_the_same_generator_state_gives_the_same_samples_whatever_came_before() -> None:
    space = space_of()
    first = space.sample(20, np.random.default_rng(4))
    space.sample(7, np.random.default_rng(9))

    assert space.sample(20, np.random.default_rng(4)) == first
    rng = np.random.default_rng(4)
    assert [space.sample(20, rng), space.sample(20, rng)] != [first, first]
    assert space.sample(0, rng) == []


# --- neighbours and changes ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_a_neighbour_differs_in_one_or_two_chosen_coordinates(name: str) -> None:
    space = space_of(name)
    rng = np.random.default_rng(6)

    for config in space.sample(30, rng):
        near = space.neighbours(config, rng, 5)

        assert len(near) == 5
        for other in near:
            assert space.canonical(other) == other
            shared = set(config) & set(other)
            moved = {key for key in shared if config[key] != other[key]}
            assert 1 <= len(moved) <= 2
            for key in moved & {"lr", "batch_size", "mixup", "drop"}:
                legal = space.legal(key) or ()
                assert abs(legal.index(config[key]) - legal.index(other[key])) == 1


def test_a_space_without_room_has_no_neighbours() -> None:
    cs = ConfigurationSpace()
    cs.add(Constant("lr", 0.1), OrdinalHyperparameter("drop", [0.1]))
    space = SearchSpace.from_configspace(cs, 5)

    assert space.neighbours(space.default(), np.random.default_rng(0), 3) == []


def test_what_a_change_activates_is_drawn_and_the_rest_is_kept() -> None:
    space = space_of()
    rng = np.random.default_rng(0)
    base = space.canonical({"opt": "sgd", "lr": 1e-2})

    drawn = {space.changed(base, {"opt": "adamp"}, rng)["opt_betas"] for _ in range(40)}
    same = space.changed(base, {"opt": "adamp"}, rng)

    assert len(drawn) > 1
    assert {key: same[key] for key in base if key != "opt"} == {
        key: base[key] for key in base if key != "opt"
    }


# --- other ConfigSpaces --------------------------------------------------------------------------


def mixed_space() -> ConfigurationSpace:
    cs = ConfigurationSpace()
    algorithm = CategoricalHyperparameter("a", ["x", "y", None], default_value="y")
    rate = Float("rate", (1e-6, 1e-1), default=1e-3, log=True)
    layers = Integer("layers", (1, 64), default=4, log=True)
    low = Integer("low", (0, 10), default=2)
    high = Integer("high", (0, 10), default=8)
    only_x = Float("only_x", (-1.0, 1.0), default=0.25)
    level = OrdinalHyperparameter("level", ["none", 1, 2.5], default_value=1)
    cs.add(algorithm, rate, layers, low, high, only_x, level, Constant("c", "fixed"))
    cs.add(EqualsCondition(only_x, algorithm, "x"))
    cs.add(ForbiddenGreaterThanRelation(low, high))
    cs.add(
        ForbiddenAndConjunction(
            ForbiddenEqualsClause(algorithm, "x"), ForbiddenEqualsClause(level, "none")
        )
    )
    return cs


def test_any_configspace_works_with_ranges_conditions_and_forbidden_clauses() -> None:
    space = SearchSpace.from_configspace(mixed_space(), 9, 2)
    rng = np.random.default_rng(0)

    assert (space.space_id, space.max_fidelity, space.step) == ("custom", 9, 2)
    for config in space.sample(200, rng):
        assert typed(space.canonical(config)) == typed(config)
        assert typed(json.loads(canonical_json(config))) == sorted(typed(config))
        assert ("only_x" in config) == (config["a"] == "x")
        assert config["low"] <= config["high"]  # type: ignore[operator]
        for other in space.neighbours(config, rng, 2):
            assert typed(space.canonical(other)) == typed(other)


def test_values_of_ranges_are_checked_and_typed() -> None:
    space = SearchSpace.from_configspace(mixed_space(), 9)

    config = space.canonical({"rate": "1e-2", "layers": 5.0, "a": None})

    assert typed({k: config[k] for k in ("rate", "layers", "a")}) == [
        ("rate", float, 0.01),
        ("layers", int, 5),
        ("a", type(None), None),
    ]
    faults = faults_of(space.canonical, {"rate": 1.0, "layers": 2.5, "low": "many", "c": "other"})
    assert set(faults) == {"rate", "layers", "low", "c"}


def test_forbidden_combinations_of_any_space_are_named() -> None:
    space = SearchSpace.from_configspace(mixed_space(), 9)

    assert "high and low" in faults_of(space.canonical, {"low": 5, "high": 4})
    assert "a and level" in faults_of(space.canonical, {"a": "x", "level": "none"})


def test_choices_that_are_no_json_are_refused() -> None:
    cs = ConfigurationSpace()
    cs.add(CategoricalHyperparameter("shape", [(1, 2), (3, 4)]))

    assert "JSON scalars" in faults_of(SearchSpace.from_configspace, cs, 9)["shape"]


def test_a_space_that_differs_in_one_bound_has_another_digest() -> None:
    one, other = ConfigurationSpace(), ConfigurationSpace()
    one.add(Float("rate", (0.0, 1.0)))
    other.add(Float("rate", (0.0, 0.9)))

    assert SearchSpace.from_configspace(one, 3).sha != SearchSpace.from_configspace(other, 3).sha


def test_a_named_space_survives_configspaces_own_json() -> None:
    native = space_of()
    text = json.dumps(native.configspace.to_serialized_dict())

    custom = custom_space(text, HUB, max_fidelity=50)

    assert custom.configspace == native.configspace
    rng, same = np.random.default_rng(2), np.random.default_rng(2)
    assert custom.sample(50, rng) == native.sample(50, same)


def test_a_custom_space_without_models_searches_the_hubs() -> None:
    cs = ConfigurationSpace()
    cs.add(Float("lr", (1e-5, 1e-1), log=True))

    space = custom_space(json.dumps(cs.to_serialized_dict()), HUB, max_fidelity=4)

    assert space.legal("model") == HUB.names
    assert space.default()["model"] == HUB.default.name
    lr = space.sample(1, np.random.default_rng(0))[0]["lr"]
    assert check_values("custom", {"lr": lr}) == {"lr": lr}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "spec.search.configSpaceRef"),
        ("[]", "spec.search.configSpaceRef"),
        ('{"name": "x"}', "spec.search.configSpaceRef"),
    ],
)
def test_a_file_that_is_no_configspace_is_refused(text: str, field: str) -> None:
    assert field in faults_of(custom_space, text, HUB, max_fidelity=3)


def test_a_custom_space_may_only_name_what_the_trainer_reads() -> None:
    cs = ConfigurationSpace()
    cs.add(Float("learning_rate", (0.1, 1.0)), CategoricalHyperparameter("model", ["resnet50"]))
    text = json.dumps(cs.to_serialized_dict())

    assert (
        "resnet50"
        in faults_of(custom_space, text, HUB, max_fidelity=3)["spec.search.configSpaceRef: model"]
    )
    cs = ConfigurationSpace()
    cs.add(Float("learning_rate", (0.1, 1.0)))
    faults = faults_of(custom_space, json.dumps(cs.to_serialized_dict()), HUB, max_fidelity=3)
    assert "spec.search.configSpaceRef: learning_rate" in faults


# --- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "legal", "value"),
    [
        ("1e-3", (0.01, 0.001), 0.001),
        ("true", (False, True), True),
        ("none", ("none", 1), "none"),
        ("1", ("none", 1), 1),
        ("1", ("1", 1), "1"),
        ("10.0", (1, 10), 10),
    ],
)
def test_quoted_values_become_the_equal_member(
    text: str, legal: tuple[object, ...], value: object
) -> None:
    assert parse_value(text, legal) is value or parse_value(text, legal) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "legal"), [("1", (True, False)), ("", (1,)), ("0.1", (0.2,))])
def test_a_quoted_value_that_equals_nothing_is_refused(
    text: str, legal: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        parse_value(text, legal)  # type: ignore[arg-type]


def test_an_unknown_space_names_the_known_ones() -> None:
    assert "paper-table3" in faults_of(space_of, "nativ")["spec.search.space"]


@pytest.mark.parametrize(("longest", "step"), [(0, 1), (5, 0), (5, -1)])
def test_a_fidelity_without_epochs_is_refused(longest: int, step: int) -> None:
    assert "spec.fidelity" in faults_of(build_space, "native", HUB, max_fidelity=longest, step=step)


def test_the_trainers_check_loads_neither_configspace_nor_torch(root: Path) -> None:
    code = (
        "import sys\n"
        "from qtt_core.space import check_values\n"
        "import qtt_core.spec, qtt_core.hub\n"
        "check_values('native', {'lr': 1e-3})\n"
        "loaded = {'ConfigSpace', 'scipy', 'torch', 'gpytorch', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(', '.join(loaded) or 0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr


def test_building_a_space_loads_no_torch(root: Path) -> None:
    code = (
        "import sys\n"
        "from qtt_core.hub import load_hub\n"
        "from qtt_core.space import build_space\n"
        "build_space('native', load_hub('timm24'), max_fidelity=5).default()\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)

    assert ended.returncode == 0

"""Every hyperparameter reaches the encoded row; columns never move."""

import numpy as np
import pytest
from ConfigSpace import (
    CategoricalHyperparameter,
    ConfigurationSpace,
    UniformFloatHyperparameter,
    UniformIntegerHyperparameter,
)

from qtt_core.encoding import build_encoder, trainable_share
from qtt_core.hub import load_hub
from qtt_core.pool import generator
from qtt_core.space import SPACES, SearchSpace, build_space

HUB = load_hub("timm24")
META = {"n_train": 500.0, "n_val": 160.0, "num_classes": 20.0}


def varied(space, count=400):
    """For each searched hyperparameter: pairs of configurations that differ in it."""
    rng = generator(5, "test")
    pairs = {}
    for config in space.sample(count, rng):
        for name in config:
            legal = space.legal(name)
            if legal is None or len(legal) < 2:
                continue
            other = next(v for v in legal if v != config[name])
            pairs.setdefault(name, []).append((config, {**config, name: other}))
    return pairs


@pytest.mark.parametrize("name", SPACES)
def test_every_hyperparameter_moves_the_row(name):
    """Upstream sliced columns off and was blind to most of its inputs (10-optimizer 11, 1)."""
    space = build_space(name, HUB, max_fidelity=50)
    encoder = build_encoder(space, HUB, META)
    searched = {n for n in space.names if space.legal(n) is None or len(space.legal(n)) > 1}
    pairs = varied(space)

    assert set(pairs) == searched
    for hyperparameter, found in pairs.items():
        for a, b in found[:20]:
            rows = encoder([a, b])
            assert np.abs(rows[0] - rows[1]).max() > 1e-3, hyperparameter


@pytest.mark.parametrize("name", SPACES)
def test_rows_are_finite_and_of_like_size(name):
    space = build_space(name, HUB, max_fidelity=50)
    rows = build_encoder(space, HUB, META)(space.sample(300, generator(1, "test")))
    assert np.all(np.isfinite(rows))
    assert np.abs(rows).max() < 4


def test_all_values_of_an_ordinal_are_told_apart():
    space = build_space("native", HUB, max_fidelity=50)
    encoder = build_encoder(space, HUB, META)
    base = space.default()
    for name in ("lr", "batch_size", "weight_decay", "mixup", "clip_grad"):
        rows = encoder([{**base, name: value} for value in space.legal(name)])
        assert len(np.unique(rows.round(9), axis=0)) == len(space.legal(name)), name


def test_a_row_does_not_depend_on_its_neighbours():
    space = build_space("native", HUB, max_fidelity=50)
    encoder = build_encoder(space, HUB, META)
    configs = space.sample(20, generator(2, "test"))
    alone = np.vstack([encoder([config]) for config in configs])
    assert np.array_equal(encoder(configs), alone)


def test_models_with_like_cards_have_like_rows():
    space = build_space("native", HUB, max_fidelity=50)
    encoder = build_encoder(space, HUB)
    cards = encoder.named(["card:"])
    base = space.default()
    names = ("edgenext_small", "edgenext_x_small", "beit_large_patch16_512")
    small, sibling, giant = encoder([{**base, "model": name} for name in names])[:, cards]
    assert np.linalg.norm(small - sibling) < np.linalg.norm(small - giant)


def test_a_space_of_the_user_s_own_is_encoded_too():
    cs = ConfigurationSpace()
    cs.add(
        UniformFloatHyperparameter("rate", 1e-5, 1e-1, log=True),
        UniformIntegerHyperparameter("depth", 1, 9),
        CategoricalHyperparameter("kind", ["a", "b", "c"]),
    )
    space = SearchSpace.from_configspace(cs, 9)
    encoder = build_encoder(space)
    rows = encoder(
        [
            {"rate": 1e-5, "depth": 1, "kind": "a"},
            {"rate": 1e-3, "depth": 5, "kind": "b"},
            {"rate": 1e-1, "depth": 9, "kind": "c"},
        ]
    )
    rate, depth = rows[:, encoder.columns.index("rate")], rows[:, encoder.columns.index("depth")]
    assert rate == pytest.approx([-1, 0, 1])
    assert depth == pytest.approx([-1, 0, 1])
    assert len({tuple(row) for row in rows}) == 3


def test_the_batch_that_really_runs_is_a_column():
    space = build_space("native", HUB, max_fidelity=50)
    encoder = build_encoder(space, HUB, {"n_train": 40.0})
    base = space.default()
    column = encoder.columns.index("batch_size:run")
    rows = encoder([{**base, "batch_size": b} for b in (32, 64, 512)])[:, column]
    assert rows[0] < rows[1] == rows[2]


@pytest.mark.parametrize(
    ("config", "share"),
    [
        ({"linear_probing": True}, 0.0),
        ({"pct_to_freeze": 1.0}, 0.0),
        ({"pct_to_freeze": 0.4}, 0.6),
        ({}, 1.0),
    ],
)
def test_trainable_share(config, share):
    assert trainable_share(config) == pytest.approx(share)

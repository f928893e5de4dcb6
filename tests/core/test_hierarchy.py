"""Weights of many data sets: products are what they say, EM finds what varies together."""

import numpy as np
import pytest

from qtt_core.hierarchy import fit_hierarchy, narrow, wide


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(-1, 1, (n, 2)), rng.integers(2, size=(n, 2))])


def test_features_are_products_of_columns_less_their_means():
    x = rows(50)
    basis = wide(x, [0, 1, 2, 3], x[:, 0] ** 2)
    assert tuple(map(tuple, basis.pairs)) == (
        (-1, -1), (0, -1), (1, -1), (2, -1), (3, -1), (0, 0), (1, 1), (1, 0), (0, 2), (0, 3),
    )  # fmt: skip
    phi = basis(x)
    assert (phi[:, 0] == 1).all()
    assert np.allclose(phi[:, 1:].mean(0), 0)
    assert np.allclose(phi[:, 7], x[:, 0] * x[:, 1] - np.mean(x[:, 0] * x[:, 1]))


def test_the_column_that_explains_most_meets_all_others():
    x = rows(200)
    basis = wide(x, [0, 1, 2, 3], 3 * x[:, 1] - x[:, 1] ** 2)
    assert {(1, 2), (1, 3)} <= set(map(tuple, basis.pairs))
    assert (0, 2) not in set(map(tuple, basis.pairs))


def test_columns_that_are_not_usable_and_flags_squared_are_left_out():
    pairs = set(map(tuple, narrow(rows(50), [1, 2]).pairs))
    assert pairs == {(-1, -1), (1, -1), (2, -1), (1, 1)}


@pytest.fixture(scope="module")
def family():
    """80 data sets of 30 runs: column 0 pays by a descriptor, columns 2 and 3 move as one."""
    rng = np.random.default_rng(3)
    x, task = rows(2400, 1), np.repeat(np.arange(80), 30)
    z = rng.normal(size=(80, 1))
    together = rng.normal(0, 1.0, 80)
    weights = np.column_stack([2 * z[:, 0], np.zeros(80), together, together])
    y = np.sum(x * weights[task], axis=1) + rng.normal(0, 0.2, 2400)
    basis = narrow(x, [0, 1, 2, 3])
    return basis, fit_hierarchy(basis(x), y, task, z)


def test_a_descriptor_moves_the_weight_that_it_rules(family):
    _, found = family
    assert found.weights[1, 1] == pytest.approx(2.0, abs=0.35)
    assert np.abs(found.weights[1, 2:]).max() < 0.5


def test_weights_that_move_together_are_found(family):
    _, found = family
    s = found.covariance
    assert s[3, 4] / np.sqrt(s[3, 3] * s[4, 4]) > 0.9
    assert s[2, 2] < 0.1 * s[3, 3]
    assert found.noise == pytest.approx(0.04, rel=0.25)


def test_the_factor_is_a_root_of_the_covariance(family):
    _, found = family
    assert np.allclose(found.factor() @ found.factor().T, found.covariance, atol=1e-10)


def test_a_result_on_a_new_data_set_speaks_for_what_moves_with_it(family):
    basis, found = family
    x = np.array([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    kernel = basis(x) @ found.covariance @ basis(x).T
    assert kernel[0, 1] > 3 * abs(kernel[0, 2])


def test_more_features_than_runs_break_nothing():
    x = rows(12)
    basis = wide(x, [0, 1, 2, 3], x[:, 0])
    found = fit_hierarchy(basis(x), x[:, 0], np.repeat([0, 1], 6), np.zeros((2, 0)))
    assert np.isfinite(found.covariance).all()
    assert found.noise > 0

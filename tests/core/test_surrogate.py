"""The curve process against dense algebra; fits; sensitivity to every hyperparameter."""

from dataclasses import fields, replace

import numpy as np
import pytest

from qtt_core.deep_kernel import DeepKernel, Samples, curve_row, start
from qtt_core.deep_kernel import fit as fit_deep
from qtt_core.encoding import build_encoder
from qtt_core.fitting import Curves, fit
from qtt_core.gaussian import factor, posterior
from qtt_core.hub import load_hub
from qtt_core.pool import generator
from qtt_core.space import build_space
from qtt_core.surrogate import (
    CurveModel,
    Rows,
    Squash,
    config_kernel,
    curve_kernel,
    groups_of,
    prior_parameters,
    progress,
    straight,
)

HUB = load_hub("timm24")
T = 10
SPACE = build_space("native", HUB, max_fidelity=T)
ENCODER = build_encoder(SPACE, HUB, {"n_train": 500.0})
NAMES, MEMBER = groups_of(ENCODER)
PRIOR = prior_parameters(ENCODER, 0)


def data(count=12, epochs=4, seed=0):
    rng = generator(seed, "test")
    x = ENCODER(SPACE.sample(count, rng))
    index = np.repeat(np.arange(count), epochs)
    epoch = np.tile(np.arange(1.0, epochs + 1), count)
    lr = x[:, ENCODER.columns.index("lr")]
    u = (
        1.5
        - 2 * lr[index] ** 2
        - 1.0 * (1 - progress(epoch, T))
        + 0.05 * rng.normal(size=len(epoch))
    )
    return x, Rows(index=index.astype(np.intp), epoch=epoch, u=u, noise=np.zeros(len(u)))


def trend(count):
    return straight(np.full(count, 0.5), T)


def model_of(x, rows, parameters=PRIOR):
    return CurveModel(parameters, MEMBER, T, x, trend(len(x)), rows)


def fitted(x, rows, **options):
    curves = Curves(x=x, trend=trend(len(x)), rows=rows)
    return fit(PRIOR, MEMBER, [curves], max_fidelity=T, **options)


def predict(model, x, identity, epoch):
    kx = config_kernel(model.parameters, MEMBER, model.x, x)
    diagonal = np.full(len(x), model.parameters.deep + model.parameters.groups.sum())
    return model.predict(
        kx, np.asarray(identity, dtype=np.intp), trend(len(x)), diagonal, np.asarray(epoch)
    )


def test_predictions_agree_with_a_dense_inverse():
    x, rows = data()
    new = ENCODER(SPACE.sample(5, generator(9, "test")))
    mean, sd = predict(model_of(x, rows), new, [-1] * 5, [10.0] * 5)

    joint = np.vstack([x, new])
    index = np.concatenate([rows.index, np.arange(12, 17)])
    tau = progress(np.concatenate([rows.epoch, np.full(5, 10.0)]), T)
    kx = config_kernel(PRIOR, MEMBER, joint, joint)[np.ix_(index, index)]
    k = curve_kernel(PRIOR, kx, index[:, None] == index[None, :], tau, tau)
    n = len(rows.u)
    inverse = np.linalg.inv(k[:n, :n] + PRIOR.noise * np.eye(n))
    rise = 0.4 * np.log(T)
    residual = rows.u - (0.5 - rise * (1 - tau[:n]))
    dense = 0.5 - rise * (1 - tau[n:]) + k[n:, :n] @ inverse @ residual
    variance = np.diag(k[n:, n:] - k[n:, :n] @ inverse @ k[:n, n:])
    assert mean == pytest.approx(dense, abs=1e-8)
    assert sd**2 == pytest.approx(variance, abs=1e-8)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_further_rows_extend_the_process_as_if_it_had_known_them(noise):
    x, rows = data()
    rows = replace(rows, noise=np.full(len(rows.u), noise))
    parts = [Rows(**{f.name: getattr(rows, f.name)[cut] for f in fields(Rows)})
             for cut in (slice(0, 30), slice(30, None))]  # fmt: skip
    whole, extended = model_of(x, rows), model_of(x, parts[0]).extended(parts[1])
    asked = (np.vstack([x[:3], x[-3:]]), [0, 1, 2, -1, -1, -1], [10.0] * 6)
    for ours, theirs in zip(predict(extended, *asked), predict(whole, *asked), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_the_kernel_is_positive_definite():
    x, rows = data(20)
    tau = progress(rows.epoch, T)
    kx = config_kernel(PRIOR, MEMBER, x, x)[np.ix_(rows.index, rows.index)]
    k = curve_kernel(PRIOR, kx, rows.index[:, None] == rows.index[None, :], tau, tau)
    assert np.linalg.eigvalsh(k).min() > -1e-8


def test_a_configuration_s_own_curve_counts_more_than_its_siblings():
    x, rows = data()
    model = model_of(x, rows)
    own_mean, own_sd = predict(model, x[:1], [0], [10.0])
    _, twin_sd = predict(model, x[:1], [-1], [10.0])
    assert own_sd[0] < twin_sd[0]
    assert abs(own_mean[0] - rows.u[3]) < 1.5


def test_forecasts_grow_less_certain_with_distance():
    x, rows = data()
    _, sd = predict(model_of(x, rows), np.repeat(x[:1], 6, 0), [0] * 6, np.arange(5.0, 11.0))
    assert np.all(np.diff(sd) > 0)


def test_without_data_the_prior_answers():
    empty = Rows(
        index=np.array([], dtype=np.intp), epoch=np.array([]), u=np.array([]), noise=np.array([])
    )
    x, _ = data(3)
    mean, sd = predict(model_of(x[:0], empty), x, [-1] * 3, [1.0, 5.0, 10.0])
    assert np.all(np.diff(mean) > 0)
    assert np.all(sd > 0.5)


def test_fitting_explains_held_out_configurations_better():
    x, rows = data(30)
    parameters = fitted(x, rows)
    held_x, held = data(40, seed=3)
    last = np.flatnonzero(held.epoch == 4)

    def error(p):
        mean, _ = predict(model_of(x, rows, p), held_x, [-1] * 40, [4.0] * 40)
        return np.mean((mean - held.u[last]) ** 2)

    assert error(parameters) < error(PRIOR)
    assert error(parameters) < 0.6 * np.var(held.u[last])


def test_fitting_is_repeatable_to_the_bit():
    x, rows = data()
    a, b = (fitted(x, rows, steps=5) for _ in range(2))
    assert a.noise == b.noise
    assert np.array_equal(a.groups, b.groups)
    assert np.array_equal(a.hidden, b.hidden)


@pytest.mark.parametrize("kind", ["curves", "paper"])
def test_every_hyperparameter_moves_the_prediction(kind):
    x, rows = data()
    rng = generator(4, "test")
    base = SPACE.sample(60, rng)
    for name in SPACE.names:
        legal = SPACE.legal(name)
        found = next((c for c in base if name in c), None)
        if found is None or len(legal) < 2:
            continue
        other = {**found, name: next(v for v in legal if v != found[name])}
        pair = ENCODER([found, other])
        if kind == "curves":
            mean, _ = predict(model_of(x, rows), pair, [-1, -1], [10.0, 10.0])
        else:
            curves = np.array([curve_row([], int(e), T) for e in rows.epoch])
            weights = start(x.shape[1], 2 * T + 1, 0)
            model = DeepKernel(weights, Samples(x[rows.index], curves), 0.2 + 0.1 * rows.u)
            mean, _ = model.predict(Samples(pair, curves[:2]))
        assert mean[0] != mean[1], name


def test_identical_rows_and_constant_scores_do_not_break_anything():
    x, rows = data()
    same = np.repeat(x[:1], 12, 0)
    flat = Rows(index=rows.index, epoch=rows.epoch, u=np.full(len(rows.u), -3.9), noise=rows.noise)
    parameters = fitted(same, flat)
    mean, sd = predict(model_of(same, flat, parameters), x, [-1] * 12, [10.0] * 12)
    assert np.all(np.isfinite(mean))
    assert np.all(np.isfinite(sd))


@pytest.mark.parametrize(
    "matrix",
    [np.ones((5, 5)), np.diag([1.0, -1.0]), np.full((2, 2), np.nan), np.zeros((3, 3))],
    ids=["singular", "indefinite", "nan", "zero"],
)
def test_a_bad_covariance_still_has_a_factor(matrix):
    lower = factor(matrix)
    assert np.all(np.isfinite(lower))
    mean, variance = posterior(lower, np.ones(len(matrix)), np.ones((len(matrix), 2)), np.ones(2))
    assert np.all(variance > 0)
    assert mean.shape == (2,)


@pytest.mark.parametrize("squash", [Squash(), Squash(chance=0.1, n_val=200), Squash(n_val=1)])
def test_scores_survive_squashing(squash):
    scores = np.linspace(0.2, 0.95, 7)
    back = squash.to_score(squash.to_u(scores))
    if squash.n_val != 1:
        assert back == pytest.approx(scores, abs=1e-9)
    for score in (0.0, 1.0):
        assert np.isfinite(squash.to_u(np.array([score]))).all()
        assert np.isfinite(squash.noise(squash.to_u(np.array([score])))).all()


def test_slope_is_the_derivative_of_the_score():
    squash, u = Squash(chance=0.1), np.array([-2.0, 0.0, 3.0])
    numeric = (squash.to_score(u + 1e-6) - squash.to_score(u - 1e-6)) / 2e-6
    assert squash.slope(u) == pytest.approx(numeric, rel=1e-6)


def test_the_noise_of_few_images_is_that_of_counting():
    squash = Squash(n_val=100)
    rng = np.random.default_rng(0)
    u = squash.to_u(rng.binomial(100, 0.7, 20_000) / 100)
    assert squash.noise(squash.to_u(np.array([0.7])))[0] == pytest.approx(u.var(), rel=0.1)


def test_the_deep_kernel_learns_and_keeps_noise_out_of_its_deviation():
    x, rows = data(30)
    y = 0.3 + 0.15 * np.clip(rows.u, -2, 2)
    curves = np.array([curve_row([], int(e), T) for e in rows.epoch])
    samples = Samples(x[rows.index], curves)
    weights = start(x.shape[1], 2 * T + 1, 0)

    fitted = fit_deep(weights, samples, y)
    mean, sd = DeepKernel(fitted, samples, y).predict(samples)

    assert np.mean((mean - y) ** 2) < 0.2 * np.var(y)
    assert np.median(sd) < np.sqrt(np.exp(float(fitted["noise"])))
    assert float(fitted["noise"]) != float(weights["noise"])


def test_an_unobserved_epoch_is_not_a_zero_score():
    assert not np.array_equal(curve_row([], 2, T), curve_row([0.0], 2, T))


def test_progress_is_logarithmic_and_one_at_t():
    assert progress(np.array([1.0, 10.0]), 10) == pytest.approx([0, 1])
    assert progress(np.array([1.0]), 1) == pytest.approx([1])

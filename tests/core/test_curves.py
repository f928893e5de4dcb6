"""The toy tasks show what they promise, and Quick-Tune beats the model-free rules on them."""

import numpy as np
import pytest

from qtt_core.hub import load_hub
from qtt_core.optimizer import ALGORITHMS
from qtt_core.pool import draw, generator
from qtt_core.space import build_space
from qtt_core.steps import Options
from qtt_core.testing.curves import ToyTask, best_and_worst, simulate

HUB = load_hub("timm24")
T = 10
SPACE = build_space("native", HUB, max_fidelity=T)
CONFIGS = draw(SPACE, size=400, rng=generator(0, "test"), known=[])


def make_task(seed=0, max_fidelity=T):
    return ToyTask(seed=seed, hub=HUB, max_fidelity=max_fidelity)


CURVES = [make_task().curve(config) for config in CONFIGS]


def test_a_task_is_a_function_of_its_seed():
    again, other = make_task(), make_task(1)
    assert [again.curve(c) for c in CONFIGS[:20]] == CURVES[:20]
    assert [other.curve(c) for c in CONFIGS[:20]] != CURVES[:20]


def test_seconds_span_far_more_than_24_times():
    seconds = [np.median(curve.seconds) for curve in CURVES]
    assert max(seconds) / min(seconds) > 24


def test_scores_are_rounded_to_the_validation_set():
    scaled = np.array([curve.scores for curve in CURVES]) * 200
    assert np.allclose(scaled, scaled.round())


def test_curves_rise_cross_saturate_overfit_and_diverge():
    truth = np.array([curve.truth for curve in CURVES])
    first, last = truth[:, 0], truth[:, -1]
    ranks = np.corrcoef(np.argsort(np.argsort(first)), np.argsort(np.argsort(last)))[0, 1]
    assert (last > first).mean() > 0.6
    assert 0.2 < ranks < 0.97
    assert (truth.max(1) > last + 1e-3).mean() > 0.05
    assert 0.02 < np.mean([curve.diverges_at is not None for curve in CURVES]) < 0.4


def regrets(name, seed, shares=(0.25, 1.0)):
    task = make_task(seed)
    best, worst = best_and_worst(task, CONFIGS)
    total = 10 * T * float(np.median([task.seconds(config) for config in CONFIGS]))
    optimizer = ALGORITHMS[name](
        SPACE,
        seed=seed,
        hub=HUB,
        metafeatures=task.metafeatures,
        options=Options(pool_size=128),
    )
    path = simulate(optimizer, task, total_seconds=total, workers=2)
    return [(best - path.at(share * total)) / (best - worst) for share in shares]


@pytest.mark.slow
def test_quicktune_beats_the_model_free_rules_over_ten_seeds():
    found = {
        name: np.array([regrets(name, seed) for seed in range(10)])
        for name in ("QuickTune", "Random", "FreezeThawRandom", "SuccessiveHalving", "ASHA")
    }
    ours = found.pop("QuickTune")
    for name, theirs in found.items():
        assert np.all((theirs - ours).mean(0) > 0), name


def test_quicktune_beats_random_search_on_two_tasks():
    ours = np.mean([regrets("QuickTune", seed) for seed in (20, 21)], axis=0)
    random = np.mean([regrets("Random", seed) for seed in (20, 21)], axis=0)
    assert np.all(ours < random)

"""The chance to finish: a prior rate, then what happened to configurations alike."""

import numpy as np
import pytest

from qtt_core.encoding import build_encoder
from qtt_core.failure import probability_to_finish
from qtt_core.hub import load_hub
from qtt_core.space import build_space
from qtt_core.steps import Outcome
from qtt_core.trials import Trial

HUB = load_hub("timm24")
SPACE = build_space("native", HUB, max_fidelity=10)
ENCODER = build_encoder(SPACE, HUB)
BASE = dict(SPACE.default())


def chance(history, candidate):
    trials = [
        Trial(config_id=i, config=config, failure=failure)
        for i, (config, failure) in enumerate(history)
    ]
    rows = ENCODER([t.config for t in trials])
    return float(probability_to_finish(ENCODER, trials, rows, ENCODER([candidate]))[0])


def test_before_anything_ran_a_tenth_is_expected_to_fail():
    assert chance([], BASE) == pytest.approx(0.9)


def test_failures_at_a_high_rate_warn_of_high_rates_only():
    history = [({**BASE, "lr": 1e-2}, Outcome.DIVERGED)] * 3 + [({**BASE, "lr": 1e-4}, None)] * 3
    assert chance(history, {**BASE, "lr": 1e-2}) < 0.4
    assert chance(history, {**BASE, "lr": 1e-4}) > 0.8


def test_memory_failures_stay_with_the_model():
    big = {**BASE, "model": "beit_large_patch16_512"}
    history = [(big, Outcome.OOM)] * 3 + [(BASE, None)] * 3
    assert chance(history, big) < 0.4 < 0.8 < chance(history, BASE)


def test_the_answer_is_a_probability_whatever_happened():
    history = [(BASE, Outcome.DIVERGED)] * 500
    assert 0 < chance(history, BASE) < 0.1
    assert 0.99 < chance([(BASE, None)] * 500, BASE) < 1
    assert np.isfinite(chance(history, {**BASE, "lr": 1e-5}))

"""The model-free rules on hand-made books."""

import pytest

from qtt_core.baselines import ASHA, FreezeThawRandom, Random, SuccessiveHalving, promotion
from qtt_core.steps import BudgetView, Options, Outcome, Proposal, Why
from qtt_core.trials import Trials

ANY = BudgetView()


def make_book(*curves, max_fidelity=9, fresh=3):
    trials = Trials(max_fidelity=max_fidelity, step=1, options=Options())
    trials.add({"lr": i} for i in range(len(curves) + fresh))
    for config_id, scores in enumerate(curves):
        trials.trial(config_id).scores.extend(scores)
    return trials


def start(trials, config_id, to):
    trials.propose(
        Proposal(
            config_id=config_id,
            config=trials.trial(config_id).config,
            fidelity_from=trials.trial(config_id).t,
            fidelity_to=to,
            expected_seconds=1.0,
            why=Why(rule="test"),
        )
    )


def test_the_best_third_of_a_rung_is_promoted():
    found = promotion(make_book([0.1], [0.3], [0.2]))
    assert (found.config_id, found.fidelity_to) == (1, 3)


def test_two_results_promote_nobody():
    assert promotion(make_book([0.1], [0.3])) is None


def test_the_highest_rung_comes_first():
    high = [[0.1] * 3, [0.2] * 3, [0.3] * 3]
    found = promotion(make_book(*high, [0.9], [0.8]))
    assert (found.config_id, found.fidelity_to) == (2, 9)


def test_scores_are_compared_at_the_rung_not_at_the_end():
    found = promotion(make_book([0.5], [0.4, 0.9, 0.9], [0.1]))
    assert (found.config_id, found.fidelity_to) == (0, 3)


def test_failures_count_as_beaten():
    trials = make_book([0.4], [], [])
    trials.trial(1).failure = trials.trial(2).failure = Outcome.DIVERGED
    assert promotion(trials).config_id == 0


def test_a_pending_configuration_is_not_promoted_again():
    trials = make_book([0.1], [0.3], [0.2])
    start(trials, 1, 3)
    assert promotion(trials) is None


def test_asha_begins_a_fresh_configuration_where_nothing_can_be_promoted():
    found = ASHA(0).choose(make_book([0.1], [0.3]), ANY)
    assert found.config_id >= 2
    assert found.fidelity_to == 1


def test_random_search_finishes_what_it_began():
    found = Random(0).choose(make_book([0.1], [], [0.2] * 9), ANY)
    assert (found.config_id, found.fidelity_to) == (0, 9)


def test_freeze_thaw_random_is_uniform_over_the_trainable():
    counts = dict.fromkeys(range(6), 0)
    for seed in range(600):
        found = FreezeThawRandom(seed).choose(make_book([0.1], [0.2], [0.3] * 9), ANY)
        counts[found.config_id] += 1
        assert found.fidelity_to == (2 if found.config_id < 2 else 1)
    assert counts[2] == 0
    assert all(80 < counts[i] < 160 for i in (0, 1, 3, 4, 5))


@pytest.mark.parametrize("workers", [1, 3])
def test_successive_halving_keeps_a_third_at_each_rung(workers):
    trials = make_book(fresh=9)
    rule, running = SuccessiveHalving(0), []
    order = []
    for _ in range(400):
        while len(running) < workers and (choice := rule.choose(trials, ANY)) is not None:
            start(trials, choice.config_id, choice.fidelity_to)
            running.append(choice)
        if not running:
            break
        done = running.pop(0)
        trial = trials.trial(done.config_id)
        trial.scores.extend([done.config_id / 10] * (done.fidelity_to - trial.t))
        trial.pending_to = None
        order.append((done.config_id, done.fidelity_to))

    assert [c for c, end in order if end == 3][:3] == [8, 7, 6]
    assert [c for c, end in order if end == 9][:1] == [8]
    assert [end for _, end in order][:9] == [1] * 9

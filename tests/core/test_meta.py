"""Meta-data in, prior out: records are checked, files are safe, what is learned helps."""

import json
import math

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor

from qtt_core.beliefs import WarmBeliefs, adapted
from qtt_core.encoding import build_encoder
from qtt_core.errors import SpecError
from qtt_core.forest import Forest, fit_forest
from qtt_core.metadataset import MetaDataset
from qtt_core.metatrain import metatrain
from qtt_core.optimizer import QuickTune
from qtt_core.prior import MetaPrior
from qtt_core.steps import BudgetView, Observation, Options, Outcome
from qtt_core.surrogate import GRID, squash_of
from qtt_core.testing.worlds import World

WORLD = World(seed=0, max_fidelity=12)
TASKS, RUNS = 20, 60


def records(tasks, runs=RUNS):
    rng = np.random.default_rng(0)
    configs, curves, seconds, names, features = [], [], [], [], {}
    for index in tasks:
        task = WORLD.task(index)
        features[task.name] = task.metafeatures
        for config in WORLD.space.sample(runs, rng):
            curve = task.curve(config)
            stop = WORLD.max_fidelity if curve.diverges_at is None else curve.diverges_at - 1
            tail = [] if curve.diverges_at is None else [math.nan]
            configs.append(config)
            curves.append([*curve.scores[:stop], *tail])
            seconds.append(list(curve.seconds[: stop + len(tail)]))
            names.append(task.name)
    return configs, curves, seconds, names, features


@pytest.fixture(scope="module")
def meta():
    return MetaDataset.from_records(WORLD.space, *records(range(TASKS)))


@pytest.fixture(scope="module")
def prior(meta):
    return metatrain(meta, 0)


# --- records -------------------------------------------------------------------------------------


def test_records_keep_how_runs_ended(meta):
    assert meta.curves.shape == (TASKS * RUNS, 12)
    assert set(meta.states) == {"ok", "diverged"}
    assert meta.tasks == tuple(f"world0/data{i}" for i in range(TASKS))


def test_a_short_curve_is_cut_off_and_not_converged():
    config = WORLD.space.default()
    meta = MetaDataset.from_records(WORLD.space, [config], [[0.1, 0.2]], [[1.0, 1.0]], ["d"])
    assert meta.states == ("censored",)
    assert np.isnan(meta.curves[0, 2:]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r[0].__setitem__(3, {"model": "no_such_net"}), "configs[3]"),
        (lambda r: r[1].__setitem__(2, [0.1] * 13), "at most T = 12"),
        (lambda r: r[1].__setitem__(2, [0.1, math.nan, 0.3]), "NaN may stand at the end only"),
        (lambda r: r[1].__setitem__(2, [50.0]), "scale scores to [0, 1]"),
        (lambda r: r[2].__setitem__(2, [-1.0]), "numbers >= 0"),
        (lambda r: r[3].pop(), "one entry for each"),
    ],
)
def test_a_bad_record_is_named(change, words):
    made = records([0], runs=5)
    change(made)
    with pytest.raises(SpecError) as caught:
        MetaDataset.from_records(WORLD.space, *made)
    assert words in str(caught.value)


def test_meta_data_survive_a_file(meta, tmp_path):
    meta.save(tmp_path)
    again = MetaDataset.load(tmp_path)
    assert again.sha == meta.sha
    assert again.configs == meta.configs
    assert np.array_equal(again.curves, meta.curves, equal_nan=True)


def test_damaged_meta_data_are_refused(meta, tmp_path):
    meta.save(tmp_path)
    content = bytearray((tmp_path / "curves.npz").read_bytes())
    content[100] ^= 1
    (tmp_path / "curves.npz").write_bytes(content)
    with pytest.raises(SpecError, match="digest"):
        MetaDataset.load(tmp_path)


# --- trees ---------------------------------------------------------------------------------------


def test_flat_trees_predict_what_scikit_learn_predicts():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 5)), rng.normal(size=(200, 2))
    theirs = ExtraTreesRegressor(
        n_estimators=7, min_samples_leaf=3, max_features=0.6, bootstrap=True, random_state=4
    ).fit(x.astype(np.float32), y)
    ours = fit_forest(x, y, seed=4, trees=7)
    assert ours.predict(x) == pytest.approx(theirs.predict(x.astype(np.float32)), abs=1e-5)
    again = Forest.from_arrays(ours.arrays())
    assert np.array_equal(again.predict(x), ours.predict(x))


def test_trees_that_run_in_circles_are_refused():
    arrays = fit_forest(np.arange(20.0)[:, None], np.arange(20.0), seed=0, trees=1).arrays()
    arrays["left"] = np.zeros_like(arrays["left"])
    with pytest.raises(ValueError, match="outside"):
        Forest.from_arrays(arrays)


# --- the prior -----------------------------------------------------------------------------------


def test_a_prior_ranks_configurations_of_a_data_set_it_never_saw(prior):
    task = WORLD.task(100)
    configs = WORLD.space.sample(200, np.random.default_rng(5))
    truth = np.array([task.curve(c).truth[-1] for c in configs])
    predicted = prior.trend(configs, task.metafeatures)[:, -1]
    assert ranks(predicted, truth) > 0.5
    seconds = np.log([task.seconds(c) for c in configs])
    assert ranks(prior.log_seconds(configs, task.metafeatures), seconds) > 0.9
    failed = np.array([task.curve(c).diverges_at is not None for c in configs])
    finish = prior.finish(configs, task.metafeatures)
    assert finish[~failed].mean() > finish[failed].mean() + 0.1


def test_what_the_card_says_of_unseen_data_holds_on_unseen_data(prior):
    stated = prior.card["held_out"]["spearman_final_score"]
    found = []
    for index in range(200, 210):
        task = WORLD.task(index)
        configs = WORLD.space.sample(60, np.random.default_rng(index))
        truth = np.array([task.curve(c).truth[-1] for c in configs])
        found.append(ranks(prior.trend(configs, task.metafeatures)[:, -1], truth))
    assert np.mean(found) == pytest.approx(stated, abs=0.2)


def test_a_prior_survives_a_file(prior, tmp_path):
    prior.save(tmp_path)
    again = MetaPrior.load(tmp_path)
    configs = WORLD.space.sample(20, np.random.default_rng(5))
    features = WORLD.task(100).metafeatures
    assert np.array_equal(again.trend(configs, features), prior.trend(configs, features))
    assert np.array_equal(
        again.log_seconds(configs, features), prior.log_seconds(configs, features)
    )
    assert again.parameters.noise == prior.parameters.noise
    assert again.card == json.loads(json.dumps(prior.card))


@pytest.mark.parametrize("name", ["prior.npz", "card.json"])
def test_a_damaged_prior_is_refused(prior, tmp_path, name):
    prior.save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    with pytest.raises(SpecError, match="is no prior"):
        MetaPrior.load(tmp_path)


def test_missing_metafeatures_are_no_zeros(prior):
    configs = WORLD.space.sample(5, np.random.default_rng(5))
    some = {"n_train": 1000.0}
    assert np.isfinite(prior.trend(configs, some)).all()
    assert np.isfinite(prior.trend(configs, {})).all()
    zeros = dict.fromkeys(prior.descriptors, 0.0)
    assert not np.array_equal(prior.trend(configs, {}), prior.trend(configs, zeros))


def test_meta_training_is_repeatable(meta):
    few = meta.of_tasks(meta.tasks[:5])
    prior, again = metatrain(few, 0), metatrain(few, 0)
    configs = WORLD.space.sample(20, np.random.default_rng(5))
    features = WORLD.task(100).metafeatures
    assert np.array_equal(again.trend(configs, features), prior.trend(configs, features))
    assert np.array_equal(again.parameters.groups, prior.parameters.groups)


def test_one_data_set_is_not_enough():
    meta = MetaDataset.from_records(WORLD.space, *records([0], runs=6))
    with pytest.raises(SpecError, match="at least two"):
        metatrain(meta, 0)


def test_end_points_without_curves_suffice(meta):
    curves = np.full_like(meta.curves, np.nan)
    curves[:, -1] = meta.curves[:, -1]
    ends = MetaDataset(
        space=meta.space, configs=meta.configs, curves=curves, seconds=meta.seconds,
        states=meta.states, datasets=meta.datasets, metafeatures=meta.metafeatures,
    )  # fmt: skip
    prior = metatrain(ends, 0)
    assert "shape" not in prior.forests
    trend = prior.trend(meta.configs[:5], WORLD.task(100).metafeatures)
    assert trend.shape == (5, len(GRID))
    assert np.all(np.diff(trend, axis=1) > 0)


def test_parameters_move_to_another_encoder_by_column_name(prior):
    other = build_encoder(WORLD.space, None, {"n_train": 10.0, "other": 1.0})
    moved = adapted(prior.parameters, prior.columns, other, 0)
    at, here = prior.columns.index("lr"), other.columns.index("lr")
    assert moved.scales[here] == prior.parameters.scales[at]
    assert moved.noise == prior.parameters.noise
    assert len(moved.scales) == len(moved.hidden) == len(other.columns)


# --- in a search -----------------------------------------------------------------------------


def search(prior, seed, seconds):
    task = WORLD.task(300 + seed)
    optimizer = QuickTune(
        WORLD.space, seed=seed, metafeatures=task.metafeatures, prior=prior,
        options=Options(pool_size=64),
    )  # fmt: skip
    spent, proposals = 0.0, []
    while spent < seconds:
        budget = BudgetView(total_seconds=seconds, spent_seconds=spent)
        asked = optimizer.ask(1, budget)
        if not asked:
            break
        proposals += asked
        curve, start, stop = (
            task.curve(asked[0].config),
            asked[0].fidelity_from,
            asked[0].fidelity_to,
        )
        failed = curve.diverges_at is not None and curve.diverges_at <= stop
        end = (curve.diverges_at or 1) - 1 if failed else stop
        optimizer.tell(
            Observation(
                config_id=asked[0].config_id, fidelity=end + 1 if failed else stop,
                outcome=Outcome.DIVERGED if failed else Outcome.OK,
                scores=curve.scores[start:end], seconds=curve.seconds[start:end],
            )
        )  # fmt: skip
        spent += sum(curve.seconds[start:end]) + failed * task.seconds(asked[0].config)
    return optimizer, proposals, task


def test_a_prior_finds_better_configurations_early(prior):
    gains = []
    for seed in range(6):
        task = WORLD.task(300 + seed)
        typical = np.median(
            [task.seconds(c) for c in WORLD.space.sample(50, np.random.default_rng(1))]
        )
        reached = []
        for start in (prior, None):
            optimizer, _, _ = search(start, seed, 12 * typical)
            found = optimizer.recommend()
            config = optimizer.trials.trial(found.config_id).config
            reached.append(task.curve(config).truth[found.fidelity - 1])
        gains.append(reached[0] - reached[1])
    assert np.mean(gains) > 0.01


def test_a_warm_search_is_replayed_exactly(prior):
    optimizer, _, task = search(prior, 1, 2000.0)
    arguments = {
        "seed": 1, "metafeatures": task.metafeatures, "prior": prior,
        "options": Options(pool_size=64),
    }  # fmt: skip
    events = optimizer._events
    again = QuickTune.replay(events, WORLD.space, **arguments)
    assert again.ask(3) == QuickTune.replay(events, WORLD.space, **arguments).ask(3)
    assert again.recommend() == optimizer.recommend()


def test_meta_learning_can_be_switched_off(prior):
    off = QuickTune(WORLD.space, seed=0, prior=prior, options=Options(meta_learning=False))
    assert not isinstance(off.evidence.beliefs, WarmBeliefs)


def test_the_squash_knows_chance_and_resolution():
    squash = squash_of({"num_classes": 20.0, "n_val": 160.0})
    assert squash.chance == 0.05
    assert squash.highest == 1 - 1 / 320


def ranks(a, b):
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])

"""A shipped prior speaks of hubs, spaces and data sets that it was not made for."""

import numpy as np
import pytest
from ConfigSpace import Categorical, ConfigurationSpace, Float

from qtt_core.catalogue import PriorRef, choose
from qtt_core.errors import OptimizerError, SpecError
from qtt_core.hub import Hub, load_hub
from qtt_core.optimizer import QuickTune, build
from qtt_core.shipped import OTHER_MACHINE_SD, load_prior, shipped
from qtt_core.space import SearchSpace, build_space
from qtt_core.steps import (
    BudgetView,
    Observation,
    OptimizerSetup,
    Options,
    Outcome,
    event_from_json,
)

MICRO = {"n_train": 478.0, "n_val": 160.0, "num_classes": 20.0}
HUB = load_hub("tiny")


@pytest.fixture(scope="module")
def prior():
    return shipped("micro")


def own_space():
    space = ConfigurationSpace()
    space.add(
        Categorical("model", [card.name for card in HUB.cards]),
        Float("lr", (1e-6, 1e2), log=True),
        Float("depth_factor", (0.0, 1.0)),
    )
    return SearchSpace.from_configspace(space, max_fidelity=6, step=1)


def curve(config, epoch):
    distance = abs(np.log10(config["lr"]) + 3) / 6
    return float(np.clip(0.9 - distance - 0.5 / epoch, 0.01, 0.99))


def search(optimizer, results):
    """Decisions of a search with made-up results."""
    asked = []
    for _ in range(results):
        (proposal,) = optimizer.ask(1, BudgetView(total_steps=60, spent_steps=len(asked)))
        asked.append((proposal.config_id, proposal.fidelity_from, proposal.fidelity_to))
        optimizer.opened(proposal)
        epochs = range(proposal.fidelity_from + 1, proposal.fidelity_to + 1)
        observation = Observation(
            config_id=proposal.config_id, fidelity=proposal.fidelity_to, outcome=Outcome.OK,
            scores=tuple(curve(proposal.config, epoch) for epoch in epochs),
            seconds=tuple(1.0 for _ in epochs),
        )  # fmt: skip
        optimizer.tell(observation)
    return asked


def test_a_hub_and_a_space_that_share_little_are_searched_and_replayed(prior):
    arguments = {
        "seed": 3, "hub": HUB, "metafeatures": {**MICRO, "n_train": 9000.0}, "prior": prior,
        "options": Options(pool_size=32),
    }  # fmt: skip
    live = QuickTune(own_space(), **arguments)
    asked = search(live, 12)
    assert len({config_id for config_id, _, _ in asked}) > 3

    events = [event_from_json(event) for event in live.state()["events"]]
    again = QuickTune.replay(events, own_space(), **arguments)

    budget = BudgetView(total_steps=60, spent_steps=12)
    assert again.ask(2, budget) == live.ask(2, budget)
    assert again.recommend() == live.recommend()


def test_a_space_that_shares_nothing_is_searched_cold(prior):
    cs = ConfigurationSpace()
    cs.add(Float("width", (0.0, 1.0)))
    space = SearchSpace.from_configspace(cs, max_fidelity=6, step=1)
    warm, cold = QuickTune(space, seed=0, prior=prior), QuickTune(space, seed=0)
    assert not warm.evidence.beliefs.informed
    assert warm.ask(3) == cold.ask(3)


def test_models_it_has_never_met_are_told_apart_by_their_cards(prior):
    large = HUB.cards[0]
    cards = [
        {**large.to_json(), "name": name, "params": params, "gmacs": gmacs}
        for name, params, gmacs in (("tiny_one", 10**6, 0.05), ("huge_one", 3 * 10**8, 300.0))
    ]
    hub = Hub.from_json({"name": "mine", "cards": cards})
    space = build_space("quicktune-v1", hub, max_fidelity=50)
    joined = prior.joined(space, hub)
    assert [card.name for card in joined.guests] == ["tiny_one", "huge_one"]
    config = space.default()
    small, large = joined.log_seconds(
        [{**config, "model": name} for name in ("tiny_one", "huge_one")], MICRO
    )
    assert large > small + 0.5


def test_its_own_models_and_space_are_as_before(prior):
    hub = load_hub("timm24")
    space = build_space("quicktune-v1", hub, max_fidelity=50)
    configs = space.sample(20, np.random.default_rng(0))
    joined = prior.joined(space, hub)
    assert np.array_equal(joined.rows(configs, MICRO), prior.rows(configs, MICRO))


def test_what_a_space_lacks_has_the_default_that_the_trainer_uses(prior):
    config = {"model": HUB.cards[0].name, "lr": 1e-3, "depth_factor": 0.5}
    joined = prior.joined(own_space(), HUB)
    whole = {**prior.space.default(), **config}
    assert np.array_equal(joined.rows([config], MICRO), joined.rows([whole], MICRO))
    assert not np.array_equal(joined.rows([config], MICRO), prior.rows([config], MICRO))


def test_numbers_beyond_all_that_it_has_seen_count_as_the_last_ones(prior):
    space = own_space()
    joined = prior.joined(space, HUB)
    config = dict(space.default())
    rows = joined.rows([{**config, "lr": lr} for lr in (1e-2, 1.0, 100.0)], MICRO)
    lr = joined.columns.index("lr")
    assert np.ptp(rows[:, lr]) == 0
    assert np.isfinite(joined.trend([{**config, "lr": 100.0}], MICRO)).all()


@pytest.mark.parametrize("images", [120.0, 4000.0, 60_000.0])
def test_seconds_follow_the_images_of_the_data_set(prior, images):
    config = [dict(prior.space.default())]
    few = prior.log_seconds(config, MICRO)[0]
    many = prior.log_seconds(config, {**MICRO, "n_train": images})[0]
    assert many - few == pytest.approx(np.log(images / 478), abs=0.05)


# --- as an optimizer worker loads it -------------------------------------------------------------


def setup_of(ref, **changes):
    return OptimizerSetup(
        **{
            "algorithm": "QuickTune", "space": "native", "hub": load_hub("timm24").to_json(),
            "max_fidelity": 10, "step": 1, "seed": 1, "metafeatures": MICRO, "prior": str(ref),
            "options": Options(pool_size=24), **changes,
        }
    )  # fmt: skip


def chosen(name="mini"):
    return choose(name, algorithm="QuickTune", hub=load_hub("timm24"))


def test_a_setup_brings_its_prior_and_another_machine_moves_its_seconds():
    optimizer = build(setup_of(chosen()))
    beliefs = optimizer.evidence.beliefs
    assert beliefs.informed
    assert beliefs.prior.name == "mtlbm/micro"
    assert beliefs.seconds_sd[0] == OTHER_MACHINE_SD
    assert not build(setup_of("")).evidence.beliefs.informed
    assert not build(setup_of(chosen(), algorithm="Random")).evidence.beliefs.informed


def test_the_portfolio_takes_the_order_of_its_prior():
    warm, cold = (
        build(setup_of(chosen(), algorithm="Portfolio")),
        build(setup_of("", algorithm="Portfolio")),
    )
    asked = [optimizer.ask(4) for optimizer in (warm, cold)]
    assert asked[0][-1].why.rule == "portfolio: order by the prior's final scores"
    assert [p.config for p in asked[0]] != [p.config for p in asked[1]]


def test_a_prior_that_was_replaced_or_damaged_is_an_error_that_names_it(tmp_path, prior):
    prior.save(tmp_path / "birds")
    with pytest.raises(OptimizerError, match="birds was replaced"):
        load_prior(PriorRef(name="birds", sha="0" * 64, own=True), tmp_path)
    (tmp_path / "birds" / "prior.npz").write_bytes(b"nothing")
    with pytest.raises(SpecError, match=r"spec.search.portfolio.*birds.*digest"):
        load_prior(PriorRef(name="birds", sha="0" * 64, own=True), tmp_path)

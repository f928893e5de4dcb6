"""The priors that come with the project load, name their source and forecast runs."""

import csv

import numpy as np
import pytest
from scipy.stats import spearmanr

from qtt_core.catalogue import SHIPPED, shipped_names
from qtt_core.errors import SpecError
from qtt_core.hub import load_hub
from qtt_core.optimizer import QuickTune
from qtt_core.shipped import predict_runs, shipped
from qtt_core.space import build_space

MICRO = {"n_train": 478.0, "n_val": 160.0, "num_classes": 20.0}


SOURCES = {"micro": "Pineda Arango", "tiny": "benchmarks/curves"}


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_prior_is_small_and_names_its_source(name):
    prior = shipped(f"mtlbm/{name}")
    assert SOURCES[name] in prior.card["source"]
    assert len(prior.card["tasks"]) == 20
    assert sum(len(file.read_bytes()) for file in (SHIPPED / name).iterdir()) < 3e6


def test_the_prior_of_the_tiny_hub_has_seen_no_digits():
    """The demo's data set would be a rehearsed one. What curves of every model teach is there."""
    prior, hub = shipped("tiny"), load_hub("tiny")
    assert not [task for task in prior.card["tasks"] if "digit" in task]
    space = build_space("native", hub, max_fidelity=12)
    base = dict(space.default())
    known = {"n_train": 250.0, "n_val": 60.0, "num_classes": 10.0}
    rising = prior.trend([{**base, "model": card.name} for card in hub.cards], known)
    assert np.all(rising[:, -1] > rising[:, 0])


def test_an_unknown_prior_is_an_error_that_names_the_known_ones():
    with pytest.raises(SpecError, match="micro"):
        shipped("maxi")


def test_what_real_runs_teach_is_in_the_shipped_prior():
    """Facts of the published runs: large models cost more, a tiny learning rate reaches less."""
    space = build_space("quicktune-v1", load_hub("timm24"), max_fidelity=50)
    prior, base = shipped("micro"), dict(space.default())
    small, large = ({**base, "model": name} for name in ("mobilevit_xxs", "volo_d5_448"))
    slow, quick = prior.log_seconds([large, small], MICRO)
    assert slow - quick > np.log(8)
    ends = prior.trend([{**base, "lr": lr} for lr in (1e-5, 1e-3)], MICRO)[:, -1]
    assert ends[1] > ends[0] + 0.3


def test_every_row_of_a_table_gets_a_forecast(micro_runs):
    found = predict_runs(micro_runs)
    with micro_runs.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [one.run for one in found] == [row["run"] for row in rows]
    assert all(0 <= one.score <= 1 and 0 < one.finish < 1 and one.seconds > 0 for one in found)
    done = [i for i, row in enumerate(rows) if row["epochs_done"] == "50" and row["top1"]]
    told = [float(rows[i]["top1"]) for i in done]
    assert spearmanr([found[i].score for i in done], told).statistic > 0.7


def test_the_first_choice_among_given_candidates_follows_the_prior():
    """Nothing was told and no default is asked first: the process conditions on nothing."""
    hub = load_hub("timm24")
    space = build_space("quicktune-v1", hub, max_fidelity=50)
    base = {**space.default(), "model": "mobilevit_xs"}
    candidates = [space.canonical({**base, "lr": lr}) for lr in (1e-5, 1e-3)]
    optimizer = QuickTune(
        space, seed=0, hub=hub, metafeatures=MICRO, prior=shipped("micro"), candidates=candidates
    )
    assert optimizer.ask(1)[0].config["lr"] == 1e-3

"""Optimizers of others on a cluster: one that the install allows, and names that it refuses."""

from __future__ import annotations

import json

import pytest
from conftest import Simulate
from ledger_reader import of_kind
from real_cluster import Kube

pytestmark = pytest.mark.testbed


def test_a_run_is_searched_by_optuna_where_the_install_allows_it(
    restricted: Kube, simulate: Simulate
) -> None:
    external = {"algorithm": "External", "name": "optuna-tpe", "seed": 0}
    run = simulate(restricted, optimizer=external, parallelism=2, budget={"maxSteps": 8})

    run.complete()

    assert run.faults(8) == []
    opened = [event for event in of_kind(run.events(), "open") if event["c"].isdigit()]
    assert "suggested by Optuna" in {json.loads(event["why"])["rule"] for event in opened}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optuna-gp", "is installed, but not allowed here; allowed: optuna-tpe"),
        ("nobodys", "known here: optuna-gp, optuna-tpe"),
    ],
)
def test_a_name_that_is_not_to_be_had_is_refused_with_those_that_are(
    restricted: Kube, simulate: Simulate, name: str, words: str
) -> None:
    run = simulate(restricted, optimizer={"algorithm": "External", "name": name})

    accepted = run.until_condition("Accepted", "False", "Invalid")

    assert words in accepted["message"]
    assert run.jobs() == []

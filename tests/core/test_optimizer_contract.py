"""Every optimizer behind the interface keeps the contract that ships for others."""

import math
import re
import sys
import types
from pathlib import Path
from statistics import median

import pytest

from qtt_core import optuna_samplers
from qtt_core.optimizer import ALGORITHMS
from qtt_core.testing.optimizer_contract import (
    OptimizerContract,
    any_space,
    next_proposals,
    result,
)


def contract_of(builder):
    """A test class; pytest finds it by the name that it is given below."""
    return type("Contract", (OptimizerContract,), {"make": staticmethod(builder)})


TestQuickTune = contract_of(ALGORITHMS["QuickTune"])
TestQuickTunePaper = contract_of(ALGORITHMS["QuickTunePaper"])
TestRandom = contract_of(ALGORITHMS["Random"])
TestFreezeThawRandom = contract_of(ALGORITHMS["FreezeThawRandom"])
TestSuccessiveHalving = contract_of(ALGORITHMS["SuccessiveHalving"])
TestASHA = contract_of(ALGORITHMS["ASHA"])
TestPortfolio = contract_of(ALGORITHMS["Portfolio"])
TestOptunaTPE = contract_of(optuna_samplers.tpe)


def example_of_the_page():
    """The module that docs/optimizers.md shows, in 30 lines."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "optimizers.md").read_text()
    (code,) = [text for text in re.findall(r"```python\n(.*?)```", page, re.S) if "choose" in text]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 33
    module = types.ModuleType("epsilon_greedy")
    sys.modules[module.__name__] = module  # where its dataclass looks
    exec(compile(code, "docs/optimizers.md", "exec"), vars(module))
    return module.build


TestEpsilonGreedyOfThePage = contract_of(example_of_the_page())


def test_no_algorithm_is_without_a_contract():
    tested = {name.removeprefix("Test") for name in globals() if name.startswith("Test")}
    assert tested == {*ALGORITHMS, "OptunaTPE", "EpsilonGreedyOfThePage"}


@pytest.mark.parametrize(
    ("build", "count", "nearer"),
    [(optuna_samplers.tpe, 30, 0.7), (optuna_samplers.gp, 16, 0.25)],
    ids=["tpe", "gp"],
)
def test_a_sampler_of_optuna_goes_where_scores_are_high(build, count, nearer):
    """High where rate is near 0.01; a random draw is 1 decade away in the median."""
    optimizer, distances = build(any_space(), seed=0), []
    while len(distances) < count:
        (proposal,) = next_proposals(optimizer)
        distance = abs(math.log10(float(proposal.config["rate"])) + 2)
        if proposal.fidelity_from == 0:
            assert proposal.why.rule == "suggested by Optuna"
            distances.append(distance)
        optimizer.feed(result(proposal, 1 - distance / 4))

    assert median(distances[: count // 3]) > 0.7
    assert median(distances[-count // 3 :]) < nearer

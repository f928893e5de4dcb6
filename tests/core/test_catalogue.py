"""What a manifest's `search.portfolio` means, and that a run keeps to what it began with."""

import json
import shutil

import pytest

from qtt_core.catalogue import SHIPPED, PriorRef, choose, kept
from qtt_core.errors import NotFoundError, SpecError
from qtt_core.hub import load_hub

TIMM, TINY = load_hub("timm24"), load_hub("tiny")


@pytest.fixture
def own(tmp_path):
    shutil.copytree(SHIPPED / "micro", tmp_path / "priors" / "birds")
    return tmp_path / "priors"


@pytest.mark.parametrize(
    ("portfolio", "name", "words"),
    [
        ("micro", "mtlbm/micro", "prior mtlbm/micro"),
        ("mtlbm/micro", "mtlbm/micro", "prior mtlbm/micro"),
        ("mini", "mtlbm/micro", "in place of mtlbm/mini"),
        ("extended", "mtlbm/micro", "in place of mtlbm/extended"),
        ("Auto", "mtlbm/micro", "knows 24 of 24 models"),
        ("birds", "own/birds", "of the folder"),
    ],
)
def test_a_portfolio_is_a_prior_and_one_line_says_which(own, portfolio, name, words):
    found = choose(portfolio, algorithm="QuickTune", hub=TIMM, own=own)

    assert str(found).rpartition("@")[0] == name
    assert words in found.line
    assert "\n" not in found.line


@pytest.mark.parametrize(
    ("portfolio", "algorithm"), [("None", "QuickTune"), ("micro", "Random"), ("micro", "External")]
)
def test_a_cold_start_and_rules_that_do_not_learn_load_no_prior(portfolio, algorithm):
    assert choose(portfolio, algorithm=algorithm, hub=TIMM) is None


def test_auto_takes_no_prior_that_knows_less_than_half_of_the_hub(monkeypatch):
    monkeypatch.setattr("qtt_core.catalogue.shipped_names", lambda: ("micro",))
    assert choose("Auto", algorithm="QuickTune", hub=TINY) is None


@pytest.mark.parametrize("name", ["fish", "../priors/birds", "/etc", ".", "mtlbm/birds", "out"])
def test_an_unknown_name_or_a_way_out_of_the_folder_lists_the_known_ones(own, tmp_path, name):
    shutil.copytree(own / "birds", tmp_path / "outside")
    (own / "out").symlink_to(tmp_path / "outside")

    with pytest.raises(NotFoundError) as error:
        choose(name, algorithm="QuickTune", hub=TIMM, own=own)

    text = str(error.value)
    for word in ("spec.search.portfolio", repr(name), "birds", "micro", "extended", "metatrain"):
        assert word in text


def test_a_run_keeps_the_prior_that_it_recorded(own):
    recorded = str(choose("birds", algorithm="QuickTune", hub=TIMM, own=own))
    assert PriorRef.parse(recorded) == PriorRef(name="birds", own=True, sha=recorded[-64:])
    assert kept(recorded, own)[1]

    card = json.loads((own / "birds" / "card.json").read_text())
    (own / "birds" / "card.json").write_text(json.dumps(card | {"name": "another"}))
    found, same = kept(recorded, own)
    assert found.own
    assert not same

    shutil.rmtree(own / "birds")
    with pytest.raises(NotFoundError, match="put it back"):
        kept(recorded, own)


def test_a_run_that_began_cold_stays_cold():
    assert kept("") == (None, True)


def test_a_card_that_is_no_json_is_said_to_be_damaged(monkeypatch, tmp_path):
    (tmp_path / "micro").mkdir()
    (tmp_path / "micro" / "card.json").write_text("{")
    monkeypatch.setattr("qtt_core.catalogue.SHIPPED", tmp_path)
    with pytest.raises(SpecError, match=r"micro.*cannot be read"):
        choose("Auto", algorithm="QuickTune", hub=TIMM)

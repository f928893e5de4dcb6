"""`qtt weights fetch` from the command line, against a port where nobody listens."""

from __future__ import annotations

import json

import pytest

from qtt_operator import weights_verb
from qtt_operator.cli import main

CLOSED = "http://127.0.0.1:1"


def test_an_unreachable_hub_exits_69_and_names_host_models_and_remedy(tmp_path, capsys):
    words = ["weights", "fetch", "--hub", "timm24", "--model", "dla46x_c", "--to", str(tmp_path)]

    code = main([*words, "--endpoint", CLOSED, "-o", "json"])

    said = capsys.readouterr()
    assert code == 69
    assert "dla46x_c (1 of 1): 127.0.0.1:1 cannot be reached" in said.err
    assert "open egress" in said.err
    assert json.loads(said.out)["models"][0]["state"] == "failed"


def test_a_hub_whose_weights_are_shipped_needs_nothing(tmp_path, capsys):
    code = main(["weights", "fetch", "--hub", "tiny", "--to", str(tmp_path), "--endpoint", CLOSED])

    assert code == 0
    assert "ship with the trainer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--hub", "timm25"], "--hub: 'timm25'"),
        (["--hub", "timm24", "--model", "edgenext"], "edgenext"),
        (["--hub", "timm24", "--endpoint", CLOSED, "--token-file", "/nowhere"], "token file"),
    ],
    ids=["hub", "model", "token"],
)
def test_a_users_mistake_exits_64_and_is_named(tmp_path, capsys, words, named):
    code = main(["weights", "fetch", "--to", str(tmp_path), *words])

    assert code == 64
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "child", "code"),
    [
        ("ok", 0, 0), ("weights_unavailable", 64, 64), ("weights_unavailable", 75, 69),
        ("weights_corrupt", 75, 65), ("disk_full", 75, 74), ("internal", 70, 70),
    ],
)  # fmt: skip
def test_every_end_of_the_child_has_its_code(state, child, code):
    assert weights_verb._code({"state": state}, child) == code

"""The campaign of random faults: some of it here, all of it by `make campaign`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from qtt_operator.store import EmbeddedStore
from tests.cluster.campaign import again, trial
from tests.cluster.shards import lines, tally, write


def test_a_shard_is_read_back_and_counted(tmp_path: Path) -> None:
    ok = {"seed": 0, "cluster": "in memory", "faults": {"watch_cut": 2}, "broken": []}
    bad = {"seed": 1, "cluster": "in memory", "faults": {"watch_cut": 1}, "broken": ["x"]}
    write([ok], tmp_path, "memory-000000")
    write([bad], tmp_path, "memory-000001")

    assert list(lines(tmp_path)) == [ok, bad]
    assert "| runs in which something broke | 1 |" in tally(tmp_path)
    assert "| watch_cut | 3 |" in tally(tmp_path)


def test_what_broke_is_run_again_and_what_was_found_stays_on_record(tmp_path: Path) -> None:
    ok: dict[str, Any] = {"seed": 3, "cluster": "in memory", "faults": {}, "broken": []}
    bad = {**ok, "seed": 4, "broken": ["not complete"]}
    write([ok, bad], tmp_path, "memory-000003")
    once = lambda seed: {**ok, "seed": seed, "broken": ["another fault"]}  # noqa: E731
    twice = lambda seed: {**ok, "seed": seed}  # noqa: E731

    assert [line["broken"] for line in again(tmp_path, once)] == [["another fault"]]
    (new,) = again(tmp_path, twice)

    assert new == {**ok, "seed": 4, "before": ["not complete", "another fault"]}
    assert list(lines(tmp_path)) == [ok, new]
    assert again(tmp_path, twice) == []
    assert "| runs in which something broke | 0 |" in tally(tmp_path)
    assert "seeds 4." in tally(tmp_path)


@pytest.mark.slow
def test_random_faults_in_whole_runs_break_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = secrets.randbelow(10**6)
    with capsys.disabled():
        print(f"\ncampaign: seeds {first} to {first + 19}")  # noqa: T201
    with EmbeddedStore(tmp_path) as store:
        found = [trial(seed, store) for seed in range(first, first + 20)]

    assert [line for line in found if line["broken"]] == []
    assert sum(sum(line["faults"].values()) for line in found) >= 40

"""The same decisions in this process and through Jobs; `test_crash_points` adds random deaths."""

from __future__ import annotations

import pytest
from conftest import Simulate
from golden import GOLDEN, sequence_in_process, sequence_of
from real_cluster import Kube

pytestmark = pytest.mark.testbed


def test_a_run_through_jobs_decides_as_one_in_this_process(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, **GOLDEN)

    run.complete()

    told = sequence_of(run)
    assert len(told) == 8
    assert told == sequence_in_process(run.get()["spec"])
    assert run.faults(8) == []

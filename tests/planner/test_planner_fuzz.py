"""Random interleavings of everything that may go wrong; a seed says which one.

`QTT_FUZZ_SEED=N` begins elsewhere. One of them again: `play(SEED)` of `tests/planner/fuzz_story`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import Counter

import pytest

from tests.planner.fuzz_story import play

BATCH = 250
FIRST = int(os.environ.get("QTT_FUZZ_SEED", "0"))
"""So that `make test` is red again where it was red."""


def broken(first: int, count: int) -> tuple[dict[int, list[str]], Counter[str]]:
    """What broke, by seed, and what was done to the runs."""

    async def main() -> tuple[dict[int, list[str]], Counter[str]]:
        found, facts = {}, Counter[str]()
        for seed in range(first, first + count):
            story = await play(seed)
            facts += story.facts
            if story.world.broken:
                found[seed] = story.world.broken
        return found, facts

    return asyncio.run(main())


@pytest.mark.parametrize("batch", range(8))
def test_no_interleaving_of_faults_breaks_a_run(batch: int) -> None:
    """No key told or charged twice, no budget overshot, nothing for ever, and every run ends."""
    found, facts = broken(FIRST + batch * BATCH, BATCH)

    assert found == {}
    assert facts["crash"] > 100
    assert facts["stale writer stopped"] > 3
    assert facts["events lost"] > 20


@pytest.mark.slow
def test_no_interleaving_out_of_a_hundred_thousand_breaks_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = FIRST or secrets.randbelow(10**9)
    with capsys.disabled():
        print(f"\nplanner fuzz: seeds {first} to {first + 99_999}")  # noqa: T201
    for batch in range(400):
        found, _ = broken(first + batch * BATCH, BATCH)
        assert found == {}

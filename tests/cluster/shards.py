"""The campaign's records: compressed JSON lines, a line a trial, and their tally."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARDS = Path(__file__).resolve().parents[1] / "campaign"
SHARD = 10
"""Trials of one file."""

HEADER = """# Campaign of random faults

`make campaign` goes on with it. *In memory*: whole TuningRuns through the operator's loop, with
real informers, queue, reconciler, planner and Redis; the API server, Job controller and kubelet
are in memory. Checked after each run, from Redis: every step told and charged once, none lost,
`maxSteps` met. Faults on a real cluster are tests: `tests/e2e/test_crash_*.py`.

"""


def name_of(shard: Path) -> str:
    """Its name as `write` takes it."""
    return shard.name.removesuffix(".jsonl.gz")


def read(shard: Path) -> list[dict[str, Any]]:
    """The trials of one file."""
    with gzip.open(shard, "rt") as file:
        return [json.loads(line) for line in file]


def lines(folder: Path = SHARDS) -> Iterator[dict[str, Any]]:
    """Every trial so far."""
    for shard in sorted(folder.glob("*.jsonl.gz")):
        yield from read(shard)


def write(found: list[dict[str, Any]], folder: Path, name: str) -> None:
    """One shard; equal trials make equal bytes."""
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in found)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def tally(folder: Path = SHARDS) -> str:
    """Faults by kind and by cluster, as a table, and the trials that were run more than once."""
    trials: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {}
    again: dict[int, int] = {}
    for line in lines(folder):
        where = line["cluster"]
        trials[where] += 1
        broken[where] += bool(line["broken"])
        counts.setdefault(where, Counter()).update(line["faults"])
        if line.get("before"):
            again[line["seed"]] = len(line["before"])
    places = sorted(trials)
    rows = ["| | " + " | ".join(places) + " |", "|---" * (len(places) + 1) + "|"]
    for name, numbers in (("runs", trials), ("runs in which something broke", broken)):
        rows.append(f"| {name} | " + " | ".join(str(numbers[p]) for p in places) + " |")
    total = {p: sum(counts[p].values()) for p in places}
    rows.append("| faults | " + " | ".join(str(total[p]) for p in places) + " |")
    for kind in sorted(set().union(*counts.values())) if counts else ():
        rows.append(f"| {kind} | " + " | ".join(str(counts[p][kind]) for p in places) + " |")
    return "\n".join(rows) + "\n" + _rerun(again)


def _rerun(again: dict[int, int]) -> str:
    """Which seeds broke at first: the same faults are drawn again, their moments are not."""
    if not again:
        return ""
    seeds = ", ".join(map(str, sorted(again)))
    return (
        "\nBroke at first, and were run again after the operator was mended; counted above is how"
        f" they went then: seeds {seeds}.\nA seed draws faults in the same order; how many fit into"
        " the run, and when each strikes, depends on the machine. What broke stands in the shards"
        " under `before`.\n"
    )

"""Our own overhead per step: what a device slot waits between two jobs, from a run's trace.

    python benchmarks/overhead.py                      # of the last `benchmarks/demo.py`
    python benchmarks/overhead.py --run .quicktune/digits

From the end of a job to the start of the next one on the same slot: message read, ledger written,
optimizer told and asked, next job opened and sent, process forked. The trainer's own work, from its
start to its end, is left out. Only gaps in which a next step was run count: the wait for a decision
belongs to it, the idle time after the last one does not.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import OUT, ledger_of

BOUND_SECONDS = 0.150
STEP_JOB = re.compile(r"-c(?P<c>\d+)-f(?P<to>\d+)-a\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What a slot waited before a job of `steps` steps that then ran for `work` seconds."""

    seconds: float
    steps: int
    work: float


def gaps(trace: Iterable[dict[str, Any]], steps_of: dict[tuple[str, str], int]) -> list[Gap]:
    """The gaps between consecutive step jobs of each slot, in the order of their ends."""
    slots: dict[str, int] = {}
    started: dict[str, float] = {}
    waited: dict[str, float] = {}
    free_since: dict[int, float] = {}
    found = []
    for line in trace:
        job, event = line.get("job", ""), line["event"]
        name = STEP_JOB.search(job)
        if event == "started":
            slots[job], started[job] = line["slot"], line["now"]
            since = free_since.pop(line["slot"], None)
            if name and since is not None:
                waited[job] = line["now"] - since
        elif event == "ended" and name and job in slots:
            free_since[slots[job]] = line["now"]
            if job in waited:
                steps = steps_of.get((name["c"], name["to"]), 1)
                work = line["now"] - started[job]
                found.append(Gap(seconds=waited[job], steps=steps, work=work))
    return found


def steps_by_job(events: Sequence[dict[str, Any]], step_epochs: int) -> dict[tuple[str, str], int]:
    """(configuration, target epoch) -> steps of that job, from the ledger's decisions."""
    return {
        (str(event["c"]), str(event["to"])): max(
            1, -(-(int(event["to"]) - int(event["from"])) // step_epochs)
        )
        for event in events
        if event["k"] == "open" and str(event["c"]).isdigit()
    }


def main() -> int:
    """Print the median and what it is made of; 1 past the bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--run", type=Path, default=OUT / "demo" / "state" / "digits", metavar="DIR"
    )
    folder = parser.parse_args().run
    if not (folder / "trace.jsonl").exists():
        sys.exit(f"{folder} holds no trace.jsonl; run benchmarks/demo.py first, or use --run")
    trace = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    events = ledger_of(folder.name, folder.parent)
    spec = next(event["spec"] for event in events if event["k"] == "run")
    spec = json.loads(spec) if isinstance(spec, str) else spec
    found = gaps(trace, steps_by_job(events, spec["fidelity"]["step"]))
    if not found:
        sys.exit("the trace holds no two steps in a row on one slot")
    per_job = sorted(gap.seconds for gap in found)
    per_step = statistics.median(gap.seconds / gap.steps for gap in found)
    work = sum(gap.work for gap in found)
    share = sum(per_job) / (sum(per_job) + work)
    print(f"jobs {len(found)}, steps {sum(gap.steps for gap in found)}, trainer {work:.0f} s")
    print(
        f"between two jobs: median {1000 * statistics.median(per_job):.0f} ms, "
        f"p90 {1000 * per_job[int(0.9 * (len(per_job) - 1))]:.0f} ms, "
        f"largest {1000 * per_job[-1]:.0f} ms; {100 * share:.1f} % of a slot's time"
    )
    kept = per_step <= BOUND_SECONDS
    verdict = "kept" if kept else "MISSED"
    print(f"per step: median {1000 * per_step:.0f} ms ≤ {1000 * BOUND_SECONDS:.0f} ms {verdict}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

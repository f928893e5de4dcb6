"""The ledger as Redis holds it, read without code of ours, and what must be true of every one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping

from real_cluster import Kube

Event = Mapping[str, str]


def events_of(
    system: Kube, run_uid: str, *, pod: str = "redis-0", client: str = "redis-cli"
) -> list[dict[str, str]]:
    """Every event of a run, oldest first, with its stream id under `id`; `client`: shell words."""
    words = f"{client} --json XRANGE 'qtt:{{{run_uid}}}:log' - +"
    found = json.loads(system.execute(pod, "sh", "-c", words))
    return [
        {"id": stream_id, **dict(zip(fields[::2], fields[1::2], strict=True))}
        for stream_id, fields in found
    ]


def of_kind(events: Iterable[Event], *kinds: str) -> list[Event]:
    """The events of some kinds."""
    return [event for event in events if event["k"] in kinds]


def epochs_of(events: Iterable[Event]) -> dict[str, list[int]]:
    """Every epoch that was told, by configuration, in the order of the ledger."""
    told: dict[str, list[int]] = {}
    for done in of_kind(events, "done"):
        told.setdefault(done["c"], []).extend(row[0] for row in json.loads(done["epochs"]))
    return told


def ended_attempt(event: Event) -> int:
    """The attempt that an event ended: a `retry` carries the next one."""
    return int(event.get("a", "0")) - (event["k"] == "retry")


def faults(events: list[dict[str, str]], max_steps: int) -> list[str]:
    """What broke of: nothing told twice, none lost, nothing charged twice, the budget kept.

    For runs whose step is one epoch.
    """
    found = []
    told = epochs_of(events)
    for c, epochs in told.items():
        if epochs != list(range(1, len(epochs) + 1)):
            found.append(f"configuration {c} was told epochs {epochs}")
    ends = Counter(
        (e["c"], e["to"], ended_attempt(e))
        for e in of_kind(events, "done", "fail", "retry", "cancel")
    )
    found += [f"attempt {key} ended {count} times" for key, count in ends.items() if count > 1]
    opened = Counter((e["c"], e["to"]) for e in of_kind(events, "open"))
    ended = {(e["c"], e["to"]) for e in of_kind(events, "done", "fail", "cancel")}
    steps = {key for key in opened if key[0].isdigit()}
    opened.subtract((e["c"], e["to"]) for e in of_kind(events, "cancel"))  # may be asked for again
    found += [f"step {key} was opened twice" for key in steps if opened[key] > 1]
    found += [f"step {key} was opened and never ended" for key in sorted(steps - ended)]
    total = sum(map(len, told.values()))
    if total > max_steps:
        found.append(f"{total} steps were told, {max_steps} are allowed")
    return found

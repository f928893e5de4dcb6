"""Which checkpoints stay, by policy."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qtt_core.history import ConfigHistory, Standing
from qtt_core.ledger.events import Cancel, Done, Event, Note, Open, Retry
from qtt_core.retention import (
    GARBAGE_NOTE,
    best_checkpoint,
    chosen,
    committed,
    final_garbage,
    garbage,
    recommended,
    survivors,
    swept,
    was_swept,
    without,
)
from qtt_core.steps import Best, Recommendation, nonce

POINTS = {1: (1, 3, 6), 2: (2,), 3: (1, 2)}


def history(config: int, *scores: float) -> ConfigHistory:
    return ConfigHistory(
        config_id=config, config={"model": "m"}, standing=Standing.PAUSED,
        epochs=tuple(range(1, len(scores) + 1)), scores=scores, seconds=(1.0,) * len(scores),
    )  # fmt: skip


HISTORIES = {
    1: history(1, 0.1, 0.5, 0.9, 0.8, 0.8, 0.8),
    2: history(2, 0.3, 0.4),
    3: history(3, 0.6, 0.7),
}
BEST = Recommendation(
    config_id=1,
    fidelity=4,
    score=0.8,
    n_val=9,
    best_observed=Best(config_id=1, fidelity=3, score=0.9),
)


def test_one_checkpoint_per_ended_job_that_has_one() -> None:
    def done(c: str, to: int, state: str = "ok") -> Done:
        return Done(c=c, to=to, a=0, state=state, epochs=((to, 0.5, 1.0),), dev=1.0)

    events = [done("1", 3), done("2", 1, "diverged"), done("1", 6), done("1", 1)]
    assert committed(events) == {1: (1, 3, 6)}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("None", set()),
        ("Incumbent", {(1, 3)}),
        ("TopK", {(1, 3), (3, 2)}),
        ("All", {(1, 1), (1, 3), (1, 6), (2, 2), (3, 1), (3, 2)}),
    ],
)
def test_what_a_policy_keeps(policy: str, expected: set[tuple[int, int]]) -> None:
    assert chosen(policy, 2, HISTORIES, POINTS, BEST) == expected


def test_the_nearest_checkpoint_and_the_later_of_two() -> None:
    assert best_checkpoint((1, 3, 6), HISTORIES[1]) == 3
    assert best_checkpoint((2, 4), HISTORIES[1], wanted=3) == 4
    assert best_checkpoint((), HISTORIES[1]) is None


def test_the_newest_checkpoint_stays_while_the_run_goes_on() -> None:
    kept = chosen("Incumbent", 1, HISTORIES, POINTS, BEST)

    assert garbage(kept, POINTS, 1) == ("c1/f1",)
    assert garbage(kept, POINTS, 2) == ()


# --- once the run is over ---------------------------------------------------------------------


def opened(c: str, frm: int, to: int, a: int = 0) -> Open:
    return Open(c=c, frm=frm, to=to, a=a, h=f"h{c}-{to}", res=1.0)


def done(c: str, to: int, a: int = 0, state: str = "ok") -> Done:
    return Done(c=c, to=to, a=a, state=state, epochs=((to, 0.5, 1.0),), dev=1.0)


def retry(c: str, to: int, a: int) -> Retry:
    return Retry(c=c, to=to, a=a, reason="preempted", dev=1.0)


STORY: list[Event] = [
    opened("1", 0, 1), done("1", 1),
    opened("1", 1, 3), retry("1", 3, 1), done("1", 3, 1),
    opened("1", 3, 6), Cancel(c="1", to=6, a=0, reason="Stopped"),
    opened("2", 0, 2), done("2", 2, state="diverged"),
    opened("3", 0, 1), done("3", 1),
    opened("eval-abc", 0, 1),
]  # fmt: skip


def swept_volume(paths: set[str], deleted: tuple[str, ...]) -> set[str]:
    """What is left of a volume; deleting a folder takes what lies in it."""
    return {p for p in paths if not any(p == d or p.startswith(f"{d}/") for d in deleted)}


VOLUME = {
    "dataset.json", "attempts/prepare.a0",
    "c1/f1", "c1/f3", "c1/f6.part/1", "c1/attempts/f1.a0", "c1/attempts/f3.a0",
    "c1/attempts/f3.a1", "c1/attempts/f6.a0", "c1/progress.json",
    f"c1/.f6.a0.{nonce('h1-6', 0)}", f"c1/.f3.part.a0.{nonce('h1-3', 0)}",
    "c2/f2", "c2/attempts/f2.a0", "c2/progress.json",
    "c3/f1", "c3/attempts/f1.a0", "c3/progress.json",
}  # fmt: skip
"""What the trainer writes in this story, with everything that a kill may leave."""

LOGS = {"c1/attempts/f3.a0", "c1/attempts/f6.a0"}
"""Of attempts that ended badly: among the newest twenty."""


@pytest.mark.parametrize(
    ("kept", "stays"),
    [
        (set(), LOGS),
        ({(1, 3)}, {"c1/f3", "c1/attempts/f3.a1", "c1/progress.json"} | LOGS),
        ({(3, 1)}, {"c3/f1", "c3/attempts/f1.a0", "c3/progress.json"} | LOGS),
        (
            {(1, 1), (1, 3), (3, 1)},
            {"c1/f1", "c1/f3", "c1/attempts/f1.a0", "c1/attempts/f3.a1", "c1/progress.json",
             "c3/f1", "c3/attempts/f1.a0", "c3/progress.json"} | LOGS,
        ),
    ],
    ids=["None", "the best", "another", "All"],
)  # fmt: skip
def test_a_finished_run_leaves_exactly_what_its_policy_keeps(
    kept: set[tuple[int, int]], stays: set[str]
) -> None:
    left = swept_volume(VOLUME, final_garbage(kept, STORY))

    assert left == {"dataset.json", "attempts/prepare.a0"} | stays


def test_a_configuration_that_left_nothing_worth_keeping_goes_as_a_whole() -> None:
    assert final_garbage({(1, 3)}, STORY, only={2, 3}) == ("c2", "c3")


def test_only_the_newest_failures_keep_their_logs() -> None:
    story: list[Event] = []
    for c in map(str, range(30)):
        story += [opened(c, 0, 1), Cancel(c=c, to=1, a=0, reason="bug", retire=True)]

    whole = [path for path in final_garbage((), story) if "/" not in path]

    assert whole == [f"c{c}" for c in range(10)]


def garbage_note(*paths: str) -> Note:
    return Note(what=GARBAGE_NOTE, new=json.dumps(paths))


def test_what_was_deleted_is_not_asked_for_again_until_it_may_be_back() -> None:
    events = [*STORY, garbage_note("c1/f1", "c3")]

    paths, gone = swept(events)

    assert paths == {"c1/f1", "c3"}
    assert gone == {(1, 1), (3, 1)}
    assert without(("c1/f1", "c1/f3", "c3", "c3/f1", "c30"), paths) == ("c1/f3", "c30")
    paths, gone = swept([*events, opened("3", 1, 2)])
    assert (paths, gone) == ({"c1/f1"}, {(1, 1), (3, 1)})
    assert swept([*events, opened("3", 1, 2), done("3", 1)])[1] == {(1, 1)}
    assert swept([*STORY, Note(what=GARBAGE_NOTE, old="no pod")]) == (frozenset(), frozenset())


@pytest.mark.parametrize(
    ("c", "epoch", "gone"),
    [("3", 1, True), ("3", 2, True), ("1", 1, True), ("1", 3, False), ("30", 1, False)],
)
def test_a_configuration_may_begin_anew_only_where_its_checkpoint_was_deleted(
    c: str, epoch: int, gone: bool
) -> None:
    notes = [garbage_note("c1/f1", "c3"), Note(what=GARBAGE_NOTE, old="failed")]

    assert was_swept(notes, c, epoch) is gone


def test_the_best_and_the_newest_checkpoint_outlive_every_step() -> None:
    past = replace(HISTORIES[1], saved=((1, 0.1), (3, 0.9), (5, 0.9), (6, 0.8)))

    assert survivors(past) == (3, 6)
    assert survivors(HISTORIES[1]) == ()
    assert recommended(past, BEST) == 3
    assert recommended(past, replace(BEST, fidelity=5)) == 6

"""The install's limit of open Jobs: never passed, and nobody waits for ever."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from qtt_operator.job_limit import JobLimit, Key

A, B, C = ("ns", "a"), ("ns", "b"), ("ns", "c")


def test_room_that_one_run_was_given_is_not_given_to_another_meanwhile() -> None:
    limit = JobLimit(4, 9, lambda _key: None)

    assert limit.room(A, 3) == 4
    assert limit.room(B, 3) == 1
    assert limit.room(C, 3) == 0


def test_room_that_was_not_used_goes_to_who_has_waited_longest() -> None:
    woken: list[Key] = []
    limit = JobLimit(4, 9, woken.append)
    for key in (A, B, C):
        limit.room(key, 4)

    limit.settle(A, 2)

    assert woken == [B]
    assert limit.room(B, 4) == 2


def test_no_run_gets_more_than_the_limit_of_one_and_none_is_woken_for_what_it_cannot_get() -> None:
    woken: list[Key] = []
    limit = JobLimit(9, 2, woken.append)

    assert limit.room(A, 5) == 2
    assert limit.room(B, 5) == 2
    limit.settle(A, 0)
    assert woken == []


def test_a_run_that_is_gone_holds_nothing() -> None:
    limit = JobLimit(2, 9, lambda _key: None)
    limit.room(A, 2)
    limit.forget(A)

    assert limit.room(B, 2) == 2


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(0, 4), st.integers(0, 4))),
)
def test_no_order_of_turns_passes_the_limit_or_forgets_a_run(
    most: int, turns: list[tuple[Key, int, int]]
) -> None:
    """Each turn opens as much as it may and wants; later some of what is open ends."""
    queue: deque[Key] = deque()
    limit, open_ = JobLimit(most, 9, queue.append), dict[Key, int]()
    wanted = {A: 4, B: 4, C: 4}

    def turn(key: Key) -> None:
        room = limit.room(key, wanted[key])
        open_[key] = max(open_.get(key, 0), min(room, wanted[key]))
        assert sum(open_.values()) <= most
        limit.settle(key, open_[key])

    for key, ended, _ in turns:
        turn(key)
        open_[key] = max(0, open_[key] - ended)
        queue.append(key)  # an end is a turn of its run
        while queue:
            turn(queue.popleft())
    if len({key for key, *_ in turns}) == 3:
        assert sum(open_.values()) == most or all(open_[k] == wanted[k] for k in (A, B, C))

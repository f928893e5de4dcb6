"""Events: one for each run and reason, at most one write a minute, nothing uncounted."""

from __future__ import annotations

import asyncio

from qtt_operator.cluster import Object
from qtt_operator.cluster_events import SERIES_SECONDS, Events
from tests.cluster.fake_cluster import FakeCluster

RUN: Object = {
    "apiVersion": "quicktune.dev/v1alpha1", "kind": "TuningRun",
    "metadata": {"name": "toy", "namespace": "default", "uid": "u1", "resourceVersion": "5"},
}  # fmt: skip


class Story:
    def __init__(self) -> None:
        self.cluster, self.now = FakeCluster(), 1_000.0
        self.events = Events(
            self.cluster,  # type: ignore[arg-type]
            instance="me", now=lambda: self.now, wall=lambda: 1_700_000_000.0 + self.now,
        )  # fmt: skip

    def say(self, reason: str = "Evicted", message: str = "gone", uid: str = "u1") -> None:
        about = {**RUN, "metadata": {**RUN["metadata"], "uid": uid}}
        asyncio.run(self.events.emit(about, reason=reason, message=message, warning=True))

    def flush(self) -> None:
        asyncio.run(self.events.flush())

    @property
    def stored(self) -> list[Object]:
        return [found for (plural, *_), found in self.cluster.objects.items() if plural == "events"]

    @property
    def writes(self) -> int:
        return sum(n for (_, plural), n in self.cluster.calls.items() if plural == "events")


def test_the_same_thing_said_often_is_one_event_written_once_a_minute() -> None:
    story = Story()
    for _ in range(30):
        story.say()
        story.now += 1.0
    assert story.writes == 1
    story.now += 31.0
    story.say(message="gone again")

    assert story.writes == 2
    [found] = story.stored
    assert found["count"] == 31
    assert found["message"] == "gone again"
    assert found["firstTimestamp"] < found["lastTimestamp"]


def test_what_was_held_back_is_counted_by_a_later_flush() -> None:
    story = Story()
    story.say()
    story.say()
    story.flush()
    assert story.stored[0]["count"] == 1
    story.now += 60.0
    story.flush()

    assert story.stored[0]["count"] == 2
    story.now += 60.0
    story.flush()
    assert story.writes == 2


def test_other_reasons_and_other_runs_have_events_of_their_own() -> None:
    story = Story()
    story.say()
    story.say(reason="NodeLost")
    story.say(uid="u2")

    assert len(story.stored) == 3


def test_the_same_thing_after_a_long_silence_is_a_new_event() -> None:
    story = Story()
    story.say()
    story.now += SERIES_SECONDS + 61.0
    story.say()

    assert [found["count"] for found in story.stored] == [1, 1]
    story.now += SERIES_SECONDS + 1
    story.flush()
    assert not story.events._series

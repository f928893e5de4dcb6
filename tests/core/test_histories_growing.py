"""Histories that grow event by event are those of the whole stream."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qtt_core.history import Histories, closed_configs, histories
from qtt_core.ledger.events import Cancel, Done, Event, Fail, Open, Retry, Run
from qtt_core.retention import ranked

RUN = Run(
    name="r", spec_hash="", seed=0, algorithm="Random", version="", space_hash="",
    spec={"fidelity": {"max": 3, "step": 1}},
)  # fmt: skip


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[Event], list[int]]:
    """Valid events of a few configurations, and where to cut the stream."""
    heads, open_, attempts, events = dict[str, int](), dict[str, int](), dict[str, int](), [RUN]
    out: list[Event] = list(events)
    for _ in range(draw(st.integers(0, 25))):
        c = draw(st.sampled_from(["0", "1", "2", "3"]))
        end = draw(st.sampled_from(["ok", "ok", "ok", "diverged", "oom", "retry", "cancel"]))
        head = heads.get(c, 0)
        if c not in open_:
            if head >= 0:
                open_[c], attempts[c] = head + 1, 0
                out.append(Open(c=c, frm=head, to=head + 1, h="", res=1.0))
            continue
        to, a = open_[c], attempts[c]
        if end == "retry":
            attempts[c] += 1
            out.append(Retry(c=c, to=to, a=a + 1, reason="Evicted", dev=1.0))
            continue
        del open_[c]
        score = draw(st.sampled_from([0.1, 0.5, 0.9]))
        if end in {"ok", "diverged"}:
            out.append(
                Done(c=c, to=to, a=a, state=end, epochs=((to, score, 1.0),), dev=2.0, bytes=to,
                     ck="x")
            )  # fmt: skip
            heads[c] = to if end == "ok" and to < 3 else -1
        elif end == "oom":
            out.append(Fail(c=c, to=to, a=a, state="oom", dev=1.0))
            heads[c] = -1
        else:
            out.append(Cancel(c=c, to=to, a=a, reason="Stopped", dev=1.0))
    return out, sorted(draw(st.lists(st.integers(0, len(out)), max_size=5)))


@settings(max_examples=60, deadline=None)
@given(streams())
def test_histories_taken_in_pieces_equal_those_of_the_whole(
    drawn: tuple[list[Event], list[int]],
) -> None:
    events, cuts = drawn
    configs = {str(c): {"model": f"m{c}"} for c in range(4)}
    growing = Histories()

    for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True):
        growing.take(events[start:end], configs)

    whole = histories(events, configs)
    assert dict(growing) == whole
    assert growing.best(3) == ranked(whole, 3)
    assert growing.closed == closed_configs(whole)
    assert growing.checkpoint_bytes == sum(past.checkpoint_bytes for past in whole.values())

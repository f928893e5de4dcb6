"""What every ledger must do: one set of tests for the fake in memory and the one in Redis.

A test module subclasses `LedgerContract`, says how to make a writer, and gets every reply word, the
order of the checks, and the agreement of stream, fold and counters tested against its own ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from qtt_core.errors import LedgerError
from qtt_core.ledger.events import (
    Cancel,
    Close,
    Done,
    Event,
    Fail,
    Note,
    Open,
    Prepared,
    Reopen,
    Retry,
    Run,
    WeightsFetched,
)
from qtt_core.ledger.fold import fold
from qtt_core.ledger.reply import Reply
from qtt_core.steps import Config

Answer = tuple[Reply, str]


class AnyLedger(Protocol):
    """A writer of a run's stream, with what the contract needs beyond `turn.Ledger`."""

    async def read(self, after: str = "0-0") -> list[Event]:
        """Events behind a stream id."""

    async def configs(self) -> dict[str, Config]:
        """Config id -> configuration."""

    async def open(self, event: Open, *, config: Config | None, job: str) -> Answer:
        """Record a decision."""

    async def commit(self, event: Done | Fail | Retry | Cancel, *, job: str = "") -> Answer:
        """Record an end."""

    async def note(self, event: Event, *, key: str) -> Answer:
        """Record what is no step."""

    async def fence(self) -> Reply:
        """Shut out older writers."""

    async def counters(self) -> dict[str, int]:
        """Counters kept beside the stream."""

    async def save_snapshot(self, stream_id: str, data: bytes, *, version: str) -> Reply:
        """Keep an optimizer's state."""

    async def load_snapshots(self) -> Sequence[tuple[str, str, bytes]]:
        """Newest first."""


Writer = Callable[[int], AnyLedger]
"""Epoch -> a writer of the one run under test."""


def run_event(step: int = 1) -> Run:
    """A run of Δ = `step` epochs."""
    return Run(
        name="digits", spec_hash="5", seed=1, algorithm="Random", version="0", space_hash="7",
        spec={"fidelity": {"max": 50, "step": step}},
    )  # fmt: skip


def opening(c: str = "3", frm: int = 0, to: int = 1, *, a: int = 0) -> Open:
    """A decision."""
    return Open(c=c, frm=frm, to=to, a=a, h=f"{c}:{frm}:{to}", res=1.5, why={"rule": "random"})


def result(c: str = "3", frm: int = 0, to: int = 1, *, a: int = 0, state: str = "ok") -> Done:
    """Its result: one score for every epoch."""
    epochs = tuple((epoch, 1 - 0.5**epoch, 0.25) for epoch in range(frm + 1, to + 1))
    return Done(c=c, to=to, a=a, state=state, epochs=epochs, dev=1.001, ov=0.5, q=0.125)


def prepared(to: int = 1, *, a: int = 0) -> Prepared:
    """The data set was read."""
    return Prepared(fingerprint="f", n_train=9, n_val=3, classes=3, to=to, a=a, dev=2.5)


CONFIG: Config = {"model": "tiny_a", "lr": 0.001, "mixup": 0, "ema": False, "drop": None}


class LedgerContract:
    """Subclass it, implement `play`."""

    def play(self, scenario: Callable[[Writer], Awaitable[None]]) -> None:
        """Run a scenario against a fresh run; override to open and close connections around it."""
        raise NotImplementedError

    # --- opening ---

    def test_an_opened_decision_is_read_back_as_it_was_written(self) -> None:
        """Every field, the configuration, and the writer's epoch."""

        async def scenario(writer: Writer) -> None:
            ledger = writer(4)
            event = replace(opening(), ver="0.1", tpl="t")

            reply, stream_id = await ledger.open(event, config=CONFIG, job="r-c3-f1-a0")

            assert reply is Reply.OK
            assert await ledger.read() == [replace(event, id=stream_id, ep=4)]
            assert await ledger.configs() == {"3": CONFIG}

        self.play(scenario)

    def test_a_second_decision_for_an_open_configuration_is_busy(self) -> None:
        """At most one open entry per configuration; others may be open beside it."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening(), config=CONFIG, job="j")

            assert (await ledger.open(opening(), config=CONFIG, job="j"))[0] is Reply.BUSY
            assert (await ledger.open(opening("4"), config=CONFIG, job="k"))[0] is Reply.OK

        self.play(scenario)

    def test_a_config_id_stands_for_one_configuration_for_ever(self) -> None:
        """An id reused for another configuration is a conflict, and changes nothing."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await step(ledger, "3", 0, 1)

            answer = await ledger.open(opening(frm=1, to=2), config={"model": "other"}, job="j")

            assert answer == (Reply.CONFLICT, "")
            assert await ledger.configs() == {"3": CONFIG}

        self.play(scenario)

    def test_a_decision_begins_where_the_configuration_ends(self) -> None:
        """Neither a gap nor an overlap."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await step(ledger, "3", 0, 2)

            assert (await ledger.open(opening(frm=3, to=4), config=CONFIG, job="j"))[0] is Reply.GAP
            assert (await ledger.open(opening(frm=1, to=3), config=CONFIG, job="j"))[0] in {
                Reply.GAP,
                Reply.DONE,
            }
            assert (await ledger.open(opening(frm=2, to=3), config=CONFIG, job="j"))[0] is Reply.OK

        self.play(scenario)

    def test_a_committed_step_is_never_opened_again(self) -> None:
        """Neither the last step of a job nor one in its middle."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await step(ledger, "3", 0, 3)

            for to in (1, 2, 3, 5):
                answer = await ledger.open(opening(frm=0, to=to), config=CONFIG, job="j")
                assert answer == (Reply.DONE, "")

        self.play(scenario)

    def test_steps_of_several_epochs_have_keys_only_at_their_ends(self) -> None:
        """With Δ = 3, a job 0 -> 7 covers the steps that end at 3, 6 and 7."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer, step_epochs=3)
            await step(ledger, "3", 0, 7)

            answers = {
                to: (await ledger.open(opening(frm=to - 1, to=to), config=CONFIG, job="j"))[0]
                for to in range(1, 8)
            }

            done = {to for to, reply in answers.items() if reply is Reply.DONE}
            assert done == {3, 6, 7}
            assert fold(await ledger.read()).steps == 3

        self.play(scenario)

    # --- ends ---

    def test_a_result_is_committed_exactly_once(self) -> None:
        """The second commit says DUP, charges nothing and writes nothing."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening(), config=CONFIG, job="j")

            first = await ledger.commit(result())
            counters = await ledger.counters()
            second = await ledger.commit(replace(result(), dev=99.0))

            assert first[0] is Reply.OK
            assert second == (Reply.DUP, "")
            assert await ledger.counters() == counters
            assert len(await ledger.read(first[1])) == 0

        self.play(scenario)

    def test_a_failure_is_committed_exactly_once(self) -> None:
        """Out of memory is a fact about the configuration: recorded, counted as one step."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening(to=3), config=CONFIG, job="j")
            failed = Fail(c="3", to=3, a=0, state="oom", dev=1.0)

            assert (await ledger.commit(failed))[0] is Reply.OK
            assert (await ledger.commit(failed))[0] is Reply.DUP
            assert (await ledger.counters())["steps"] == 1

        self.play(scenario)

    def test_a_retry_hands_the_decision_to_the_next_attempt(self) -> None:
        """Results of the attempt before are refused from then on."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening(), config=CONFIG, job="j0")
            retry = Retry(c="3", to=1, a=1, reason="preempted", dev=2.0)

            assert (await ledger.commit(retry, job="j1"))[0] is Reply.OK
            assert (await ledger.commit(retry, job="j1"))[0] is Reply.OLDATTEMPT
            assert (await ledger.commit(result(a=0)))[0] is Reply.OLDATTEMPT
            assert (await ledger.commit(result(a=1)))[0] is Reply.OK
            assert (await ledger.counters())["charged_ms"] == 2000 + 1001

        self.play(scenario)

    def test_a_cancelled_decision_may_be_taken_again(self) -> None:
        """A cancel marks no step."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening(), config=CONFIG, job="j")
            cancel = Cancel(c="3", to=1, a=0, reason="timeout", dev=0.5)

            assert (await ledger.commit(cancel))[0] is Reply.OK
            assert (await ledger.commit(cancel))[0] is Reply.UNKNOWN
            assert (await ledger.open(opening(), config=CONFIG, job="j"))[0] is Reply.OK

        self.play(scenario)

    def test_an_end_of_something_not_open_is_unknown(self) -> None:
        """No decision at all, or one to another epoch."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)

            assert (await ledger.commit(result()))[0] is Reply.UNKNOWN
            await ledger.open(opening(to=2), config=CONFIG, job="j")
            assert (await ledger.commit(result(to=1)))[0] is Reply.UNKNOWN

        self.play(scenario)

    def test_a_diverged_job_is_done_for_all_its_steps(self) -> None:
        """It stopped in epoch 3 of 5: three steps are counted, and no later one can be opened."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening(to=5), config=CONFIG, job="j")
            diverged = replace(result(to=2, state="diverged"), to=5)

            assert (await ledger.commit(diverged))[0] is Reply.OK
            assert (await ledger.commit(diverged))[0] is Reply.DUP
            assert (await ledger.counters())["steps"] == 3
            for to in (3, 4, 5):
                again = await ledger.open(opening(frm=2, to=to), config=CONFIG, job="j")
                assert again[0] is Reply.DONE

        self.play(scenario)

    def test_a_step_that_diverged_at_once_keeps_no_head(self) -> None:
        """No finite epoch: one step, head unchanged."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening(), config=CONFIG, job="j")
            await ledger.commit(replace(result(state="diverged"), epochs=()))

            assert (await ledger.counters())["steps"] == 1
            assert fold(await ledger.read()).heads == {}

        self.play(scenario)

    def test_epochs_trained_again_do_not_lower_the_head(self) -> None:
        """After a lost checkpoint a job may bring epochs that were committed before."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await step(ledger, "3", 0, 3)
            await ledger.open(opening(frm=3, to=4), config=CONFIG, job="j")

            assert (await ledger.commit(result(frm=1, to=4)))[0] is Reply.OK
            assert (await ledger.open(opening(frm=4, to=5), config=CONFIG, job="j"))[0] is Reply.OK

        self.play(scenario)

    # --- epochs of writers ---

    def test_an_older_writer_is_fenced_off_from_every_write(self) -> None:
        """A newer leader has spoken: nothing of the old one is accepted, whatever it writes."""

        async def scenario(writer: Writer) -> None:
            old, new = await started(writer, epoch=1), writer(2)
            await old.open(opening(), config=CONFIG, job="j")
            before = await old.read()

            assert await new.fence() is Reply.OK
            assert (await old.open(opening("4"), config=CONFIG, job="j"))[0] is Reply.STALE
            assert (await old.commit(result()))[0] is Reply.STALE
            assert (await old.note(Close(reason="Stopped"), key="close"))[0] is Reply.STALE
            assert await old.save_snapshot(before[0].id, b"x", version="0") is Reply.STALE
            assert await old.fence() is Reply.STALE
            assert await old.read() == before
            assert (await new.commit(result()))[0] is Reply.OK

        self.play(scenario)

    def test_a_newer_writer_fences_by_writing(self) -> None:
        """An accepted write raises the run's epoch, whichever script it was."""

        async def scenario(writer: Writer) -> None:
            old = await started(writer, epoch=1)
            await writer(2).open(opening(), config=CONFIG, job="j")
            assert (await old.commit(result()))[0] is Reply.STALE
            await writer(3).commit(result())
            assert (await writer(2).note(Note(what="x"), key="x"))[0] is Reply.STALE
            await writer(4).note(Note(what="x"), key="x")
            assert await writer(3).fence() is Reply.STALE
            assert await writer(4).fence() is Reply.OK

        self.play(scenario)

    # --- notes, pseudo-configurations, the end ---

    def test_a_note_is_written_once_per_key(self) -> None:
        """A restarted runner notes the same thing again."""

        async def scenario(writer: Writer) -> None:
            ledger = writer(1)

            assert (await ledger.note(run_event(), key="run"))[0] is Reply.OK
            assert await ledger.note(run_event(), key="run") == (Reply.DUP, "")
            assert (await ledger.note(Note(what="budget"), key="b1"))[0] is Reply.OK
            assert (await ledger.note(Note(what="budget"), key="b2"))[0] is Reply.OK
            assert [event.kind for event in await ledger.read()] == ["run", "note", "note"]

        self.play(scenario)

    def test_prepare_is_opened_retried_and_ended_by_prepared(self) -> None:
        """And a second one begins where the first ended."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening("prepare"), config=None, job="p0")
            await ledger.commit(Retry(c="prepare", to=1, a=1, reason="RunnerLost", dev=1.0))

            early = await ledger.note(prepared(), key="prepare-f1")
            ended = await ledger.note(prepared(a=1), key="prepare-f1")
            again = await ledger.note(prepared(a=1), key="prepare-f1")
            second = await ledger.open(opening("prepare", 1, 2), config=None, job="p1")

            assert [early[0], ended[0], again[0], second[0]] == [
                Reply.OLDATTEMPT, Reply.OK, Reply.DUP, Reply.OK,
            ]  # fmt: skip
            assert (await ledger.counters())["charged_ms"] == 3500
            assert await ledger.configs() == {}
            assert (await ledger.open(opening("prepare"), config=None, job="p"))[0] is Reply.DONE

        self.play(scenario)

    def test_prepare_is_done_whatever_key_its_end_was_noted_under(self) -> None:
        """The step itself is marked, beside the note's key."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening("prepare"), config=None, job="p")
            await ledger.note(prepared(), key="any")

            assert (await ledger.open(opening("prepare"), config=None, job="p"))[0] is Reply.DONE

        self.play(scenario)

    def test_prepared_without_an_open_prepare_is_unknown(self) -> None:
        """A result nobody asked for."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)

            assert (await ledger.note(prepared(), key="prepare-f1"))[0] is Reply.UNKNOWN

        self.play(scenario)

    def test_weights_and_evaluations_cost_the_run_nothing(self) -> None:
        """Their device time is recorded, and not charged."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening("weights"), config=None, job="w")
            await ledger.commit(Retry(c="weights", to=1, a=1, reason="infra_storage", dev=5.0))
            await ledger.note(WeightsFetched(claim="w", a=1), key="weights-f1")
            await ledger.open(opening("eval-ab"), config=None, job="e")
            note = Note(what="evaluation", c="eval-ab", new="{}")

            assert (await ledger.note(note, key="eval-ab-f1"))[0] is Reply.OK
            assert (await ledger.counters()).get("charged_ms", 0) == 0
            assert fold(await ledger.read()).open == {}

        self.play(scenario)

    def test_a_closed_run_opens_nothing_but_evaluations_until_it_is_reopened(self) -> None:
        """What was open may still end."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await ledger.open(opening(), config=CONFIG, job="j")
            _, last = await ledger.note(Close(reason="Stopped"), key="close-1")

            assert (await ledger.open(opening("4"), config=CONFIG, job="k"))[0] is Reply.CLOSED
            assert (await ledger.open(opening("prepare"), config=None, job="p"))[0] is Reply.CLOSED
            assert (await ledger.open(opening("eval-ab"), config=None, job="e"))[0] is Reply.OK
            assert (await ledger.commit(result()))[0] is Reply.OK
            await ledger.note(Reopen(reason="budget raised"), key=f"reopen-{last}")
            assert (await ledger.open(opening("4"), config=CONFIG, job="k"))[0] is Reply.OK

        self.play(scenario)

    # --- the order of the checks: the first that fails names the reply ---

    def test_the_checks_of_open_come_in_their_order(self) -> None:
        """epoch, closed, configuration, done, open, head; each breaks alone, later ones too."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer, epoch=5)
            await step(ledger, "3", 0, 1)
            await step(ledger, "3", 1, 2)
            await ledger.open(opening(frm=2, to=3), config=CONFIG, job="j")

            async def reply(epoch: int, config: Config, frm: int, to: int) -> Reply:
                event = opening(frm=frm, to=to)
                return (await writer(epoch).open(event, config=config, job="j"))[0]

            assert await reply(5, CONFIG, 9, 10) is Reply.BUSY  # and a gap
            assert await reply(5, CONFIG, 0, 2) is Reply.DONE  # and busy, and a gap
            assert await reply(5, {"x": 1}, 0, 2) is Reply.CONFLICT  # and done
            await ledger.note(Close(reason="Stopped"), key="close")
            assert await reply(5, {"x": 1}, 0, 2) is Reply.CLOSED  # and a conflict
            assert await reply(4, {"x": 1}, 0, 2) is Reply.STALE  # and closed

        self.play(scenario)

    def test_the_checks_of_commit_come_in_their_order(self) -> None:
        """epoch, done, open, attempt."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer, epoch=5)
            await step(ledger, "3", 0, 1)
            await ledger.open(opening("4"), config=CONFIG, job="j")

            assert (await ledger.commit(result("4", a=7)))[0] is Reply.OLDATTEMPT
            assert (await ledger.commit(result("9", a=7)))[0] is Reply.UNKNOWN
            assert (await ledger.commit(result("3", a=7)))[0] is Reply.DUP  # and not open
            assert (await writer(4).commit(result("3", a=7)))[0] is Reply.STALE  # and a duplicate

        self.play(scenario)

    # --- reading ---

    def test_reading_after_an_id_gives_only_what_follows(self) -> None:
        """In order, with ids that rise."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            for c in range(25):
                await step(ledger, str(c), 0, 1)
            events = await ledger.read()

            for cut in (0, 7, 50):
                assert await ledger.read(events[cut].id) == events[cut + 1 :]
            assert len(events) == 51
            assert fold(events).steps == 25

        self.play(scenario)

    def test_an_event_that_is_gone_is_not_read_over(self) -> None:
        """A store that came back without its newest writes has taken others since."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            last = (await ledger.read())[-1].id
            lost = f"{int(last.partition('-')[0]) - 1}-7"

            said = ""
            try:
                await ledger.read(lost)
            except LedgerError as error:
                said = str(error)
            assert lost in said

        self.play(scenario)

    def test_counters_agree_with_the_fold(self) -> None:
        """Two accounts of one run: the scripts' and the fold's."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer, step_epochs=2)
            await step(ledger, "1", 0, 5)
            await ledger.open(opening("2", 0, 8), config=CONFIG, job="j")
            await ledger.commit(Retry(c="2", to=8, a=1, reason="timeout", dev=0.4, ov=0.1, q=7))
            await ledger.commit(replace(result("2", 0, 3, a=1, state="diverged"), to=8))
            await ledger.open(opening("4"), config=CONFIG, job="j")
            await ledger.commit(Fail(c="4", to=1, a=0, state="infeasible", dev=0.3))

            state, counters = fold(await ledger.read()), await ledger.counters()

            assert counters["steps"] == state.steps == 3 + 2 + 1
            assert counters["charged_ms"] == round(state.charged_seconds * 1000)
            assert counters["overhead_ms"] == round(state.overhead_seconds * 1000)
            assert counters["queue_ms"] == round(state.queue_seconds * 1000)

        self.play(scenario)

    def test_text_of_any_language_survives(self) -> None:
        """Names and messages are the user's."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            config: Config = {"model": "größe/모델-𝛼", "note": 'a "quoted"\nline'}
            await ledger.open(opening(), config=config, job="j")
            await ledger.commit(replace(result(), msg="Übertragung ‒ 失敗\n\x00'\"\\"))

            assert (await ledger.configs())["3"] == config
            assert (await ledger.read())[-1].msg == "Übertragung ‒ 失敗\n\x00'\"\\"  # type: ignore[attr-defined]  # a Done

        self.play(scenario)

    # --- snapshots ---

    def test_two_generations_of_snapshots_are_kept(self) -> None:
        """Newest first; one ahead of the stream is refused."""

        async def scenario(writer: Writer) -> None:
            ledger = await started(writer)
            await step(ledger, "3", 0, 1)
            ids = [event.id for event in await ledger.read()]

            for stream_id, data in zip(ids, (b"one", b"two\x00\xff", b"three"), strict=True):
                assert await ledger.save_snapshot(stream_id, data, version="0.1") is Reply.OK

            assert list(await ledger.load_snapshots()) == [
                (ids[2], "0.1", b"three"),
                (ids[1], "0.1", b"two\x00\xff"),
            ]
            future = f"{int(ids[2].split('-')[0]) + 1}-0"
            assert await ledger.save_snapshot(future, b"four", version="0.1") is Reply.UNKNOWN

        self.play(scenario)


async def started(writer: Writer, *, epoch: int = 1, step_epochs: int = 1) -> AnyLedger:
    """A writer whose run has begun."""
    ledger = writer(epoch)
    assert (await ledger.note(run_event(step_epochs), key="run"))[0] is Reply.OK
    return ledger


async def step(ledger: AnyLedger, c: str, frm: int, to: int) -> None:
    """Open and commit one job."""
    assert (await ledger.open(opening(c, frm, to), config=CONFIG, job="j"))[0] is Reply.OK
    assert (await ledger.commit(result(c, frm, to)))[0] is Reply.OK


def play_in_loop(scenario: Callable[[Writer], Awaitable[None]], writer: Writer) -> None:
    """Run a scenario in an event loop of its own."""

    async def main() -> None:
        await scenario(writer)

    asyncio.run(main())

"""Streams of released schemas, kept as they were written: a new version must read an old run.

A file in `tests/golden/` is never written again. A new schema adds a file and a test.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtt_core.history import Standing, best_so_far, histories, optimizer_events
from qtt_core.ledger.events import KINDS, Event, from_fields, to_fields
from qtt_core.ledger.fold import fold
from qtt_core.steps import Abandon, Config, Observation, Proposal

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(scope="module")
def wires() -> list[dict[str, str]]:
    lines = (GOLDEN / "ledger_schema_1.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def stream(wires: list[dict[str, str]]) -> list[Event]:
    return [from_fields(wire["id"], wire) for wire in wires]


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    return json.loads((GOLDEN / "ledger_schema_1_configs.json").read_text(encoding="utf-8"))


def test_schema_1_holds_every_kind_of_event(stream: list[Event]) -> None:
    assert {event.kind for event in stream} == set(KINDS)


def test_schema_1_is_written_as_it_was_read(
    wires: list[dict[str, str]], stream: list[Event]
) -> None:
    assert [{"id": event.id} | to_fields(event) for event in stream] == wires


def test_schema_1_folds_to_the_state_it_had(stream: list[Event]) -> None:
    """Sums worked out by hand; Δ = 2, T = 10."""
    state = fold(stream)

    assert (state.last_id, state.epoch) == ("1763700217500-0", 4)
    assert state.heads == {"0": 10, "1": 4, "4": 3}
    assert state.steps == 11  # 6 of configuration 0, 2 of 1, the fail of 2, 2 until 4 diverged
    assert (state.charged_seconds, state.overhead_seconds, state.queue_seconds) == (82.5, 6.75, 4.5)
    assert state.failed == {"2": "oom", "3": "invalid_config", "4": "diverged"}
    assert state.retired == {"3"}
    assert state.closed is None
    assert state.infra_retries == 3
    assert set(state.open) == {"1"}
    entry = state.open["1"]
    assert (entry.frm, entry.to, entry.attempt, entry.retries) == (4, 6, 1, ("bug",))
    assert {to for c, to in state.step_keys if c == "0"} == {2, 4, 6, 8, 9, 10}
    assert state.prepared is not None
    assert (state.prepared.classes, state.prepared.missing_weights) == (10, ("tiny_mixer",))
    assert state.weights is not None
    assert [note.what for note in state.notes] == ["budget", "evaluation"]


def test_schema_1_gives_the_histories_it_had(
    stream: list[Event], configs: dict[str, Config]
) -> None:
    records = histories(stream, configs)

    assert {c: record.standing for c, record in records.items()} == {
        0: Standing.FINISHED,
        1: Standing.OPEN,
        2: Standing.OOM,
        3: Standing.RETIRED,
        4: Standing.DIVERGED,
        5: Standing.CANCELLED,
    }
    # epoch 2 was trained again after a lost checkpoint: the score committed first stays
    assert records[0].scores == (0.31, 0.55, 0.6, 0.7, 0.75, 0.8, 0.83, 0.85, 0.86, 0.87)
    assert best_so_far(stream)[-1].best_score == 0.87


def test_schema_1_tells_the_optimizer_what_it_did(
    stream: list[Event], configs: dict[str, Config]
) -> None:
    told = [event for _, event in optimizer_events(stream, configs)]
    told_kinds = {
        kind: sum(isinstance(e, kind) for e in told) for kind in (Proposal, Observation, Abandon)
    }

    assert told_kinds == {Proposal: 9, Observation: 6, Abandon: 2}

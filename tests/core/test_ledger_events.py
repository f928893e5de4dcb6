"""Events on the wire: what is written is what is read, and what cannot be read is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtt_core.errors import LedgerError, NewerSchemaError
from qtt_core.ledger.events import (
    KINDS,
    SCHEMA,
    Done,
    Event,
    Open,
    Run,
    done_key,
    from_fields,
    is_charged,
    is_pseudo,
    step_targets,
    to_fields,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | NUMBER | TEXT, max_size=3)
BY_TYPE: Mapping[str, st.SearchStrategy[Any]] = {
    "str": TEXT,
    "int": st.integers(),
    "float": NUMBER,
    "bool": st.booleans(),
    "Mapping[str, Any]": JSON,
    "Mapping[str, str]": st.dictionaries(TEXT, TEXT, max_size=3),
    "Mapping[str, float]": st.dictionaries(TEXT, NUMBER, max_size=3),
    "Mapping[str, int]": st.dictionaries(TEXT, st.integers(), max_size=3),
    "tuple[str, ...]": st.lists(TEXT, max_size=3).map(tuple),
    "tuple[tuple[int, float, float], ...]": st.lists(
        st.tuples(st.integers(), NUMBER, NUMBER), max_size=3
    ).map(tuple),
}


@st.composite
def any_event(draw: st.DrawFn) -> Event:
    """Any event of any kind; every field drawn by its annotation."""
    cls = draw(st.sampled_from(list(KINDS.values())))
    values = {spec.name: draw(BY_TYPE[str(spec.type)]) for spec in fields(cls) if spec.name != "id"}
    if cls is Run:
        values["schema"] = SCHEMA
    return cls(id="5-0", **values)


@given(any_event())
def test_every_event_is_read_back_as_it_was_written(event: Event) -> None:
    wire = to_fields(event)

    assert from_fields("5-0", wire) == event
    assert all(isinstance(value, str) for value in wire.values())


def test_values_equal_to_their_default_stay_off_the_wire() -> None:
    wire = to_fields(Open(c="3", frm=0, to=1, h="h", res=2.0))

    assert wire == {"k": "open", "c": "3", "from": "0", "to": "1", "h": "h", "res": "2.0"}


def test_the_schema_number_is_always_written() -> None:
    run = Run(name="r", spec_hash="", seed=0, algorithm="", version="", space_hash="")

    assert to_fields(run)["schema"] == str(SCHEMA)


DEFAULTS_OF_SCHEMA_1: Mapping[str, Mapping[str, object]] = {
    "run": {"ep": 0, "schema": 1, "spec": {}, "files": {}, "prior": ""},
    "prepared": {
        "ep": 0, "c": "prepare", "to": 1, "a": 0, "metafeatures": {}, "excluded": {},
        "missing_weights": (), "digest": "", "warnings": (), "dev": 0.0,
    },
    "weights": {"ep": 0, "c": "weights", "to": 1, "a": 0, "models": ()},
    "open": {"ep": 0, "a": 0, "why": {}, "ver": "", "tpl": ""},
    "done": {
        "ep": 0, "ov": 0.0, "q": 0.0, "mem": 0, "gpu": "", "inert": (), "eb": 0, "ck": "",
        "bytes": 0, "msg": "",
    },
    "fail": {"ep": 0, "ov": 0.0, "q": 0.0, "mem": 0, "gpu": "", "msg": ""},
    "retry": {"ep": 0, "ov": 0.0, "q": 0.0, "node": "", "msg": ""},
    "cancel": {"ep": 0, "retire": False, "dev": 0.0, "ov": 0.0, "q": 0.0, "msg": ""},
    "note": {"ep": 0, "old": "", "new": "", "c": "", "to": 1, "a": 0},
    "close": {"ep": 0, "msg": "", "budget": {}},
    "reopen": {"ep": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_defaults_of_schema_1_never_change(kind: str) -> None:
    """Old streams left these values out: another default would change their past.

    A field that is new since must have a default, and joins this table.
    """
    now = {}
    for spec in fields(KINDS[kind]):
        if spec.name == "id":
            continue
        if spec.default is not MISSING:
            now[spec.name] = spec.default
        elif spec.default_factory is not MISSING:
            now[spec.name] = spec.default_factory()

    assert now == DEFAULTS_OF_SCHEMA_1[kind]


@pytest.mark.parametrize(
    ("wire", "error"),
    [
        pytest.param({"k": "teleport"}, NewerSchemaError, id="a kind of the future"),
        pytest.param({}, NewerSchemaError, id="no kind"),
        pytest.param({"k": "close"}, LedgerError, id="a field is missing"),
        pytest.param(
            {"k": "open", "c": "1", "from": "x", "to": "1", "h": "", "res": "0"},
            LedgerError,
            id="no number",
        ),
        pytest.param(
            {
                "k": "done",
                "c": "1",
                "to": "1",
                "a": "0",
                "state": "ok",
                "epochs": "[[1",
                "dev": "0",
            },
            LedgerError,
            id="torn JSON",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(wire: Mapping[str, str], error: type[LedgerError]) -> None:
    with pytest.raises(error, match="7-0"):
        from_fields("7-0", wire)


def test_a_stream_of_a_newer_schema_is_refused() -> None:
    run = Run(name="r", spec_hash="", seed=0, algorithm="", version="", space_hash="")
    wire = to_fields(replace(run, schema=SCHEMA + 1))

    with pytest.raises(NewerSchemaError, match="upgrade"):
        from_fields("7-0", wire)


def test_a_field_of_a_newer_version_is_passed_over() -> None:
    wire = to_fields(Open(c="3", frm=0, to=1, h="h", res=2.0)) | {"mood": "good"}

    assert from_fields("7-0", wire) == Open(id="7-0", c="3", frm=0, to=1, h="h", res=2.0)


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 50))
def test_a_job_covers_its_epochs_without_gap_in_the_fewest_steps(
    frm: int, length: int, step: int
) -> None:
    targets = step_targets(frm, frm + length, step)

    assert targets[-1] == frm + length
    assert len(targets) == -(-length // step)
    assert all(0 < b - a <= step for a, b in zip((frm, *targets), targets, strict=False))


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 7), st.data())
def test_a_diverged_job_consumes_between_one_step_and_all(
    frm: int, length: int, step: int, data: st.DataObject
) -> None:
    last = data.draw(st.integers(frm, frm + length - 1))
    epochs = tuple((epoch, 0.5, 1.0) for epoch in range(frm + 1, last + 1))
    done = Done(c="1", to=frm + length, a=0, state="diverged", epochs=epochs, dev=0.0)

    consumed = done.steps(frm, step)

    assert 1 <= consumed <= len(step_targets(frm, frm + length, step))
    assert frm + (consumed - 1) * step < last + 1 <= frm + consumed * step


def test_names_tell_configurations_from_other_work() -> None:
    assert [is_pseudo(c) for c in ("0", "12", "prepare", "weights", "eval-1a")] == [
        False, False, True, True, True,
    ]  # fmt: skip
    assert [is_charged(c) for c in ("0", "prepare", "weights", "eval-1a")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert (done_key("12", 3), done_key("prepare", 1)) == ("c12-f3", "prepare-f1")


def test_the_time_of_an_event_is_that_of_its_id() -> None:
    assert Open(id="1700000000123-4", c="1", frm=0, to=1, h="", res=0).time == 1700000000.123
    assert Open(c="1", frm=0, to=1, h="", res=0).time == 0.0

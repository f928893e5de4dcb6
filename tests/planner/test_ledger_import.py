"""`qtt ledger import`: what was exported comes back whole, once, and never over anything else."""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qtt_core.ledger.events import Note, Open, Run, from_fields
from qtt_core.ledger.file import Ledger, parse_ledger
from qtt_core.ledger.reply import Reply
from qtt_operator import cli, ledger_transfer
from qtt_operator.ledger_transfer import find_run_in, put_whole, read_whole
from qtt_operator.redis_client import find_runs
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.store import EmbeddedStore

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Somebody else's Redis."""
    with EmbeddedStore(tmp_path_factory.mktemp("elsewhere")) as store:
        yield store


@pytest.fixture
def qtt(capsys):
    """Run the command line: (exit code, output, errors)."""

    def run(*words):
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def exported(qtt, recorded, tmp_path):
    """The recorded run as a file."""
    path = tmp_path / "rec.jsonl"
    assert qtt("ledger", "export", "rec", path, "--state-dir", recorded.state_dir)[0] == 0
    return path


def golden_ledger(**changes):
    """A run with every kind of event, and a hub and a space of its own."""
    lines = (GOLDEN / "ledger_schema_1.jsonl").read_text().splitlines()
    wires = [json.loads(line) for line in lines]
    configs = json.loads((GOLDEN / "ledger_schema_1_configs.json").read_text())
    ledger = Ledger(
        name="digits", uid=uuid.uuid4().hex, configs=configs,
        events=[from_fields(wire["id"], wire) for wire in wires],
        hub={"name": "mine", "cards": []}, space='{"hyperparameters": []}',
    )  # fmt: skip
    return replace(ledger, **changes)


def write(path, ledger):
    path.write_text("\n".join(ledger.lines()) + "\n")
    return path


def on(store, scenario):
    """What a scenario with a client of the server returns."""

    async def main():
        client = store.client()
        try:
            return await scenario(client)
        finally:
            await client.aclose()

    return asyncio.run(main())


def url(store):
    return f"unix://{store.socket}"


# --- there and back ---------------------------------------------------------------------------


def test_export_import_export_gives_the_same_bytes(qtt, exported, tmp_path):
    here = ("--state-dir", tmp_path / "here")

    code, said, _ = qtt("ledger", "import", exported, *here)
    _, again, _ = qtt("ledger", "export", "rec", "-", *here)
    _, rows, _ = qtt("statistics", "rec", "-o", "json", *here)
    watched, status, _ = qtt("watch", "rec", *here)  # ends: nobody works on it

    assert (code, said.split()[0]) == (0, str(len(exported.read_text().splitlines()) - 1))
    assert again == exported.read_text()
    assert {row["config_id"] for row in json.loads(rows)} == {0, 7, 9}
    assert (watched, "phase imported" in status) == (0, True)


def test_every_kind_of_event_comes_back_from_a_given_redis(qtt, store, tmp_path):
    """Found by its uid; the file's hub and space come with it."""
    ledger = golden_ledger()
    file = write(tmp_path / "golden.jsonl", ledger)

    code, said, _ = qtt("ledger", "import", file, "--redis-url", url(store))
    words = ("--redis-url", url(store), "--state-dir", tmp_path)
    _, again, _ = qtt("ledger", "export", ledger.uid, "-", *words)

    assert (code, f"run {ledger.name} to unix:/" in said) == (0, True)
    assert again == file.read_text()


def test_a_long_ledger_takes_several_pages_and_a_pipe(qtt, store, monkeypatch, tmp_path):
    run = Run(
        id="1-0", name="long", spec_hash="", seed=0, algorithm="Random", version="0", space_hash=""
    )
    notes = [Note(id=f"{n}-7", what="budget", new=str(n)) for n in range(2, 1300)]
    ledger = Ledger(name="long", uid=uuid.uuid4().hex, configs={}, events=[run, *notes])
    text = "\n".join(ledger.lines())
    monkeypatch.setattr("sys.stdin", io.StringIO(text))

    code, _, err = qtt("ledger", "import", "-", "--redis-url", url(store))

    assert (code, err) == (0, "")
    there = on(store, lambda client: read_whole(client, ledger.uid))
    assert there == ledger
    words = ("--redis-url", url(store), "--state-dir", tmp_path)
    assert qtt("ledger", "export", "long", "-", *words)[1] == text + "\n"


# --- never over anything else -------------------------------------------------------------------


def test_the_same_ledger_again_is_nothing_to_do(qtt, exported, store, tmp_path):
    here = ("--state-dir", tmp_path / "here")
    for target in (here, ("--redis-url", url(store))):
        first = qtt("ledger", "import", exported, *target)
        again = qtt("ledger", "import", exported, *target)

        assert (first[0], "already" in first[1]) == (0, False)
        assert (again[0], "already; nothing to do" in again[1]) == (0, True)


@pytest.mark.parametrize("place", ["folder", "redis"])
def test_a_run_that_is_there_and_differs_stays_as_it_is(qtt, exported, store, tmp_path, place):
    folder = ("--state-dir", tmp_path / "here")
    target = folder if place == "folder" else ("--redis-url", url(store))
    ledger = replace(parse_ledger(exported.read_text().splitlines(), "x"), uid=f"other-{place}")
    write(exported, ledger)
    assert qtt("ledger", "import", exported, *target)[0] == 0
    shorter = write(tmp_path / "shorter.jsonl", replace(ledger, events=ledger.events[:-1]))

    code, _, err = qtt("ledger", "import", shorter, *target)

    count = len(ledger.events)
    assert code == 64
    assert f"of {count} events" in err
    assert f"differs from the file's {count - 1} events after {count - 1}" in err
    name = ledger.uid if place == "redis" else "rec"
    assert qtt("ledger", "export", name, "-", *folder, *target)[1] == exported.read_text()


def test_another_run_of_that_name_wants_a_name_of_its_own(qtt, exported, tmp_path):
    here = ("--state-dir", tmp_path / "here")
    qtt("ledger", "import", exported, *here)
    ledger = replace(parse_ledger(exported.read_text().splitlines(), "x"), uid="another")
    file = write(tmp_path / "another.jsonl", ledger)

    refused, _, err = qtt("ledger", "import", file, *here)
    code, _, _ = qtt("ledger", "import", file, *here, "--name", "rec2")

    assert (refused, "--name NAME" in err, code) == (64, True, 0)
    assert qtt("ledger", "export", "rec2", "-", *here)[1] == file.read_text()


def test_an_import_that_broke_off_is_no_run_and_does_not_hinder_the_next(store):
    ledger = golden_ledger()

    async def scenario(client):
        state = ledger_transfer.check_whole(ledger, "x")
        await ledger_transfer._draft(client, ledger, state, "import:broken:")
        before = [entry.uid for entry in await find_runs(client)]
        written = await put_whole(client, ledger, "x")
        left = await client.ttl(f"qtt:{{{ledger.uid}}}:import:broken:log")
        return before, written, await read_whole(client, ledger.uid), left

    before, written, there, left = on(store, scenario)

    assert ledger.uid not in before
    assert (written, there) == (True, ledger)
    assert 0 < left <= ledger_transfer.DRAFT_SECONDS
    assert on(store, lambda c: c.ttl(f"qtt:{{{ledger.uid}}}:log")) == -1


def test_nothing_can_be_opened_on_a_record(store):
    """Its stream says that it goes on, and its checkpoints are elsewhere."""
    ledger = golden_ledger()

    async def scenario(client):
        await put_whole(client, ledger, "x")
        writer = RedisLedger(client, ledger.uid, 99)
        opening = Open(c="77", frm=0, to=1, h="h", res=1.0)
        return await writer.open(opening, config={"lr": 1.0}, job="j")

    assert on(store, scenario) == (Reply.CLOSED, "")


def test_a_fence_outlasts_the_import(store):
    """An operator that had shut older writers out of the empty run."""
    ledger = golden_ledger()

    async def scenario(client):
        await RedisLedger(client, ledger.uid, 50).fence()
        await put_whole(client, ledger, "x")
        return await RedisLedger(client, ledger.uid, 49).fence()

    assert on(store, scenario) is Reply.STALE


def test_a_local_run_does_not_go_on_with_a_record(qtt, exported, tmp_path):
    here = ("--state-dir", tmp_path / "here")
    qtt("ledger", "import", exported, *here)
    (tmp_path / "images").mkdir()
    path = tmp_path / "run.yaml"
    spec = {"dataset": {"claimName": "images"}, "budget": {"maxSteps": 1}}
    raw = {
        "apiVersion": "quicktune.dev/v1alpha1", "kind": "TuningRun",
        "metadata": {"name": "rec"}, "spec": spec,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(raw))

    code, _, err = qtt("run", path, "--plain", *here)

    assert code == 64
    assert "is an import" in err
    assert qtt("ledger", "export", "rec", "-", *here)[1] == exported.read_text()


# --- files that are none ------------------------------------------------------------------------


def cut(lines, number):
    return "\n".join(lines[:number])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: cut(lines, 4)[:-9], ":4"),
        (lambda lines: cut(lines, 4), "3 events'; its header says"),
        (lambda lines: "\n".join([*lines[:3], *lines[5:]]), "its header says"),
        (lambda lines: "\n".join([*lines[:3], lines[4], lines[3], *lines[5:]]), "comes after"),
        (lambda lines: "\n".join(lines).replace('"schema": 1', '"schema": 2', 1), "upgrade"),
        (lambda lines: "\n".join(lines).replace('"schema": 1', '"schema": 0', 1), "unknown"),
        (lambda lines: "\n".join(lines).replace('"k": "open"', '"k": "zap"', 1), "upgrade"),
        (lambda lines: "\n".join(lines).replace('"9": {', '"99": {', 1), "configurations 9"),
        (lambda lines: "\n".join(lines).replace('"rec"', '"../rec"', 1), "name"),
        (lambda lines: "dataset,run,epoch,score\n", "is no line of"),
        (lambda lines: "", "is no file of"),
    ],
    ids=[
        "in a line", "between lines", "a hole", "the wrong order", "a newer schema", "no schema",
        "a newer event", "a configuration that is missing", "a name that is a path", "a table",
        "an empty file",
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_trusted_is_refused_whole(qtt, exported, tmp_path, change, words):
    exported.write_text(change(exported.read_text().splitlines()))

    code, out, err = qtt("ledger", "import", exported, "--state-dir", tmp_path / "here")

    assert (code, out) == (64, "")
    assert words in err
    assert str(exported) in err
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None], ids=["binary", "missing"])
def test_a_file_that_cannot_be_read_is_named(qtt, tmp_path, content):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content)

    code, _, err = qtt("ledger", "import", path, "--state-dir", tmp_path / "here")

    assert code == 64
    assert "x.jsonl" in err


# --- runs of a Redis by their names --------------------------------------------------------------


def test_runs_of_one_name_are_told_apart_by_namespace_or_uid(store):
    ledgers = {space: golden_ledger(name="twice") for space in ("red", "blue")}

    async def scenario(client):
        for space, ledger in ledgers.items():
            run = next(e for e in ledger.events if isinstance(e, Run))
            events = [replace(run, name="twice"), *ledger.events[1:]]
            await put_whole(client, replace(ledger, events=events), "x")
            await RedisLedger(client, ledger.uid, 99).describe({"namespace": space})
        found = [await find_run_in(client, f"{space}/twice") for space in ledgers]
        return found, await find_run_in(client, ledgers["red"].uid)

    found, by_uid = on(store, scenario)

    assert found == [ledger.uid for ledger in ledgers.values()]
    assert by_uid == ledgers["red"].uid


def test_a_name_that_is_not_to_be_found_lists_those_that_are(qtt, store, tmp_path):
    ledger = golden_ledger()
    on(store, lambda client: put_whole(client, ledger, "x"))

    words = ("--redis-url", url(store), "--state-dir", tmp_path)
    code, _, err = qtt("ledger", "export", "nope", "-", *words)

    assert code == 64
    assert ledger.uid in err

"""The ledger in Redis, against a real server: contract, errors, and what lies in the keys."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

import qtt_operator.redis_ledger as module
from qtt_core.errors import SpecError, StoreError, StoreUnavailableError
from qtt_core.ledger.events import Close, Done, Note
from qtt_core.ledger.fold import fold
from qtt_core.ledger.reply import Reply
from qtt_core.testing.ledger_contract import (
    CONFIG,
    LedgerContract,
    Writer,
    opening,
    result,
    run_event,
    started,
    step,
)
from qtt_operator.redis_client import (
    address_of,
    check_store,
    client_of_socket,
    client_of_url,
    connect,
    find_runs,
    next_epoch,
)
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.store import EmbeddedStore

LUA = Path(module.__file__).parent / "lua"


def fresh_uid() -> str:
    return uuid.uuid4().hex


def on(store: EmbeddedStore, scenario: Callable[[Redis], Awaitable[None]]) -> None:
    """Run a scenario with a client of the server."""

    async def main() -> None:
        client = store.client()
        try:
            await scenario(client)
        finally:
            await client.aclose()

    asyncio.run(main())


class TestRedisLedger(LedgerContract):
    @pytest.fixture(autouse=True)
    def _store(self, redis_store: EmbeddedStore) -> None:
        self.store = redis_store

    def play(self, scenario: Callable[[Writer], Awaitable[None]]) -> None:
        uid = fresh_uid()

        async def main(client: Redis) -> None:
            await scenario(lambda epoch: RedisLedger(client, uid, epoch))

        on(self.store, main)


def test_a_run_is_not_closed_on_account_of_an_event_that_the_store_has_lost(
    redis_store: EmbeddedStore,
) -> None:
    """Else it would end although a step is missing, which no later turn makes good."""

    async def scenario(client: Redis) -> None:
        ledger = RedisLedger(client, fresh_uid(), 1)
        _, kept = await ledger.note(run_event(), key="run")
        _, lost = await ledger.note(Note(what="budget", new="8"), key="budget")
        await client.xdel(ledger.key("log"), lost)
        close = Close(reason="BudgetExhausted")

        assert await ledger.note(close, key=f"close-{lost}") == (Reply.UNKNOWN, "")
        assert not (await ledger.meta()).get("closed")
        assert (await ledger.note(close, key=f"close-{kept}"))[0] is Reply.OK
        assert (await ledger.note(close, key=f"close-{kept}"))[0] is Reply.DUP

    on(redis_store, scenario)


def test_a_reader_reads_everything_and_writes_nothing(redis_store: EmbeddedStore) -> None:
    async def scenario(client: Redis) -> None:
        uid = fresh_uid()
        await step(await started(lambda epoch: RedisLedger(client, uid, epoch)), "3", 0, 1)
        reader = RedisLedger.reader(client, uid)

        assert fold(await reader.read()).steps == 1
        assert await reader.configs() == {"3": CONFIG}
        assert (await reader.open(opening("4"), config=CONFIG, job="j"))[0] is Reply.STALE
        assert await reader.fence() is Reply.STALE

    on(redis_store, scenario)


def test_a_long_stream_is_read_page_by_page(
    redis_store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 4)

    async def scenario(client: Redis) -> None:
        ledger = await started(lambda epoch: RedisLedger(client, uid, epoch))
        for c in range(6):
            await step(ledger, str(c), 0, 1)

        events = await ledger.read()

        assert len(events) == 13
        assert [event.id for event in await ledger.read(events[3].id)] == [e.id for e in events[4:]]
        assert await ledger.read(events[-1].id) == []

    uid = fresh_uid()
    on(redis_store, scenario)


def test_scripts_are_sent_again_after_the_server_forgot_them(redis_store: EmbeddedStore) -> None:
    async def scenario(client: Redis) -> None:
        ledger = await started(lambda epoch: RedisLedger(client, fresh_uid(), epoch))
        await client.script_flush()

        assert await ledger.fence() is Reply.OK

    on(redis_store, scenario)


def test_all_keys_of_a_run_share_one_slot_and_one_prefix(redis_store: EmbeddedStore) -> None:
    async def scenario(client: Redis) -> None:
        uid = fresh_uid()
        ledger = await started(lambda epoch: RedisLedger(client, uid, epoch))
        await step(ledger, "3", 0, 2)
        await ledger.open(opening("4"), config=CONFIG, job="r-c4-f1-a0")
        await ledger.save_snapshot((await ledger.read())[0].id, b"x", version="0")

        keys = {key async for key in client.scan_iter(match=f"qtt:{{{uid}}}:*")}

        assert {key.rpartition("}:")[2] for key in keys} == {
            "log", "cfg", "meta", "open", "done", "head", "top", "curve:3", "snap",
        }  # fmt: skip
        entry = json.loads(await client.hget(ledger.key("open"), "4"))
        assert (entry["from"], entry["to"], entry["attempt"]) == (0, 1, 0)
        assert (entry["job"], entry["reserved"]) == ("r-c4-f1-a0", 1500)
        assert await client.hgetall(ledger.key("head")) == {"3": "2"}
        assert await client.zscore(ledger.key("top"), "3") == 0.75
        assert await client.lrange(ledger.key("curve:3"), 0, -1) == [
            "[1,0.5,0.25]",
            "[2,0.75,0.25]",
        ]
        assert set(await client.hgetall(ledger.key("done"))) == {"run", "c3-f1", "c3-f2"}

    on(redis_store, scenario)


@pytest.mark.parametrize("script", sorted(LUA.glob("*.lua")), ids=lambda path: path.stem)
def test_scripts_touch_only_declared_keys(script: Path) -> None:
    """A key built inside a script would lie in another slot of a cluster."""
    text = re.sub(r"--.*", "", script.read_text())
    declared = set(re.findall(r"(\w+)(?=[,\s\w]*=\s*KEYS\[1\])", text))
    declared |= set(re.findall(r"KEYS\[[^\]]+\]", text))
    names = re.search(r"local ([\w, ]+) = KEYS\[1\]", text)
    if names:
        declared |= {name.strip() for name in names.group(1).split(",")}
    declared |= {"head", "top", "curve"} if "KEYS[5], KEYS[6], KEYS[7]" in text else set()

    used = re.findall(r"redis\.call\('\w+', ([^,)]+)", text)

    assert used
    assert set(used) <= declared


def test_every_script_ships_with_the_package() -> None:
    assert {path.stem for path in LUA.glob("*.lua")} == {
        "open", "commit", "note", "fence", "snap", "lifetime", "adopt",
    }  # fmt: skip


def test_runs_are_listed_with_the_latest_first(redis_store: EmbeddedStore) -> None:
    async def scenario(client: Redis) -> None:
        uid = fresh_uid()
        ledger = await started(lambda epoch: RedisLedger(client, uid, epoch))
        entry = next(e for e in await find_runs(client) if e.uid == uid)
        assert (entry.name, entry.closed) == ("digits", "")
        assert entry.seen_at > 1_700_000_000

        await ledger.note(Close(reason="Stopped"), key="close")
        entry = next(e for e in await find_runs(client) if e.uid == uid)
        assert entry.closed == "Stopped"

    on(redis_store, scenario)


def test_every_epoch_is_above_the_last(redis_store: EmbeddedStore) -> None:
    async def scenario(client: Redis) -> None:
        first = await next_epoch(client)

        assert await next_epoch(client) > first

    on(redis_store, scenario)


def test_the_embedded_server_needs_no_advice_and_a_careless_one_gets_it(tmp_path: Path) -> None:
    async def scenario(client: Redis) -> None:
        assert await check_store(client) == []
        await client.config_set("appendfsync", "everysec")
        await client.config_set("maxmemory-policy", "allkeys-lru")

        advice = await check_store(client)

        assert len(advice) == 2
        assert "everysec" in advice[0]
        assert "allkeys-lru" in advice[1]

    with EmbeddedStore(tmp_path) as store:
        on(store, scenario)


# --- errors ---


def test_nobody_listening_is_an_unavailable_store_named_without_its_password() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    with pytest.raises(StoreUnavailableError) as caught:
        asyncio.run(connect(f"redis://user:secret@127.0.0.1:{port}/0"))

    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "secret" not in str(caught.value)


@contextmanager
def deaf_server() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    kept.append(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in kept:
            connection.close()


def test_a_server_that_never_answers_is_an_unavailable_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qtt_operator.redis_client.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("qtt_operator.redis_client.CONNECT_SECONDS", 0.2)

    with deaf_server() as port, pytest.raises(StoreUnavailableError, match=str(port)):
        asyncio.run(connect(f"redis://127.0.0.1:{port}"))


@pytest.mark.parametrize(
    "url", ["localhost:6379", "http://localhost", "redis://host:port", "", "redis://u:secret@h:x/1"]
)
def test_an_unusable_address_is_the_users_fault(url: str) -> None:
    with pytest.raises(SpecError) as caught:
        client_of_url(url)

    assert "--redis-url" in str(caught.value)
    assert "secret" not in str(caught.value)


UNAVAILABLE = {
    "loading": "LOADING Redis is loading the dataset in memory",
    "replica": "READONLY You can't write against a read only replica.",
    "disk": "MISCONF Errors writing to the AOF file: No space left on device",
    "disk, seen inside a script": "ERR Error running script: @user_script:9: -MISCONF Errors",
    "memory": "OOM command not allowed when used memory > 'maxmemory'.",
    "no password": "NOAUTH Authentication required.",
    "no permission": "NOPERM this user has no permissions to run the 'evalsha' command",
}


@pytest.mark.parametrize(
    ("answer", "error"),
    [pytest.param(text, StoreUnavailableError, id=name) for name, text in UNAVAILABLE.items()]
    + [pytest.param("WRONGTYPE Operation against a key", StoreError, id="another's key")],
)
def test_every_refusal_of_the_server_becomes_one_of_our_errors(
    answer: str, error: type[StoreError]
) -> None:
    async def scenario() -> None:
        server = await asyncio.start_server(refuse_scripts(answer), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = client_of_url(f"redis://127.0.0.1:{port}?protocol=2")
        try:
            with pytest.raises(error) as caught:
                await RedisLedger(client, "u", 1).fence()
        finally:
            await client.aclose()
            server.close()
            await server.wait_closed()

        assert type(caught.value) is error
        assert answer.partition(" ")[2].rstrip(".") in str(caught.value)
        assert str(port) in str(caught.value)

    asyncio.run(scenario())


def refuse_scripts(
    answer: str,
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A server that greets, and answers every script with one error."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while header := await reader.readline():
            words = []
            for _ in range(int(header[1:])):
                await reader.readline()
                words.append((await reader.readline()).strip().upper())
            reply = {b"EVALSHA": f"-{answer}", b"PING": "+PONG"}.get(words[0], "+OK")
            writer.write(reply.encode() + b"\r\n")
        writer.close()

    return talk


def test_a_key_of_another_type_is_a_store_error(redis_store: EmbeddedStore) -> None:
    async def scenario(client: Redis) -> None:
        ledger = RedisLedger(client, fresh_uid(), 1)
        await client.set(ledger.key("log"), "not a stream")

        with pytest.raises(StoreError):
            await ledger.note(run_event(), key="run")

    on(redis_store, scenario)


def test_a_rotated_password_is_read_at_the_next_connection(
    redis_store: EmbeddedStore, tmp_path: Path
) -> None:
    """The file is a mounted Secret; the address holds the user's name and no password."""
    file = tmp_path / "password"

    async def scenario(admin: Redis) -> None:
        async def set_password(password: str) -> None:
            rules = ["reset", "on", f">{password}", "~qtt:*", "+@all"]
            await admin.execute_command("ACL", "SETUSER", "rotated", *rules)

        await set_password("first")
        file.write_text("first\n")
        client = client_of_url(f"unix://rotated@{redis_store.socket}", str(file))
        ledger = RedisLedger(client, fresh_uid(), 1)
        try:
            assert await ledger.fence() is Reply.OK
            await set_password("second")
            await client.connection_pool.disconnect()
            with pytest.raises(StoreUnavailableError, match="invalid username-password"):
                await ledger.fence()
            file.write_text("second")
            assert await ledger.fence() is Reply.OK
            file.unlink()
            await client.connection_pool.disconnect()
            with pytest.raises(StoreUnavailableError, match="No such file"):
                await ledger.fence()
        finally:
            await client.aclose()
            await admin.execute_command("ACL", "DELUSER", "rotated")

    on(redis_store, scenario)


def test_options_of_tls_come_with_the_address(tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    client = client_of_url(f"rediss://me@db.example:6380/0?ssl_ca_certs={ca}", str(ca))
    known = client.connection_pool.connection_kwargs

    assert known["ssl_ca_certs"] == str(ca)
    assert known["credential_provider"] is not None
    assert "username" not in known


def test_addresses_are_shown_without_credentials() -> None:
    assert address_of(client_of_url("redis://me:secret@db.example:7000/3")) == "db.example:7000"
    assert address_of(client_of_socket("/run/x")) == "unix:///run/x"


def test_a_commit_is_the_same_event_after_the_wire(redis_store: EmbeddedStore) -> None:
    """Floats come back bit by bit: equality of two runs is claimed on them."""

    async def scenario(client: Redis) -> None:
        ledger = await started(lambda epoch: RedisLedger(client, uid, epoch))
        await ledger.open(opening(), config=CONFIG, job="j")
        awkward = ((1, 0.1 + 0.2, 1e-9),)
        done = Done(c="3", to=1, a=0, state="ok", epochs=awkward, dev=1 / 3, inert=("x", "y"), eb=8)

        await ledger.commit(done)
        read = (await ledger.read())[-1]

        assert isinstance(read, Done)
        assert (read.epochs, read.dev, read.inert) == (awkward, 1 / 3, ("x", "y"))

    uid = fresh_uid()
    on(redis_store, scenario)


def test_results_of_a_job_of_150_epochs_fit(redis_store: EmbeddedStore) -> None:
    async def scenario(client: Redis) -> None:
        ledger = await started(lambda epoch: RedisLedger(client, uid, epoch))
        await ledger.open(opening(to=150), config=CONFIG, job="j")

        assert (await ledger.commit(result(to=150)))[0] is Reply.OK
        assert fold(await ledger.read()).steps == 150

    uid = fresh_uid()
    on(redis_store, scenario)

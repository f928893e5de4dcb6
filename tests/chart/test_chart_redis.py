"""The user that the bundled Redis makes can do the operator's work, and no more."""

from __future__ import annotations

import asyncio
import re
import subprocess
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError
from value_sets import Object, one

from qtt_core.ledger.file import Ledger
from qtt_core.ledger.fold import fold
from qtt_core.testing.ledger_contract import (
    CONFIG,
    LedgerContract,
    Writer,
    opening,
    run_event,
    started,
    step,
)
from qtt_operator import ledger_transfer, redis_client, redis_ledger
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.redis_server import server_binary
from qtt_operator.store import EmbeddedStore

Render = Callable[..., list[Object]]
LUA = Path(redis_ledger.__file__).parent / "lua"
PASSWORD = "only-here"


def commands(chart: Path) -> list[str]:
    return (chart / "files" / "redis-commands.txt").read_text().split()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, chart: Path) -> Iterator[EmbeddedStore]:
    """A server with the chart's user beside the default one."""

    async def add_user(client: Redis) -> None:
        rules = ["on", f">{PASSWORD}", "~qtt:*", *commands(chart)]
        await client.execute_command("ACL", "SETUSER", "quicktune", "reset", *rules)
        await client.aclose()

    with EmbeddedStore(tmp_path_factory.mktemp("acl")) as server:
        asyncio.run(add_user(server.client()))
        yield server


def as_user(store: EmbeddedStore, scenario: Callable[[Redis], Awaitable[None]]) -> None:
    """Run a scenario with a client of the chart's user."""

    async def main() -> None:
        client = Redis(
            unix_socket_path=store.socket, username="quicktune", password=PASSWORD,
            decode_responses=True,
        )  # fmt: skip
        try:
            await scenario(client)
        finally:
            await client.aclose()

    asyncio.run(main())


def refusals(store: EmbeddedStore) -> list[str]:
    """What the server refused so far, and forget it."""

    async def look() -> list[str]:
        client = store.client()
        found = [entry["object"] for entry in await client.acl_log()]
        await client.acl_log_reset()
        await client.aclose()
        return found

    return asyncio.run(look())


class TestTheLedgerUnderTheChartsUser(LedgerContract):
    @pytest.fixture(autouse=True)
    def _store(self, store: EmbeddedStore) -> Iterator[None]:
        self.store = store
        yield
        assert refusals(store) == []

    def play(self, scenario: Callable[[Writer], Awaitable[None]]) -> None:
        uid = uuid.uuid4().hex

        async def main(client: Redis) -> None:
            await scenario(lambda epoch: RedisLedger(client, uid, epoch))

        as_user(self.store, main)


def test_the_controllers_own_calls_are_allowed(store: EmbeddedStore) -> None:
    async def scenario(client: Redis) -> None:
        await redis_client.raise_epoch(client, 3)
        assert await redis_client.highest_epoch(client) == 3
        assert await redis_client.syncs_always(client)
        assert await redis_client.check_store(client) == []
        await redis_client.server_clock_offset(client)
        await redis_client.find_runs(client)

    as_user(store, scenario)

    assert refusals(store) == []


def test_a_ledger_may_be_exported_and_imported(store: EmbeddedStore) -> None:
    run = replace(run_event(), id="1-0")
    ledger = Ledger(
        name=run.name, uid=uuid.uuid4().hex, configs={"3": CONFIG},
        events=[run, replace(opening(), id="2-0")], hub={"cards": []},
    )  # fmt: skip

    async def scenario(client: Redis) -> None:
        assert await ledger_transfer.put_whole(client, ledger, "x")
        assert await ledger_transfer.find_run_in(client, ledger.uid) == ledger.uid
        assert await ledger_transfer.read_whole(client, ledger.uid) == ledger

    as_user(store, scenario)

    assert refusals(store) == []


def test_every_command_of_our_scripts_is_in_the_list(chart: Path) -> None:
    scripts = "".join(path.read_text() for path in LUA.glob("*.lua"))
    used = {word.lower() for word in re.findall(r"redis\.call\('([A-Za-z]+)'", scripts)}

    assert used <= {word.removeprefix("+") for word in commands(chart)}


FORBIDDEN = {
    "another key": ("SET", "other", "1"),
    "all keys": ("KEYS", "*"),
    "the end of all data": ("FLUSHALL",),
    "settings": ("CONFIG", "SET", "appendonly", "no"),
    "users": ("ACL", "LIST"),
    "the server's end": ("SHUTDOWN", "NOSAVE"),
    "another server's copy": ("REPLICAOF", "host", "6379"),
    "messages": ("PUBLISH", "qtt:x", "1"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_user_may_not_touch(what: str, store: EmbeddedStore) -> None:
    async def scenario(client: Redis) -> None:
        with pytest.raises(NoPermissionError):
            await client.execute_command(*FORBIDDEN[what])

    as_user(store, scenario)
    refusals(store)


@contextmanager
def redis_from(render: Render, tmp_path: Path) -> Iterator[Path]:
    """The pod's own start script with its folders here and a server that only prints its words."""
    container = one(render("default"), "StatefulSet", "quicktune-operator-redis")["spec"][
        "template"
    ]["spec"]["containers"][0]
    script = container["args"][0]
    for name in ("etc/quicktune/redis", "run/quicktune", "bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc/quicktune/redis/password").write_text(f"{PASSWORD}\n")
    fake = tmp_path / "bin" / "redis-server"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    fake.chmod(0o755)
    script = script.replace("/etc/quicktune", f"{tmp_path}/etc/quicktune").replace(
        "/run/quicktune", f"{tmp_path}/run/quicktune"
    )
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    subprocess.run(["sh", "-ec", script], check=True, env={"PATH": path})
    yield tmp_path


def test_the_pods_script_makes_the_user_from_the_mounted_password(
    render: Render, tmp_path: Path, store: EmbeddedStore
) -> None:
    with redis_from(render, tmp_path) as folder:
        words = (folder / "words").read_text().splitlines()
        default, ours = (folder / "run/quicktune/users.acl").read_text().splitlines()

    assert words[words.index("--appendfsync") + 1] == "always"
    assert words[words.index("--appendonly") + 1] == "yes"
    assert words[words.index("--maxmemory-policy") + 1] == "noeviction"
    assert default == "user default off resetpass ~* &* +@all"
    assert PASSWORD not in ours

    async def made_the_same(client: Redis) -> None:
        rules = ours.removeprefix("user quicktune ").split()
        await client.execute_command("ACL", "SETUSER", "from-script", "reset", *rules)
        users = dict(line.split(" ", 2)[1:] for line in await client.execute_command("ACL", "LIST"))
        await client.execute_command("ACL", "DELUSER", "from-script")
        await client.aclose()
        assert users["from-script"] == users["quicktune"]

    asyncio.run(made_the_same(store.client()))


def test_a_given_secret_takes_the_place_of_the_generated_one(render: Render) -> None:
    values = {"redis": {"existingSecret": {"name": "mine", "key": "pw"}}}
    objects = render(values)

    assert [o for o in objects if o["kind"] == "Secret"] == []
    for kind, name in (
        ("StatefulSet", "quicktune-operator-redis"),
        ("Deployment", "quicktune-operator"),
    ):
        volumes = one(objects, kind, name)["spec"]["template"]["spec"]["volumes"]
        (secret,) = (v["secret"] for v in volumes if "secret" in v)
        assert secret["secretName"] == "mine"
        assert secret["items"] == [{"key": "pw", "path": "password"}]


@contextmanager
def redis_of_the_pod(render: Render, folder: Path) -> Iterator[Redis]:
    """A real server started by the pod's own script, its folders here; killed at the end."""
    objects = render("default")
    pod = one(objects, "StatefulSet", "quicktune-operator-redis")["spec"]["template"]["spec"]
    script = pod["containers"][0]["args"][0]
    for name in ("/etc/quicktune", "/run/quicktune", "/data"):
        script = script.replace(name, f"{folder}{name}")
        Path(f"{folder}{name}").mkdir(parents=True, exist_ok=True)
    (folder / "etc/quicktune/redis").mkdir(exist_ok=True)
    (folder / "etc/quicktune/redis/password").write_text(PASSWORD)
    socket = folder / "s"
    socket.unlink(missing_ok=True)
    server = f"{server_binary()} --port 0 --unixsocket {socket}"
    script = script.replace("exec redis-server", f"exec {server}")
    process = subprocess.Popen(["sh", "-ec", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not socket.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    try:
        yield Redis(
            unix_socket_path=str(socket), username="quicktune", password=PASSWORD,
            decode_responses=True,
        )  # fmt: skip
    finally:
        process.kill()
        process.wait()


def test_what_the_user_wrote_is_there_after_the_server_was_killed(render: Render) -> None:
    """Redis 8.0 reads its file as the default user, whose rights it checks; 6.2 does not yet."""

    async def write(client: Redis) -> None:
        await step(await started(lambda epoch: RedisLedger(client, "u", epoch)), "3", 0, 1)
        await client.aclose()

    async def read(client: Redis) -> int:
        found = fold(await RedisLedger.reader(client, "u").read()).steps
        await client.aclose()
        return found

    with tempfile.TemporaryDirectory() as name:  # a socket's path may be no longer than 107 bytes
        with redis_of_the_pod(render, Path(name)) as client:
            asyncio.run(write(client))
        with redis_of_the_pod(render, Path(name)) as client:
            assert asyncio.run(read(client)) == 1

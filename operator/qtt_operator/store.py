"""The embedded store: a real Redis server for runs on one machine, and the lock of such a run.

`EmbeddedStore` starts a server as a child of the runner, with its append-only file in the state
folder. It dies with the runner, also by `kill -9`; what survives anyway is ended before the next
start, so that one file never has two servers. `open_reader` serves the reading verbs beside a live
run and after it. Knows no events; `redis_ledger` does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Self

from redis.asyncio import Redis

from qtt_core.errors import RunLockedError, StoreError, StoreUnavailableError, VolumeError
from qtt_operator.redis_client import client_of_socket, client_of_url, connect
from qtt_operator.redis_server import (
    FILES,
    STOP_SECONDS,
    answers,
    check_format,
    command,
    end_child,
    explain_end,
    is_server,
    server_binary,
    shut_down,
    wait_until,
)

__all__ = ["EmbeddedStore", "RunLock", "client_of_url", "connect", "open_reader", "server_binary"]

SOCKET_BYTES = 100
"""A socket's path holds 107 bytes (103 on macOS); a longer one goes into a temporary folder."""

READY_SECONDS = 120.0
"""A long file takes a while to load; a server that died is noticed at once."""

LOG_BYTES = 1_000_000


class RunLock:
    """At most one process on this machine runs the run of a state folder; ends with the process."""

    def __init__(self, state_dir: Path) -> None:
        self.path = Path(state_dir) / "lock"
        self._file: int | None = None

    def acquire(self) -> Self:
        """Take the lock.

        Raises: RunLockedError naming the process that holds it; VolumeError if the folder cannot
        be written.
        """
        with _writing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _flock(file):
            holder = os.pread(file, 32, 0).decode(errors="replace").strip()
            os.close(file)
            raise RunLockedError(
                f"{self.path.parent}: process {holder or 'unknown'} is running this run; "
                "wait for it or stop it"
            )
        with _writing(self.path.parent):
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
        self._file = file
        return self

    def release(self) -> None:
        """Give the lock back; the file stays, since removing it would let two in."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_error: object) -> None:
        self.release()


class EmbeddedStore:
    """A Redis server of our own, with its file in `<state_dir>/redis`.

    `start` from a thread that lives as long as the run (the main one): the kernel ties the server's
    life to the thread that started it. Only the holder of the run's lock may start one.
    """

    def __init__(self, state_dir: Path) -> None:
        self.folder = Path(state_dir).absolute() / "redis"
        self.log = self.folder / "redis.log"
        self._log_start = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._temporary: Path | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id, None while it does not run."""
        return self._child.pid if self._child is not None and self.is_alive() else None

    @property
    def socket(self) -> str:
        """The server's Unix socket; empty before the first `start`."""
        return _read(self.folder / "socket")

    def start(self) -> Self:
        """Start the server, after ending one that outlived its runner; wait until it answers.

        Raises: StoreError (no server to start, a damaged file), StoreUnavailableError (it does not
        answer), VolumeError (disk full or not writable).
        """
        if self.is_alive():
            return self
        binary = server_binary()
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = self._server_lock()
        try:
            check_format(self.folder, binary)
            self._spawn(binary, lock)
        finally:
            os.close(lock)  # the server holds its own copy: the lock lives exactly as long as it
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def is_alive(self) -> bool:
        """Whether our server runs."""
        return self._child is not None and self._child.poll() is None

    def failure(self) -> StoreError | VolumeError:
        """Why a server that died did so: its own last words, a full disk by its name."""
        return explain_end(self.folder, self._words())

    def restart(self) -> Self:
        """Start the server again after it died; clients of the old one reconnect by themselves.

        Raises: as `start`.
        """
        self._end()
        return self.start()

    def stop(self) -> None:
        """End the server; everything acknowledged is on disk already."""
        self._end()
        (self.folder / "socket").unlink(missing_ok=True)
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def client(self) -> Redis:
        """A client of this server; it survives `restart`. Close it before its event loop ends."""
        return client_of_socket(self.socket)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_error: object) -> None:
        self.stop()

    # --- starting and ending ---

    def _server_lock(self) -> int:
        """The file that a server holds locked while it lives, locked by us: no server is alive.

        The lock belongs to the open file, not to a process, and the server inherits it; so it says
        the truth after any crash. Where a network file system forgets it, the socket still tells.
        """
        file = os.open(self.folder / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

        def is_ours() -> bool:
            return _flock(file) and not answers(self.socket, self.folder)

        if not is_ours():
            self._end_orphan()
            if not wait_until(is_ours, STOP_SECONDS):
                os.close(file)
                raise StoreUnavailableError(
                    f"{self.folder}: Redis process {_read(self.folder / 'pid') or 'unknown'} of an "
                    "earlier run holds the file and does not end; kill it and try again"
                )
        return file

    def _end_orphan(self) -> None:
        """Ask a server that outlived its runner to end, then insist."""
        if answers(self.socket, self.folder):
            shut_down(self.socket)
        pid = _read(self.folder / "pid")
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not pid.isdecimal() or wait_until(lambda: not is_server(int(pid)), STOP_SECONDS):
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), number)

    def _spawn(self, binary: Path, lock: int) -> None:
        with _writing(self.folder):
            path = self._socket_path()
            (self.folder / "socket").write_text(path)
            if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
                self.log.unlink()
            log = self.log.open("ab")
        with log:
            self._log_start = log.tell()
            self._child = subprocess.Popen(  # noqa: S603  # our own words, no shell
                command(binary, path), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip
        # a session of its own: Ctrl-C at the terminal drains the run, it must not end the store
        with _writing(self.folder):
            (self.folder / "pid").write_text(str(self._child.pid))

    def _socket_path(self) -> str:
        """Beside the file where the path fits, else in a temporary folder only we may enter."""
        path = self.folder / "sock"
        if len(os.fsencode(path)) > SOCKET_BYTES or not _can_bind(path):
            if self._temporary is None or not self._temporary.is_dir():
                self._temporary = Path(tempfile.mkdtemp(prefix="qtt-"))
            path = self._temporary / "sock"
        path.unlink(missing_ok=True)
        return str(path)

    def _wait_until_ready(self) -> None:
        child, path = self._child, self.socket
        assert child is not None
        if not wait_until(
            lambda: child.poll() is not None or answers(path, self.folder), READY_SECONDS
        ):
            raise StoreUnavailableError(
                f"Redis (process {child.pid}) did not answer within {READY_SECONDS:.0f} s; "
                f"see {self.log}"
            )
        if child.poll() is not None:
            raise self.failure()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            if child.poll() is None:
                shut_down(self.socket)
            end_child(child)

    def _words(self) -> str:
        """What the server of the last start wrote."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode(errors="replace")
        except OSError:
            return ""


@contextlib.contextmanager
def open_reader(state_dir: Path) -> Iterator[Redis]:
    """A client for reading a run's ledger, whether the run is going on, finished or crashed.

    A living server is shared. Otherwise a server is started for the moment on a *copy* of the file:
    a reader never writes into the state folder, and a runner may start at any time. Close the
    client before its event loop ends.

    Raises: StoreError if the folder holds no ledger; what `EmbeddedStore.start` raises.
    """
    folder = Path(state_dir).absolute() / "redis"
    path = _read(folder / "socket")
    if answers(path, folder):
        yield client_of_socket(path)
        return
    if not any((folder / name).exists() for name in FILES):
        raise StoreError(f"{state_dir}: no ledger here; was the run ever started?")
    with tempfile.TemporaryDirectory(prefix="qtt-read-") as temporary:
        copy = Path(temporary) / "redis"
        copy.mkdir(mode=0o700)
        with _writing(copy):
            for name in FILES:
                if (folder / name).is_dir():
                    shutil.copytree(folder / name, copy / name)
                elif (folder / name).exists():
                    shutil.copyfile(folder / name, copy / name)
        with EmbeddedStore(Path(temporary)) as store:
            yield store.client()


def _flock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _can_bind(path: Path) -> bool:
    """Whether this folder's file system holds sockets: some network and shared ones do not."""
    trial = path.with_name("sock.trial")
    trial.unlink(missing_ok=True)
    with socket(AF_UNIX) as probe:
        try:
            probe.bind(str(trial))
        except OSError:
            return False
    trial.unlink(missing_ok=True)
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a failed write below the state folder into VolumeError."""
    try:
        yield
    except OSError as error:
        raise VolumeError(f"{folder} cannot be written: {error.strerror or error}") from error

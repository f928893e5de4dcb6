"""Whole ledgers out of a store and back into one: what `qtt ledger` and `qtt metatrain` move.

An imported ledger is a record, to read and to learn from. What only a running run needs (open
decisions, deduplication keys) is not made up for it, so it is marked and nothing can be opened on
it: its checkpoints are elsewhere.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis

from qtt_core.errors import Fault, LedgerError, SpecError, StoreError
from qtt_core.ledger.events import Open, Run, is_pseudo, to_fields
from qtt_core.ledger.file import Ledger
from qtt_core.ledger.fold import LedgerState, fold
from qtt_core.ledger.reply import Reply
from qtt_core.steps import canonical_json
from qtt_operator.redis_client import RUNS_KEY, RunEntry, find_runs, run_key, store_errors
from qtt_operator.redis_ledger import RedisLedger, call_script, facts_of

KEYS = ("log", "meta", "cfg", "refs")
PAGE = 500
"""Events a round trip."""

DRAFT_SECONDS = 3600
"""What an import that broke off leaves in the store, and how long."""

IMPORTED = "Imported"
"""In `meta.closed` of a run that had not ended when it was exported: the scripts open no more."""


async def read_whole(client: Redis, uid: str) -> Ledger:
    """A run's ledger with what the store keeps beside it; without events where there is no run.

    Raises: StoreUnavailableError; LedgerError; NewerSchemaError.
    """
    ledger = RedisLedger.reader(client, uid)
    events = await ledger.read()
    configs = await ledger.configs()  # after the events: every opened one is then in it
    refs = await ledger.references()
    name = next((event.name for event in events if isinstance(event, Run)), "")
    return Ledger(
        name=name, uid=uid, configs=configs, events=events,
        hub=json.loads(refs["hub"]) if "hub" in refs else None, space=refs.get("space", ""),
    )  # fmt: skip


async def find_run_in(client: Redis, text: str) -> str:
    """The uid of the one run that is called so: its uid, NAME or NAMESPACE/NAME.

    Raises: SpecError that lists the runs there are; StoreUnavailableError.
    """
    entries = await find_runs(client)
    found = [entry for entry in entries if text in _names(entry)]
    if len(found) == 1:
        return found[0].uid
    there = ", ".join(sorted(f"{_names(entry)[-1]} ({entry.uid})" for entry in found or entries))
    remedy = "give one of these by its uid" if found else "no run of this Redis is called so"
    raise SpecError([Fault("RUN", text, f"{remedy}: {there or 'it holds none'}")])


def _names(entry: RunEntry) -> list[str]:
    namespace = entry.facts.get("namespace")
    names = [entry.uid, entry.name]
    return [*names, f"{namespace}/{entry.name}"] if namespace else names


def check_whole(ledger: Ledger, where: str) -> LedgerState:
    """What the events add up to. Raises: SpecError where they are no ledger of one run."""
    try:
        state = fold(ledger.events)
    except LedgerError as error:
        remedy = "its events contradict each other; export it again"
        raise SpecError([Fault(where, str(error), remedy)]) from error
    if state.run is None:
        raise SpecError([Fault(where, "no event `run`", "export it once the run has begun")])
    opened = {e.c for e in ledger.events if isinstance(e, Open) and not is_pseudo(e.c)}
    missing = sorted(opened - set(ledger.configs), key=int)
    if missing:
        remedy = "the header lacks them; export it again"
        raise SpecError([Fault(where, f"configurations {', '.join(missing)}", remedy)])
    return state


async def put_whole(client: Redis, ledger: Ledger, where: str) -> bool:
    """Write a checked ledger into a store, all of it or nothing; False if it is there already.

    `where`: the file, for messages. Raises: SpecError if a run of its uid holds anything else;
    StoreUnavailableError.
    """
    state = check_whole(ledger, where)
    if await _holds(client, ledger, where):
        return False
    draft = f"import:{secrets.token_hex(8)}:"
    await _draft(client, ledger, state, draft)
    names = [run_key(ledger.uid, f"{prefix}{name}") for prefix in ("", draft) for name in KEYS]
    with store_errors(client):
        word, _ = await call_script(client, "adopt", names, ())
        if word == Reply.OK:
            await client.zadd(RUNS_KEY, {ledger.uid: ledger.events[-1].time})
    if word == Reply.UNKNOWN:
        raise StoreError("the store lost the draft of the import; import it again")
    if word == Reply.DUP:  # somebody else was faster
        return not await _holds(client, ledger, where)
    return True


async def _holds(client: Redis, ledger: Ledger, where: str) -> bool:
    """Whether the store holds this very ledger. Raises: SpecError if it holds another one."""
    there = await read_whole(client, ledger.uid)
    if not there.events:
        return False
    files = references_json(ledger)
    bare = files and there.hub is None and not there.space
    if bare:  # a store may know less of the run's files than a file of it
        there = replace(there, hub=ledger.hub, space=ledger.space)
    refuse_another(there, ledger, where)
    if bare:
        await RedisLedger.reader(client, ledger.uid).refer(files)
    return True


def refuse_another(there: Ledger, ledger: Ledger, where: str) -> None:
    """Raises: SpecError where a run is there already and differs from a file's."""
    if there.lines() == ledger.lines():
        return
    same = sum(1 for a, b in zip(there.events, ledger.events, strict=False) if a == b)
    what = f"run {there.name} ({there.uid}) of {len(there.events)} events"
    remedy = (
        f"is there already and differs from the file's {len(ledger.events)} events after {same}; "
        "nothing was changed; import it into another place"
    )
    raise SpecError([Fault(where, what, remedy)])


async def _draft(client: Redis, ledger: Ledger, state: LedgerState, draft: str) -> None:
    """Everything under names of its own, which expire if the import breaks off."""
    log, meta, cfg, refs = (run_key(ledger.uid, f"{draft}{name}") for name in KEYS)
    configs = {c: canonical_json(config) for c, config in ledger.configs.items()}
    with store_errors(client):
        for first in range(0, len(ledger.events), PAGE):
            pipe = client.pipeline(transaction=False)
            for event in ledger.events[first : first + PAGE]:
                fields: dict[Any, Any] = dict(to_fields(event))
                pipe.xadd(log, fields, id=event.id)
            pipe.expire(log, DRAFT_SECONDS)
            await pipe.execute()
        pipe = client.pipeline(transaction=False)
        hashes = ((meta, _meta(state)), (cfg, configs), (refs, references_json(ledger)))
        for key, values in hashes:
            if values:
                wire: dict[Any, Any] = dict(values)
                pipe.hset(key, mapping=wire)
                pipe.expire(key, DRAFT_SECONDS)
        await pipe.execute()


def references_json(ledger: Ledger) -> dict[str, str]:
    """What the store keeps beside a ledger (`RedisLedger.refer`)."""
    hub = {} if ledger.hub is None else {"hub": json.dumps(dict(ledger.hub))}
    return hub | ({"space": ledger.space} if ledger.space else {})


def _meta(state: LedgerState) -> dict[str, str]:
    assert state.run is not None  # checked
    closed = state.closed.reason if state.closed is not None else IMPORTED
    return {
        **facts_of(state.run), "epoch": str(state.epoch), "closed": closed,
        "createdAt": state.run.id.split("-")[0], "imported": "1",
    }  # fmt: skip

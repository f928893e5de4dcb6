"""`qtt ledger export` and `import`: a run's whole ledger as a file, and back."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from pathlib import Path

from qtt_core.errors import Fault, NewerSchemaError, SpecError
from qtt_core.ledger.events import Run
from qtt_core.ledger.file import Ledger, parse_ledger, read_ledger
from qtt_operator.cli import Outcome
from qtt_operator.ledger_transfer import check_whole, put_whole, refuse_another
from qtt_operator.record import find_ledger, read_ledger_of
from qtt_operator.redis_client import connect, redacted
from qtt_operator.run_folder import RunFolder, write_atomically
from qtt_operator.store import EmbeddedStore, RunLock

_WORD = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
"""What may become part of a path or a key."""


def export_verb(arguments: argparse.Namespace) -> Outcome:
    """`qtt ledger export RUN FILE`: a header, then every event."""
    found = asyncio.run(find_ledger(arguments.run, arguments.state_dir, arguments.redis_url))
    text = "\n".join(found.lines()) + "\n"
    if arguments.file == "-":
        return Outcome(text=text)
    write_atomically(Path(arguments.file), text)
    return Outcome(text=f"{len(found.events)} events to {arguments.file}\n")


def import_verb(arguments: argparse.Namespace) -> Outcome:
    """`qtt ledger import FILE`: into a folder of its own here, or into a Redis.

    Raises: SpecError for a file that is none, or a run that is there and differs; StoreError.
    """
    ledger = _read(arguments.file)
    name = arguments.name or ledger.name
    for field, text in (("name", name), ("uid", ledger.uid)):
        if not _WORD.fullmatch(text):
            raise SpecError([Fault(f"{arguments.file}: {field}", text, "use letters, digits, -")])
    check_whole(ledger, arguments.file)
    if arguments.redis_url is not None:
        place = redacted(arguments.redis_url)
        written = asyncio.run(_into_redis(arguments.redis_url, ledger, arguments.file))
    else:
        folder = RunFolder(path=arguments.state_dir / name)
        place = str(folder.path)
        written = _into_folder(folder, ledger, arguments.file)
    told = f"{len(ledger.events)} events of run {ledger.name}"
    if not written:
        return Outcome(text=f"{told} are in {place} already; nothing to do\n")
    return Outcome(text=f"{told} to {place}\n")


def _read(file: str) -> Ledger:
    try:
        if file == "-":
            return parse_ledger(sys.stdin.read().splitlines(), "standard input")
        return read_ledger(Path(file))
    except FileNotFoundError as error:
        raise SpecError([Fault("FILE", file, "no such file")]) from error
    except NewerSchemaError as error:
        remedy = "was written by a newer version; upgrade this one"
        raise SpecError([Fault(file, str(error), remedy)]) from error


async def _into_redis(url: str, ledger: Ledger, where: str) -> bool:
    client = await connect(url)
    try:
        return await put_whole(client, ledger, where)
    finally:
        await client.aclose()


def _into_folder(folder: RunFolder, ledger: Ledger, where: str) -> bool:
    """The folder of a local run without checkpoints; its uid comes last, and makes it one."""
    if _is_there(folder, ledger, where):
        return False
    with RunLock(folder.path):
        if _is_there(folder, ledger, where):
            return False
        with EmbeddedStore(folder.path) as store:
            asyncio.run(_into_store(store, ledger, where))
        write_atomically(folder.facts_file, json.dumps(_facts(folder, ledger), indent=1))
        write_atomically(folder.uid_file, ledger.uid + "\n")
    return True


async def _into_store(store: EmbeddedStore, ledger: Ledger, where: str) -> None:
    client = store.client()
    try:
        await put_whole(client, ledger, where)
    finally:
        await client.aclose()


def _is_there(folder: RunFolder, ledger: Ledger, where: str) -> bool:
    """Whether the folder holds this very ledger. Raises: SpecError if it holds another run."""
    uid = folder.read_uid()
    if uid is None:
        return False
    if uid != ledger.uid:
        remedy = f"holds another run ({uid}); give this one another name: --name NAME"
        raise SpecError([Fault(where, str(folder.path), remedy)])
    refuse_another(asyncio.run(read_ledger_of(folder)), ledger, where)
    return True


def _facts(folder: RunFolder, ledger: Ledger) -> dict[str, object]:
    """What the reading verbs need; a run that others trained has no images here."""
    run = next(event for event in ledger.events if isinstance(event, Run))
    return {
        "name": ledger.name, "uid": ledger.uid, "root": str(folder.path.absolute()),
        "data": "", "weights": "", "embedded": True, "spec": dict(run.spec),
        "hub": None if ledger.hub is None else dict(ledger.hub),
        "space_definition": ledger.space, "imported": True,
    }  # fmt: skip

"""A run as read from outside: its ledger, its facts, its status. Never writes.

Works beside a runner that is going on, after the end, and after a crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qtt_core.errors import Fault, SpecError
from qtt_core.ledger.events import Event
from qtt_core.ledger.file import Ledger
from qtt_core.ledger.fold import LedgerState, fold
from qtt_core.steps import Config, Metric
from qtt_operator.ledger_transfer import find_run_in, read_whole
from qtt_operator.redis_client import connect
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.report import Checkpoint, Row, leaderboard, metric_of, statistics
from qtt_operator.run_folder import RunFolder, find_run, is_run
from qtt_operator.store import open_reader

if TYPE_CHECKING:
    from redis.asyncio import Redis


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Everything the reading verbs know of a run."""

    folder: RunFolder
    facts: Mapping[str, Any]
    events: Sequence[Event]
    configs: Mapping[str, Config]
    state: LedgerState
    status: Mapping[str, Any]

    @property
    def run_dir(self) -> Path:
        """Checkpoints, results and logs."""
        return Path(str(self.facts["root"])) / "runs" / str(self.facts["uid"])

    @property
    def metric(self) -> Metric:
        """The objective, as recorded in the ledger."""
        return metric_of(self.state.run.spec if self.state.run else self.facts.get("spec", {}))

    @property
    def recommended(self) -> int | None:
        """The optimizer's incumbent at the last status, None before the first score."""
        best = self.status.get("best")
        return int(best["configID"]) if isinstance(best, Mapping) and "configID" in best else None

    def is_kept(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is still on the volume."""
        return (self.run_dir / checkpoint.folder / "manifest.json").is_file()

    def leaderboard(self, top: int | None = None) -> list[Row]:
        """Kept checkpoints, best first."""
        return leaderboard(
            self.events,
            self.configs,
            metric=self.metric,
            recommended=self.recommended,
            top=top,
            kept=self.is_kept,
        )

    def statistics(self) -> list[Row]:
        """Every configuration."""
        return statistics(
            self.events,
            self.configs,
            metric=self.metric,
            recommended=self.recommended,
            kept=self.is_kept,
        )


async def read_record(folder: RunFolder, redis_url: str | None = None) -> RunRecord:
    """Read a run's ledger and what lies beside it.

    Raises: SpecError if the run's own store is not known here; StoreError, LedgerError.
    """
    facts = folder.read_facts()
    if not facts:
        expected = "the run has not got as far as its ledger; start it again"
        raise SpecError([Fault("RUN", str(folder.path), expected)])
    if redis_url is None and not facts.get("embedded", True):
        expected = "keeps its ledger in another Redis; add --redis-url"
        raise SpecError([Fault("RUN", str(facts["name"]), expected)])
    if redis_url is not None:
        client = await connect(redis_url)
        try:
            return await _read(client, folder, facts)
        finally:
            await client.aclose()
    with open_reader(folder.path) as client:
        try:
            return await _read(client, folder, facts)
        finally:
            await client.aclose()


async def read_ledger_of(folder: RunFolder, redis_url: str | None = None) -> Ledger:
    """The ledger of a run's folder with what its events refer to. Raises: as `read_record`."""
    record = await read_record(folder, redis_url)
    facts = record.facts
    return Ledger(
        name=str(facts["name"]), uid=str(facts["uid"]), configs=record.configs,
        events=record.events, hub=facts.get("hub"), space=str(facts.get("space_definition", "")),
    )  # fmt: skip


async def find_ledger(text: str, state_dir: Path, redis_url: str | None = None) -> Ledger:
    """The ledger of a run by its name or folder here, or by its name or uid in a Redis.

    A folder of that name comes first: it also knows the run's hub. Raises: as `read_record`;
    SpecError that lists the runs there are.
    """
    if redis_url is None or is_run(text, state_dir):
        return await read_ledger_of(find_run(text, state_dir), redis_url)
    client = await connect(redis_url)
    try:
        return await read_whole(client, await find_run_in(client, text))
    finally:
        await client.aclose()


async def _read(client: Redis, folder: RunFolder, facts: Mapping[str, Any]) -> RunRecord:
    ledger = RedisLedger.reader(client, str(facts["uid"]))
    events = await ledger.read()
    configs = await ledger.configs()  # after the events: every opened one is then in it
    return RunRecord(
        folder=folder,
        facts=facts,
        events=events,
        configs=configs,
        state=fold(events),
        status=read_status(folder),
    )


def read_status(folder: RunFolder) -> Mapping[str, Any]:
    """status.yaml; empty before the first turn."""
    try:
        raw = yaml.safe_load(folder.status_file.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return raw if isinstance(raw, dict) else {}

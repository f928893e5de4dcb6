"""One turn of a run: gather -> decide -> act, the same for a cluster and for one machine.

`turn` reads the ledger's tail, the back end's jobs and the optimizer's answers, lets the pure
`qtt_core.planner.decide` choose, and carries its actions out in order against three small Protocols.
It imports neither kopf, kubernetes nor redis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from qtt_core.jobs import JobDocument
from qtt_core.ledger.events import Cancel, Done, Event, Fail, Open, Retry
from qtt_core.ledger.reply import Reply as Reply  # re-exported
from qtt_core.planner import Observed
from qtt_core.steps import BudgetView, Config, OptimizerEvent, OptimizerSetup, Proposal, Recommendation


class Ledger(Protocol):
    """The run's stream. Every write is atomic, fenced by the writer's epoch and durable on return.

    Raises: StoreUnavailableError when the store cannot be reached.
    """

    async def read(self, after: str = "0-0") -> list[Event]:
        """Events behind a stream id, in order."""

    async def configs(self) -> dict[str, Config]:
        """Config id -> canonical configuration of every opened configuration."""

    async def open(self, event: Open, *, config: Config | None, job: str) -> tuple[Reply, str]:
        """Record a decision; (reply, stream id or "")."""

    async def commit(self, event: Done | Fail | Retry | Cancel, *, job: str = "") -> tuple[Reply, str]:
        """Record an end exactly once; `event.a` of a Retry is the new attempt, `job` its Job."""

    async def note(self, event: Event, *, key: str) -> tuple[Reply, str]:
        """Record run, prepared, weights, note, close or reopen once per deduplication key."""


class Backend(Protocol):
    """Where steps run: Jobs on a cluster, child processes on one machine."""

    async def observe(self) -> Observed:
        """Every job this back end knows of for the run, ended ones included until `forget`."""

    async def create(self, kind: str, job: str, document: JobDocument) -> None:
        """Start a job (kind: prepare, step, evaluate); an existing job of that name is adopted."""

    async def kill(self, job: str, reason: str) -> None:
        """End a job now; it is observed as ended with this reason."""

    async def forget(self, job: str) -> None:
        """The job's end is durably recorded: its second witness may go."""


class AskAnswer(Protocol):
    """What an ask returned."""

    proposals: Sequence[Proposal]
    finished: str | None
    position: str


class OptimizerPort(Protocol):
    """A supervised optimizer in another process. Raises: OptimizerError after its retries."""

    async def load(self, setup: OptimizerSetup, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        """Build the optimizer and replay (stream id, event) pairs."""

    async def tell(self, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        """Feed further events, in ledger order."""

    async def ask(self, n: int, budget: BudgetView) -> AskAnswer:
        """At most n proposals of distinct configurations; none = nothing useful now."""

    async def recommend(self) -> Recommendation | None:
        """The incumbent, None before the first score."""

    async def explain(self, proposal: Proposal) -> str:
        """One sentence: why this proposal."""


Facts = Mapping[str, object]

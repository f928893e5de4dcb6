"""The runner's side of an optimizer worker: start, ask, tell, and start again after a fault.

Implements `turn.OptimizerPort`. Imports neither torch nor the worker: the worker is started by
name and reached through pipes. Everything told is kept, so that a killed worker is rebuilt by
replay; the same events give the same answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtt_core.errors import OptimizerError, QuickTuneError
from qtt_core.steps import (
    BudgetView,
    Forecast,
    OptimizerEvent,
    OptimizerSetup,
    Proposal,
    Recommendation,
    event_to_json,
)
from qtt_operator.optimizer_wire import HEADER, decode, encode, error_from_json, length

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "qtt_operator.optimizer_worker")
STRIKES = 3
START = "0-0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an ask returned; `position` is the stream id of the last event it rests on."""

    proposals: tuple[Proposal, ...]
    finished: str | None
    position: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceIdentity:
    """Name and digest of a search space."""

    space_id: str
    space_sha: str


class _WorkerLostError(Exception):
    """The worker died, timed out or sent no frame: kill it and replay."""

    def __init__(self, message: str, reason: str = "Failed") -> None:
        super().__init__(message)
        self.reason = reason


class OptimizerClient:
    """One worker process and what it was told.

    Every call waits for at most `timeout_seconds`, the first one of a process for
    `startup_seconds` more. A lost worker is killed, started and replayed; after three losses in one
    call: OptimizerError.
    """

    def __init__(
        self,
        *,
        command: Sequence[str] = COMMAND,
        timeout_seconds: float = 60.0,
        startup_seconds: float = 120.0,
    ) -> None:
        self._command = tuple(command)
        self._timeout = timeout_seconds
        self._startup = startup_seconds
        self._process: Process | None = None
        self._stderr: deque[str] = deque(maxlen=20)
        self._drain: asyncio.Task[None] | None = None
        self._setup: OptimizerSetup | None = None
        self._events: list[tuple[str, OptimizerEvent]] = []
        self._loaded = False
        self._counter = 0
        self._warm = False
        self._lock = asyncio.Lock()

    # --- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process and return; it imports torch while the caller goes on."""
        if self._process is not None and self._process.returncode is None:
            return
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=env
        )
        self._loaded = self._warm = False
        self._drain = asyncio.create_task(self._keep_stderr(self._process))

    async def close(self) -> None:
        """End the process; calling it twice is harmless."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.wait()
            if process.stdin is not None:
                process.stdin.close()
        drain, self._drain = self._drain, None
        if drain is not None:
            await drain
        self._loaded = False

    @property
    def position(self) -> str:
        """Stream id of the last event told."""
        return self._events[-1][0] if self._events else START

    # --- the port ----------------------------------------------------------------------------

    async def describe(self, setup: OptimizerSetup) -> SpaceIdentity:
        """Name and digest of a setup's space. Raises: SpecError, OptimizerError."""
        raw = await self._call("describe", {"setup": setup.to_json()}, loaded=False)
        return SpaceIdentity(space_id=raw["space_id"], space_sha=raw["space_sha"])

    async def load(
        self, setup: OptimizerSetup, events: Sequence[tuple[str, OptimizerEvent]]
    ) -> None:
        """Build the optimizer and replay (stream id, event) pairs.

        Raises: SpecError if the setup cannot be built; ObservationError, UnknownConfigurationError.
        """
        self._setup, self._events, self._loaded = setup, list(events), False
        await self._call("ping", {})

    async def tell(self, events: Sequence[tuple[str, OptimizerEvent]]) -> None:
        """Feed further events, in ledger order.

        Raises: ObservationError, UnknownConfigurationError, OptimizerError.
        """
        if not events:
            return
        await self._call(
            "tell",
            {"after": self.position, "events": _pairs(events)},
        )
        self._events.extend(events)

    async def ask(self, n: int, budget: BudgetView) -> Answer:
        """At most n proposals of distinct configurations; none = nothing useful now."""
        raw = await self._call("ask", {"n": n, "budget": budget.to_json()})
        return Answer(
            proposals=tuple(Proposal.from_json(proposal) for proposal in raw["proposals"]),
            finished=raw["finished"],
            position=raw["position"],
            seconds=raw["seconds"],
        )

    async def recommend(self) -> Recommendation | None:
        """The incumbent, None before the first score."""
        raw = (await self._call("recommend", {}))["recommendation"]
        return None if raw is None else Recommendation.from_json(raw)

    async def forecast(self, config_id: int) -> Forecast:
        """Predicted scores of a configuration. Raises: UnknownConfigurationError."""
        raw = await self._call("forecast", {"config_id": config_id})
        return Forecast(**{name: tuple(values) for name, values in raw.items()})

    async def explain(self, proposal: Proposal) -> str:
        """One sentence: why this proposal."""
        raw = await self._call("explain", {"proposal": proposal.to_json()})
        return str(raw["text"])

    # --- one call ----------------------------------------------------------------------------

    async def _call(
        self, op: str, arguments: Mapping[str, Any], *, loaded: bool = True
    ) -> dict[str, Any]:
        """Send a request and wait for its reply, over restarts and replays if need be."""
        reason = "Failed"
        async with self._lock:
            for strike in range(1, STRIKES + 1):
                try:
                    await self.start()
                    if loaded and not self._loaded:
                        await self._replay()
                    return await self._exchange(op, arguments)
                except _WorkerLostError as loss:
                    tail = " | ".join(self._stderr)
                    reason = loss.reason
                    await self.close()
                    log.warning("optimizer worker lost in %s, strike %d: %s", op, strike, loss)
                except QuickTuneError:
                    self._loaded = False  # a refused event may have been half of a batch: replay
                    raise
            raise OptimizerError(
                f"the optimizer worker failed {STRIKES} times in {op!r}; "
                f"its last words: {tail or 'none'}",
                reason=reason,
            )

    async def _replay(self) -> None:
        if self._setup is None:
            raise OptimizerError("no optimizer is loaded; call load first")
        await self._exchange(
            "load", {"setup": self._setup.to_json(), "events": _pairs(self._events)}
        )
        self._loaded = True

    async def _exchange(self, op: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self._counter += 1
        frame = encode({"id": self._counter, "op": op, **arguments})
        limit = self._timeout + (0.0 if self._warm else self._startup)
        try:
            async with asyncio.timeout(limit):
                process.stdin.write(frame)
                await process.stdin.drain()
                header = await process.stdout.readexactly(HEADER.size)
                reply = decode(await process.stdout.readexactly(length(header)))
        except TimeoutError as error:
            raise _WorkerLostError(f"no answer within {limit:.0f} s", "Timeout") from error
        except (asyncio.IncompleteReadError, ConnectionError, OptimizerError) as error:
            words = str(error) or type(error).__name__
            raise _WorkerLostError(words, await self._why_lost(process)) from error
        self._warm = True
        if reply.get("id") != self._counter:
            raise _WorkerLostError(f"reply {reply.get('id')!r} to request {self._counter}")
        if "error" in reply:
            raise error_from_json(reply["error"])
        result: dict[str, Any] = reply["ok"]
        return result

    @staticmethod
    async def _why_lost(process: Process) -> str:
        """A SIGKILL that was not ours is the kernel's, which had no memory left."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 1.0)
        return "OutOfMemory" if process.returncode == -signal.SIGKILL else "Failed"

    async def _keep_stderr(self, process: Process) -> None:
        """Keep the worker's last lines for the error that may come."""
        assert process.stderr is not None
        while line := await process.stderr.readline():
            text = line.decode(errors="replace").rstrip()
            self._stderr.append(text)
            log.debug("optimizer worker: %s", text)


def _pairs(events: Sequence[tuple[str, OptimizerEvent]]) -> list[list[Any]]:
    return [[position, event_to_json(event)] for position, event in events]

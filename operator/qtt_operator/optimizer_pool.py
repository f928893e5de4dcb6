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
import time
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
from qtt_operator.optimizer_wire import (
    HEADER,
    decode,
    encode,
    error_from_json,
    length,
    to_text,
)

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "qtt_operator.optimizer_worker")
STRIKES = 3
DEATH_SECONDS = 1.0
"""From the end of a worker's pipe to its exit status."""

ENCODED_AT_ONCE = 200
"""Events that become JSON before others have their turn on the event loop."""

START = "0-0"


Pairs = Sequence[tuple[str, OptimizerEvent]]
"""(stream id, event)."""


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


class Told:
    """What an optimizer was told, in ledger order, as the text that goes over the pipe.

    Encoded once, a few hundred bytes an event: any worker is taught by joining it.
    """

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.position = START
        """Stream id of the last event."""

    async def add(self, events: Pairs) -> None:
        """Keep further events; a long history leaves the event loop to others in between."""
        for number, (position, event) in enumerate(events, start=1):
            self.texts.append(to_text([position, event_to_json(event)]))
            self.position = position
            if number % ENCODED_AT_ONCE == 0:
                await asyncio.sleep(0)


class OptimizerLostError(OptimizerError):
    """A worker was lost three times in one call; `reason` is the last loss."""


class _WorkerLostError(Exception):
    """The worker died, timed out or sent no frame: kill it and replay."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class WorkerNews:
    """Told of what a worker does; by default nobody listens."""

    def called(self, op: str, algorithm: str, seconds: float) -> None:
        """A call was answered."""

    def lost(self, reason: str) -> None:
        """A worker was lost: Timeout, OutOfMemory or Failed. It is started again."""


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
        news: WorkerNews | None = None,
    ) -> None:
        self._command = tuple(command)
        self.timeout_seconds = timeout_seconds
        self.losses = 0
        """Workers lost so far."""
        self.last_loss = ""
        self._news = news or WorkerNews()
        self._startup = startup_seconds
        self._process: Process | None = None
        self._stderr: deque[str] = deque(maxlen=20)
        self._drain: asyncio.Task[None] | None = None
        self._setup: OptimizerSetup | None = None
        self._told = Told()
        self._loaded = False
        self._counter = 0
        self._warm = False
        self._lock = asyncio.Lock()

    # --- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process and return; it imports torch while the caller goes on."""
        if self._process is not None:
            if self._process.returncode is None:
                return
            reason = await _why_it_died(self._process)  # it died between two calls
            self._news.lost(reason)
            log.warning("optimizer worker lost while nobody asked it: %s", reason)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=env
        )
        self._loaded = self._warm = False
        self._drain = asyncio.create_task(self._keep_stderr(self._process))

    async def warm(self) -> None:
        """Start the process if it does not run and no call is about to."""
        async with self._lock:
            await self.start()

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
    def setup(self) -> OptimizerSetup | None:
        """What the optimizer was built from."""
        return self._setup

    @property
    def position(self) -> str:
        """Stream id of the last event told."""
        return self._told.position

    # --- the port ----------------------------------------------------------------------------

    async def describe(self, setup: OptimizerSetup) -> SpaceIdentity:
        """Name and digest of a setup's space. Raises: SpecError, OptimizerError."""
        raw = await self._call("describe", {"setup": setup.to_json()}, loaded=False)
        return SpaceIdentity(space_id=raw["space_id"], space_sha=raw["space_sha"])

    async def load(self, setup: OptimizerSetup, events: Pairs) -> None:
        """Build the optimizer and replay (stream id, event) pairs.

        Raises: SpecError if the setup cannot be built; ObservationError, UnknownConfigurationError.
        """
        told = Told()
        await told.add(events)
        await self.teach(setup, told)

    async def teach(self, setup: OptimizerSetup, told: Told) -> None:
        """Build the optimizer and replay; later tells are added to `told`. Raises: as `load`."""
        self._setup, self._told, self._loaded = setup, told, False
        await self._call("ping", {})

    async def tell(self, events: Pairs) -> None:
        """Feed further events, in ledger order.

        Raises: ObservationError, UnknownConfigurationError, OptimizerError.
        """
        if not events:
            return
        fresh = Told()
        await fresh.add(events)
        await self._call("tell", {"after": self.position}, events=fresh.texts)
        self._told.texts += fresh.texts
        self._told.position = fresh.position

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
        self,
        op: str,
        arguments: Mapping[str, Any],
        *,
        events: Sequence[bytes] | None = None,
        loaded: bool = True,
    ) -> dict[str, Any]:
        """Send a request and wait for its reply, over restarts and replays if need be."""
        async with self._lock:
            for strike in range(1, STRIKES + 1):
                try:
                    await self.start()
                    if loaded and not self._loaded:
                        await self._replay()
                    return await self._exchange(op, arguments, events)
                except _WorkerLostError as loss:
                    tail = " | ".join(self._stderr)
                    await self.close()
                    self.losses, self.last_loss = self.losses + 1, loss.reason
                    self._news.lost(loss.reason)
                    log.warning("optimizer worker lost in %s, strike %d: %s", op, strike, loss)
                except QuickTuneError:
                    self._loaded = False  # a refused event may have been half of a batch: replay
                    raise
            raise OptimizerLostError(
                f"the optimizer worker failed {STRIKES} times in {op!r}; "
                f"its last words: {tail or 'none'}",
                reason=self.last_loss,
            )

    async def _replay(self) -> None:
        if self._setup is None:
            raise OptimizerError("no optimizer is loaded; call load first")
        await self._exchange("load", {"setup": self._setup.to_json()}, self._told.texts)
        self._loaded = True

    async def _exchange(
        self, op: str, arguments: Mapping[str, Any], events: Sequence[bytes] | None = None
    ) -> dict[str, Any]:
        process, began = self._process, time.monotonic()
        assert process is not None
        self._counter += 1
        limit = self.timeout_seconds + (0.0 if self._warm else self._startup)
        try:
            async with asyncio.timeout(limit):
                request = {"id": self._counter, "op": op, **arguments}
                reply = await _talk(process, encode(request, events))
        except TimeoutError as error:
            raise _WorkerLostError(f"no answer within {limit:.0f} s", "Timeout") from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            reason = await _why_it_died(process)
            raise _WorkerLostError(str(error) or type(error).__name__, reason) from error
        except OptimizerError as error:
            raise _WorkerLostError(str(error), "Failed") from error
        self._warm = True
        if reply.get("id") != self._counter:
            text = f"reply {reply.get('id')!r} to request {self._counter}"
            raise _WorkerLostError(text, "Failed")
        if "error" in reply:
            raise error_from_json(reply["error"])
        algorithm = self._setup.algorithm if self._setup is not None else ""
        self._news.called(op, algorithm, time.monotonic() - began)
        result: dict[str, Any] = reply["ok"]
        return result

    async def _keep_stderr(self, process: Process) -> None:
        """Keep the worker's last lines for the error that may come."""
        assert process.stderr is not None
        while line := await process.stderr.readline():
            text = line.decode(errors="replace").rstrip()
            self._stderr.append(text)
            log.debug("optimizer worker: %s", text)


async def _why_it_died(process: Process) -> str:
    """A SIGKILL that was not ours is the kernel's, which had no memory left."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DEATH_SECONDS):
            await process.wait()
    return "OutOfMemory" if process.returncode == -signal.SIGKILL else "Failed"


async def _talk(process: Process, frame: bytes) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(frame)
    await process.stdin.drain()
    header = await process.stdout.readexactly(HEADER.size)
    return decode(await process.stdout.readexactly(length(header)))

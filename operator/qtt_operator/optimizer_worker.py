"""An optimizer in a process of its own: the one module that loads torch (30-kubernetes 2.4).

Started by name (`python -m qtt_operator.optimizer_worker`), never imported. Reads framed requests
on standard input, answers on what was standard output; prints of libraries go to standard error.
Ends with its parent. Holds nothing that the ledger does not: after a crash it is built again by
replay.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from qtt_core.errors import Fault, OptimizerError, QuickTuneError, SpecError
from qtt_core.fields import raise_faults
from qtt_core.optimizer import Optimizer, build, setup_prior, setup_space
from qtt_core.space import SearchSpace
from qtt_core.steps import (
    BudgetView,
    OptimizerSetup,
    Proposal,
    canonical_json,
    event_from_json,
)
from qtt_operator.optimizer_wire import encode, error_to_json, read

PR_SET_PDEATHSIG = 1
START = "0-0"
"""Position before the first event."""

KEPT = 128
"""Optimizers that one process remembers; each takes a few MiB."""


@dataclass(slots=True)
class _Kept:
    """An optimizer, and a digest of everything it was fed, in order."""

    optimizer: Optimizer
    position: str = START
    count: int = 0
    fed: str = ""

    def feed(self, events: Sequence[Sequence[Any]]) -> None:
        """Feed [stream id, event] pairs; a failure leaves it half-fed: drop it then."""
        for position, raw in events:
            if _order(position) <= _order(self.position):
                raise OptimizerError(f"event {position} comes after {self.position}; ids must grow")
            self.optimizer.feed(event_from_json(raw))
            self.position, self.count = position, self.count + 1
            self.fed = _chained(self.fed, position, raw)


class Session:
    """The loaded optimizer, and those of other runs that this process has served before.

    Building one costs half a second of CPU, most of it for its space: runs that take turns in a
    worker would spend it at every turn.
    """

    def __init__(self) -> None:
        self._now: _Kept | None = None
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    @property
    def optimizer(self) -> Optimizer:
        """The loaded optimizer. Raises: OptimizerError before `load`."""
        return self._loaded.optimizer

    @property
    def position(self) -> str:
        """Stream id of the last event told."""
        return START if self._now is None else self._now.position

    @property
    def _loaded(self) -> _Kept:
        if self._now is None:
            raise OptimizerError("no optimizer is loaded; send load first")
        return self._now

    def describe(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Identity of the space that a setup describes, its prior loaded for what comes.

        Raises: SpecError that names every initial configuration which is none of the space, or a
        prior that is damaged.
        """
        setup = OptimizerSetup.from_json(request["setup"])
        space, _ = setup_space(setup)
        setup_prior(setup)
        raise_faults(_initial_faults(space, setup))
        return {"space_id": space.space_id, "space_sha": space.sha}

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Build and replay, or feed only what is new to an optimizer that was built from this."""
        self._now = None
        key, events = canonical_json(request["setup"]), request["events"]
        known = self._kept.pop(key, None)
        if known is None or not _begins_with(events, known):
            known = _Kept(build(OptimizerSetup.from_json(request["setup"])))
        known.feed(events[known.count :])
        self._now = self._kept[key] = known
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return {"position": self.position}

    def tell(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Feed [stream id, event] pairs that follow `after`.

        Raises: OptimizerError on a gap or a step back; ObservationError, UnknownConfigurationError.
        """
        if request["after"] != self.position:
            raise OptimizerError(
                f"events follow {request['after']}, but the last one told is {self.position}"
            )
        loaded = self._loaded
        try:
            loaded.feed(request["events"])
        except Exception:  # whatever it is, half of the events were taken: load it anew
            self._kept.popitem()  # the newest: it was loaded last
            raise
        return {"position": self.position}

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Proposals from recorded events alone: earlier ones never opened are forgotten."""
        began = time.perf_counter()
        self.optimizer.retract()
        proposals = self.optimizer.ask(request["n"], BudgetView(**request["budget"]))
        return {
            "proposals": [proposal.to_json() for proposal in proposals],
            "finished": self.optimizer.finished,
            "position": self.position,
            "seconds": time.perf_counter() - began,
        }

    def recommend(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The incumbent."""
        found = self.optimizer.recommend()
        return {"recommendation": None if found is None else found.to_json()}

    def forecast(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Predicted scores of one configuration."""
        found = self.optimizer.forecast(request["config_id"])
        return {"epochs": found.epochs, "mean": found.mean, "sd": found.sd}

    def explain(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One sentence."""
        return {"text": self.optimizer.explain(Proposal.from_json(request["proposal"]))}

    def ping(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Shows that the process is up."""
        return {"pid": os.getpid()}


COMMANDS: Mapping[str, Callable[[Session, Mapping[str, Any]], dict[str, Any]]] = {
    "describe": Session.describe,
    "load": Session.load,
    "tell": Session.tell,
    "ask": Session.ask,
    "recommend": Session.recommend,
    "forecast": Session.forecast,
    "explain": Session.explain,
    "ping": Session.ping,
}


def answer(session: Session, request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to one request; errors travel as data and leave the session as it was before."""
    command = COMMANDS.get(str(request.get("op")))
    if command is None:
        return {"error": error_to_json(OptimizerError(f"unknown command {request.get('op')!r}"))}
    try:
        return {"ok": command(session, request)}
    except QuickTuneError as error:
        return {"error": error_to_json(error)}
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return {"error": error_to_json(error)}


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer until the stream ends; between requests, do the fitting the next ask will need."""
    session = Session()
    while (request := read(requests)) is not None:
        reply = answer(session, request)
        replies.write(encode({"id": request.get("id"), **reply}))
        replies.flush()
        if request.get("op") in ("load", "tell") and "ok" in reply:
            session.optimizer.warm_up()


def end_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent dies; leave at once if it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _initial_faults(space: SearchSpace, setup: OptimizerSetup) -> list[Fault]:
    faults: list[Fault] = []
    for number, config in enumerate(setup.options.initial_configs):
        try:
            space.canonical(config)
        except SpecError as error:
            where = f"spec.search.initialConfigs[{number}]"
            faults += [Fault(f"{where}.{f.field}", f.value, f.expected) for f in error.faults]
    return faults


def _begins_with(events: Sequence[Sequence[Any]], known: _Kept) -> bool:
    """Whether these events begin with exactly what an optimizer was fed."""
    fed = ""
    for position, raw in events[: known.count]:
        fed = _chained(fed, position, raw)
    return len(events) >= known.count and fed == known.fed


def _chained(before: str, position: str, raw: object) -> str:
    text = f"{before}{position}{json.dumps(raw, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()


def _order(position: str) -> tuple[int, int]:
    """A stream id `milliseconds-sequence` as something that can be compared."""
    milliseconds, _, sequence = position.partition("-")
    return int(milliseconds), int(sequence or 0)


def main() -> None:
    """Serve on standard input and output until the parent closes them."""
    end_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle
    torch.set_num_threads(1)
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # a library's print must not break a frame
        serve(requests, replies)


if __name__ == "__main__":
    main()

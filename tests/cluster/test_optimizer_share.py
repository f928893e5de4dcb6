"""Workers that are lost: the run goes on, and says why."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qtt_core.hub import load_hub
from qtt_core.steps import BudgetView, Observation, OptimizerSetup, Options, Outcome, Why
from qtt_operator import optimizer_pool
from qtt_operator.optimizer_share import REST_SECONDS, OptimizerShare, SharedOptimizer, ShareNews

EVERYTHING = BudgetView()

FRAGILE = """
import os
from qtt_operator import optimizer_worker as worker
ask = worker.Session.ask
def fragile(session, request):
    if session.optimizer.setup_algorithm == "QuickTune":
        os._exit(3)
    return ask(session, request)
load = worker.Session.load
def loading(session, request):
    answer = load(session, request)
    session.optimizer.setup_algorithm = request["setup"]["algorithm"]
    return answer
worker.COMMANDS = {**worker.COMMANDS, "ask": fragile, "load": loading}
worker.main()
"""
"""The real worker, dead whenever QuickTune is asked."""


class Heard(ShareNews):
    def __init__(self) -> None:
        self.calls, self.losses, self.random = Counter[str](), Counter[str](), 0

    def called(self, op: str, algorithm: str, seconds: float) -> None:
        self.calls[f"{op} {algorithm}"] += 1

    def lost(self, reason: str) -> None:
        self.losses[reason] += 1

    def fell_back(self) -> None:
        self.random += 1


def setup(algorithm: str = "Random") -> OptimizerSetup:
    hub = load_hub("timm24")
    return OptimizerSetup(
        algorithm=algorithm, space="native",
        hub={"name": hub.name, "cards": [card.to_json() for card in hub.cards[-4:]]},
        max_fidelity=5, step=1, seed=3, options=Options(pool_size=16),
    )  # fmt: skip


def play(
    scenario: Callable[[OptimizerShare, Heard], Awaitable[None]], *, workers: int = 1,
    program: str = "", now: Callable[[], float] = lambda: 0.0,
) -> None:  # fmt: skip
    async def main() -> None:
        heard = Heard()
        command = (sys.executable, "-c", program) if program else optimizer_pool.COMMAND
        share = OptimizerShare(workers, news=heard, command=command, now=now)
        try:
            await scenario(share, heard)
        finally:
            await share.close()

    asyncio.run(main())


def done(config_id: int, to: int) -> Observation:
    return Observation(
        config_id=config_id, fidelity=to, outcome=Outcome.OK, scores=(0.5,) * to,
        seconds=(1.0,) * to,
    )  # fmt: skip


async def one_step(port: SharedOptimizer, number: int) -> int:
    """Ask for a configuration, open it, tell its result; returns its id."""
    proposal = (await port.ask(1, EVERYTHING)).proposals[0]
    end = proposal.fidelity_to
    await port.tell([(f"{number}-0", proposal)])
    await port.tell([(f"{number}-1", done(proposal.config_id, end))])
    return proposal.config_id


def test_runs_that_share_a_worker_each_get_what_they_were_told() -> None:
    async def scenario(share: OptimizerShare, heard: Heard) -> None:
        one, two = share.port(), share.port()
        for port in (one, two):
            await port.load(setup(), [])
        first = await one_step(one, 1)
        await one_step(two, 1)

        best = await one.recommend()

        assert best is not None
        assert best.config_id == first
        assert heard.calls["load Random"] >= 3

    play(scenario)


@pytest.mark.slow  # six workers are started, each imports torch
def test_an_optimizer_that_dies_again_and_again_gives_way_to_random_proposals_for_a_while() -> None:
    clock = [0.0]

    async def scenario(share: OptimizerShare, heard: Heard) -> None:
        port = share.port()
        await port.load(setup("QuickTune"), [])
        first = await one_step(port, 1)

        assert heard.losses == {"Failed": 3}
        assert port.trouble is not None
        assert port.trouble[0] == "FallbackRandom"
        assert heard.random == 1

        await one_step(port, 2)
        best = await port.recommend()
        assert best is not None
        assert heard.losses == {"Failed": 3}  # it rests

        stood_in = (await port.ask(1, EVERYTHING)).proposals[0]
        assert stood_in.why == Why(rule="fallback-random")  # the decision says who made it

        clock[0] = REST_SECONDS + 1
        await port.ask(1, EVERYTHING)
        assert heard.losses == {"Failed": 6}  # tried again
        assert first >= 0

    play(scenario, program=FRAGILE, now=lambda: clock[0])


def test_a_worker_killed_for_memory_is_counted_said_and_taught_again() -> None:
    async def scenario(share: OptimizerShare, heard: Heard) -> None:
        port = share.port()
        await port.load(setup(), [])
        first = await one_step(port, 1)
        worker = share._slots[0].client._process
        assert worker is not None

        asking = asyncio.create_task(port.recommend())
        await asyncio.sleep(0)
        os.kill(worker.pid, signal.SIGKILL)
        best = await asking

        assert best is not None
        assert best.config_id == first
        if heard.losses:  # else the answer was quicker than the signal
            assert heard.losses == {"OutOfMemory": 1}
            assert port.trouble is not None
            assert port.trouble[0] == "OutOfMemory"
        await port.recommend()
        await port.recommend()
        assert port.trouble is None

    play(scenario)


def test_a_warm_share_has_its_processes_before_the_first_call_and_an_idle_one_none() -> None:
    async def scenario(share: OptimizerShare, heard: Heard) -> None:
        assert not children()
        await share.warm()
        await share.warm()
        assert len(children()) == 2
        await share.port().describe(setup())
        await share.idle()
        assert not children()

    play(scenario, workers=2)


def children() -> list[str]:
    """Living optimizer workers of this process."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                words = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and b"optimizer_worker" in words and fields[0] != "Z":
                found.append(folder.name)
    return found

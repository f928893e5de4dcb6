"""The worker process and its client, for real: pipes, kills, gaps, replays."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qtt_core.errors import OptimizerError, SpecError, UnknownConfigurationError
from qtt_core.hub import load_hub
from qtt_core.steps import BudgetView, Observation, OptimizerSetup, Options, Outcome
from qtt_operator.optimizer_pool import OptimizerClient, WorkerNews

EVERYTHING = BudgetView()


def make_setup(algorithm="Random", **changes):
    hub = load_hub("timm24")
    return OptimizerSetup(
        **{
            "algorithm": algorithm,
            "space": "native",
            "hub": {"name": hub.name, "cards": [card.to_json() for card in hub.cards[-4:]]},
            "max_fidelity": 5,
            "step": 1,
            "seed": 3,
            "options": Options(pool_size=16),
        }
        | changes
    )


def finished(proposal, score=0.5):
    count = proposal.fidelity_to - proposal.fidelity_from
    return Observation(
        config_id=proposal.config_id,
        fidelity=proposal.fidelity_to,
        outcome=Outcome.OK,
        scores=(score,) * count,
        seconds=(1.0,) * count,
    )


def run(scenario, **settings):
    async def main():
        client = OptimizerClient(**settings)
        try:
            return await scenario(client)
        finally:
            await client.close()

    return asyncio.run(main())


def test_a_killed_worker_is_rebuilt_and_answers_as_before():
    async def scenario(client):
        await client.start()
        await client.load(make_setup(), [])
        first = (await client.ask(1, EVERYTHING)).proposals[0]
        await client.tell([("1-0", first), ("2-0", finished(first))])
        before = await client.ask(2, EVERYTHING)

        os.kill(client._process.pid, signal.SIGKILL)
        after = await client.ask(2, EVERYTHING)

        assert after.proposals == before.proposals
        assert after.position == before.position == "2-0"

    run(scenario)


def test_a_worker_that_died_while_nobody_asked_it_is_told_of():
    losses = []

    class News(WorkerNews):
        def lost(self, reason):
            losses.append(reason)

    async def scenario(client):
        await client.load(make_setup(), [])
        os.kill(client._process.pid, signal.SIGKILL)
        await client._process.wait()

        await client.ask(1, EVERYTHING)

    run(scenario, news=News())
    assert losses == ["OutOfMemory"]


def test_asking_twice_without_opening_gives_the_same_proposals():
    """A decision rests on recorded events only: an ask that was never opened leaves no trace."""

    async def scenario(client):
        await client.load(make_setup(), [])
        assert (await client.ask(3, EVERYTHING)).proposals == (
            await client.ask(3, EVERYTHING)
        ).proposals

    run(scenario)


def test_recommend_forecast_explain_and_describe_cross_the_pipe():
    async def scenario(client):
        setup = make_setup()
        identity = await client.describe(setup)
        await client.load(setup, [])
        assert await client.recommend() is None
        proposal = (await client.ask(1, EVERYTHING)).proposals[0]
        await client.tell([("5-0", proposal), ("5-1", finished(proposal, 0.75))])

        incumbent = await client.recommend()
        forecast = await client.forecast(proposal.config_id)
        text = await client.explain(proposal)

        assert identity.space_id == "native"
        assert len(identity.space_sha) == 64
        assert (incumbent.config_id, incumbent.score) == (proposal.config_id, 0.75)
        assert forecast.epochs == tuple(range(proposal.fidelity_to + 1, 6))
        assert f"Configuration {proposal.config_id}" in text

    run(scenario)


def test_a_result_of_an_unknown_configuration_is_refused_and_the_session_lives_on():
    async def scenario(client):
        await client.load(make_setup(), [])
        proposal = (await client.ask(1, EVERYTHING)).proposals[0]
        stranger = Observation(config_id=999, fidelity=1, outcome=Outcome.OOM)
        with pytest.raises(UnknownConfigurationError, match="999"):
            await client.tell([("1-0", proposal), ("2-0", stranger)])

        await client.tell([("1-0", proposal)])

        assert (await client.ask(1, EVERYTHING)).position == "1-0"

    run(scenario)


def test_a_worker_goes_on_with_an_optimizer_it_knows_and_is_not_fooled_by_another_history():
    """Two runs take turns; then one of the same setup comes with another past."""

    async def scenario(client):
        setups, pasts = [make_setup(), make_setup(seed=4)], [[], []]
        for turn in range(2):
            for setup, past in zip(setups, pasts, strict=True):
                await client.load(setup, past)
                proposal = (await client.ask(1, EVERYTHING)).proposals[0]
                events = [(f"{turn + 1}-0", proposal), (f"{turn + 1}-1", finished(proposal))]
                await client.tell(events)
                past += events
        await client.load(setups[0], pasts[0])
        known = (await client.ask(2, EVERYTHING)).proposals
        await client.load(setups[0], pasts[0][:2])
        assert (await client.ask(1, EVERYTHING)).position == "1-1"
        await client.close()  # a new process knows nothing
        await client.load(setups[0], pasts[0])
        assert (await client.ask(2, EVERYTHING)).proposals == known

    run(scenario)


def test_ids_that_do_not_grow_are_refused():
    async def scenario(client):
        await client.load(make_setup(), [])
        proposal = (await client.ask(1, EVERYTHING)).proposals[0]
        await client.tell([("10-0", proposal)])
        with pytest.raises(OptimizerError, match="9-5"):
            await client.tell([("9-5", finished(proposal))])

    run(scenario)


def test_a_gap_in_what_was_told_is_refused():
    async def scenario(client):
        await client.load(make_setup(), [])
        proposal = (await client.ask(1, EVERYTHING)).proposals[0]
        await client.tell([("3-0", proposal)])
        await client._told.add([("4-0", finished(proposal))])  # believed told, never sent
        with pytest.raises(OptimizerError, match="3-0"):
            await client.tell([("5-0", finished(proposal))])

    run(scenario)


def test_a_setup_that_cannot_be_built_names_the_user_s_fault():
    async def scenario(client):
        with pytest.raises(SpecError, match=r"0\.123") as caught:
            await client.load(make_setup(overrides={"lr": "0.123"}), [])
        assert caught.value.faults

    run(scenario)


def test_initial_configurations_of_a_manifest_are_checked_and_asked_first_in_order():
    """A cluster has no lint before it: a wrong one must be named before the run starts."""
    given = ({"lr": "1e-3", "stoch_norm": "false"}, {"opt": "sgd", "drop": "0.3"})

    async def scenario(client):
        setup = make_setup()
        wrong = replace(setup.options, initial_configs=(given[0], {"lr": "0.5", "modle": "x"}))
        with pytest.raises(SpecError) as refused:
            await client.describe(replace(setup, options=wrong))
        fields = {fault.field for fault in refused.value.faults}
        assert {"spec.search.initialConfigs[1].lr", "spec.search.initialConfigs[1].modle"} == fields

        good = replace(setup, options=replace(setup.options, initial_configs=given))
        await client.describe(good)
        await client.load(good, [])
        first = (await client.ask(2, EVERYTHING)).proposals
        assert [p.config["lr"] for p in first] == [0.001, 0.0001]
        assert (first[1].config["opt"], first[1].config["drop"]) == ("sgd", 0.3)

    run(scenario)


def test_a_worker_that_answers_nonsense_costs_three_strikes():
    async def scenario(client):
        with pytest.raises(OptimizerError, match="3 times"):
            await client.describe(make_setup())

    run(scenario, command=(sys.executable, "-c", "print('hello ' * 99, flush=True)"))


def test_a_worker_that_hangs_is_killed_in_time_and_its_last_words_are_told():
    program = "import sys, time; print('stuck', file=sys.stderr, flush=True); time.sleep(99)"

    async def scenario(client):
        with pytest.raises(OptimizerError, match="stuck"):
            await client.describe(make_setup())

    run(scenario, command=(sys.executable, "-c", program), timeout_seconds=0.1, startup_seconds=0.9)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(99)", "Timeout"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "OutOfMemory"),
        ("raise SystemExit(3)", "Failed"),
    ],
)
def test_a_fault_of_a_worker_has_a_name(program, reason):
    async def scenario(client):
        with pytest.raises(OptimizerError) as caught:
            await client.describe(make_setup())
        assert caught.value.reason == reason

    run(scenario, command=(sys.executable, "-c", program), timeout_seconds=0.1, startup_seconds=0.9)


def test_a_worker_dies_with_its_parent():
    program = """
import asyncio, os, sys
from qtt_operator.optimizer_pool import OptimizerClient
async def main():
    client = OptimizerClient()
    await client.start()
    print((await client._call("ping", {}, loaded=False))["pid"], flush=True)
    os._exit(1)
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120
    )

    assert ends_within(seconds=2.0, pid=int(done.stdout))


def ends_within(*, seconds: float, pid: int) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_the_client_loads_neither_torch_nor_the_worker():
    program = (
        "import sys, qtt_operator.optimizer_pool;"
        "print([m for m in ('torch', 'scipy', 'ConfigSpace', 'qtt_operator.optimizer_worker')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"

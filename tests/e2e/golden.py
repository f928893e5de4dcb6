"""What a run decided: through Jobs, from Redis; in this process, from the same turn and planner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from ledger_reader import of_kind
from tuning_runs import Run

from qtt_core.hub import load_hub
from qtt_core.plan import Identity
from qtt_core.spec import parse_manifest
from qtt_core.steps import canonical_json
from qtt_core.testing.ledger import MemoryLedger
from qtt_core.testing.simulation import SimulatedBackend, VirtualClock
from qtt_operator.documents import Places, RunContents, optimizer_setup
from qtt_operator.turn import RunContext
from tests.planner.test_turn import InProcessOptimizer, drive, results

Sequence = list[tuple[str, int, float]]
"""(configuration, epoch, score), in the order of the ledger."""


GOLDEN = {
    "search": {"space": "native", "hub": "tiny", "portfolio": "None", "poolSize": 16},
    "optimizer": {"algorithm": "QuickTune", "seed": 7, "costAware": False},
    "budget": {"maxSteps": 8},
}
"""Decides by scores alone: how long a pod took must not matter."""


def sequence_of(run: Run) -> Sequence:
    """As Redis holds it."""
    words = f"redis-cli --json HGETALL 'qtt:{{{run.uid}}}:cfg'"
    configs = json.loads(run.system.execute("redis-0", "sh", "-c", words))
    return [
        (canonical_json(json.loads(configs[done["c"]])), epoch, score)
        for done in of_kind(run.events(), "done")
        for epoch, score, _ in json.loads(done["epochs"])
    ]


def sequence_in_process(spec: Mapping[str, Any]) -> Sequence:
    """What this process decides: no cluster, no Redis, virtual time, a simulated trainer."""
    manifest = {
        "apiVersion": "quicktune.dev/v1alpha1", "kind": "TuningRun", "metadata": {"name": "sim"},
        "spec": spec,
    }  # fmt: skip
    run = parse_manifest(manifest)
    seed = run.spec.optimizer.seed
    assert seed is not None, "a run that draws its seed decides differently each time"
    identity = Identity(
        uid="golden", name="sim", seed=seed, space_id="native", space_sha="", spec_hash="",
        version="0", raw_spec=run.raw_spec,
    )  # fmt: skip
    hub = load_hub(str(run.spec.search.hub))
    contents = RunContents(
        spec=run.spec, identity=identity, hub=hub, places=Places(data="/d", root="/r")
    )
    clock = VirtualClock()
    backend, ledger = SimulatedBackend(clock=clock), MemoryLedger(clock=clock)
    context = RunContext(
        run=contents, setup=lambda state: optimizer_setup(contents, state),
        ledger=ledger, backend=backend, optimizer=InProcessOptimizer(), clock=clock,
    )  # fmt: skip

    async def play() -> Sequence:
        await drive(context, backend)
        configs = await ledger.configs()
        found = results(await ledger.read())
        return [(canonical_json(dict(configs[c])), epoch, score) for c, epoch, score in found]

    return asyncio.run(play())

"""A small run in a real ledger with the files beside it, for the verbs that read."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from qtt_core.hub import load_hub, select
from qtt_core.ledger.events import Close, Done, Fail, Open, Prepared, Run
from qtt_core.ledger.reply import Reply
from qtt_operator.redis_ledger import RedisLedger, next_epoch
from qtt_operator.store import EmbeddedStore

UID = "0123456789abcdef"
SPEC = {
    "dataset": {"claimName": "images"},
    "search": {"space": "native", "hub": "tiny"},
    "objective": {"metric": "top1"},
    "fidelity": {"max": 4, "step": 1, "stepsPerJob": "Auto"},
    "budget": {"maxSteps": 9},
}
CONFIGS = {
    "0": {"model": "mini_resnet", "opt": "adamw", "lr": 1e-3, "batch_size": 32, "drop": 0.0},
    "7": {"model": "mini_vit", "opt": "momentum", "lr": 1e-2, "batch_size": 16, "mixup": 0.2},
    "9": {"model": "mini_resnet", "opt": "sgd", "lr": 0.1, "batch_size": 64, "drop": 0.1},
}
WHY = {"rule": "highest gain", "mean": 0.9, "sd": 0.05, "rank": 2, "pool": 512, "cost_seconds": 3.0}


def step(c, frm, to, scores, *, dev, ck="ab"):
    """The decision and the result of one job."""
    epochs = tuple((frm + n, score, 1.5) for n, score in enumerate(scores, start=1))
    opened = Open(c=c, frm=frm, to=to, h=f"h{c}{to}", res=3.0, why=WHY)
    return [opened, Done(c=c, to=to, a=0, state="ok", epochs=epochs, dev=dev, ck=ck, bytes=9)]


def events():
    """c0 reaches .80, c7 .95 and falls back to .90, both kept; c9 runs out of memory."""
    prepared = Prepared(fingerprint="f", n_train=90, n_val=30, classes=3, dev=2.0)
    return [
        Run(
            name="rec", spec_hash="s", seed=1, algorithm="QuickTune", version="0",
            space_hash="x", spec=SPEC,
        ),
        Open(c="prepare", frm=0, to=1, h="hp", res=1.0),
        prepared,
        *step("0", 0, 1, [0.8], dev=2.0),
        *step("7", 0, 2, [0.7, 0.95], dev=4.0),
        *step("7", 2, 3, [0.9], dev=2.5),
        Open(c="9", frm=0, to=1, h="h9", res=3.0, why=WHY),
        Fail(c="9", to=1, a=0, state="oom", dev=1.0, msg="out of memory at batch 64"),
        Close(reason="BudgetExhausted", msg="5 of 5 steps used"),
    ]  # fmt: skip


async def _record(client):
    ledger = RedisLedger(client, UID, await next_epoch(client))
    for event in events():
        if isinstance(event, Open):
            reply, _ = await ledger.open(event, config=CONFIGS.get(event.c), job=f"job-{event.c}")
        elif isinstance(event, Done | Fail):
            reply, _ = await ledger.commit(event)
        else:
            reply, _ = await ledger.note(
                event, key=event.kind if event.kind != "prepared" else "prepare-f1"
            )
        assert reply is Reply.OK, event
    await client.aclose()


def write_run(state_dir):
    """The folder of the run `rec`; returns its path."""
    folder = state_dir / "rec"
    folder.mkdir(parents=True)
    with EmbeddedStore(folder) as store:
        asyncio.run(_record(store.client()))
    (folder / "uid").write_text(UID + "\n")
    hub = select(load_hub("tiny"), models=("mini_resnet", "mini_vit"))
    facts = {
        "name": "rec", "uid": UID, "root": str(folder), "data": "/data", "weights": "",
        "embedded": True, "spec": SPEC, "hub": hub.to_json(),
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts))
    status = {
        "phase": "Completed",
        "consumed": {"steps": 5, "gpuSeconds": 12},
        "best": {"configID": 7, "model": "mini_vit", "score": "0.9400", "fidelity": 2},
        "conditions": [
            {"type": "Complete", "status": "True", "reason": "BudgetExhausted", "message": "m"}
        ],
    }
    (folder / "status.yaml").write_text(yaml.safe_dump(status))
    run_dir = folder / "runs" / UID
    for name in ("c0/f1", "c7/f2", "c7/f3"):
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / "manifest.json").write_text("{}")
    for name, log, state in (("f2.a0", "first\n", "ok"), ("f3.a0", "second\n", "preempted")):
        attempt = run_dir / "c7" / "attempts" / name
        attempt.mkdir(parents=True)
        (attempt / "log.txt").write_text(log)
        (attempt / "result.json").write_text(json.dumps({"state": state, "reason": ""}))
    return folder


@dataclass(frozen=True)
class Recorded:
    """The run's state folder, and what its ledger holds."""

    state_dir: Path
    uid: str = UID
    configs: dict = field(default_factory=lambda: CONFIGS)

    @property
    def run_dir(self):
        return self.state_dir / "rec" / "runs" / UID

    @staticmethod
    def events():
        """As read from a store: with stream ids."""
        return [replace(event, id=f"{1000 * (n + 1)}-0") for n, event in enumerate(events())]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    write_run(folder)
    return Recorded(state_dir=folder)

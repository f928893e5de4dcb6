"""Real trainer pods on the real digits, made by hand as the operator is to make them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from manifests import claim, job, trainer_spec
from real_cluster import Kube

from qtt_core.hub import load_hub
from qtt_core.jobs import JobDocument, Limits, Paths, Task
from qtt_core.results import StepResult

pytestmark = pytest.mark.testbed

RUN = "5f0c2a54-digits"
MODEL = "mini_resnet"
CODES = {"containerName": "trainer", "operator": "In", "values": [64, 65, 70]}
POLICY = [
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {"action": "FailJob", "onExitCodes": CODES},
]  # fmt: skip


def document(**fields: Any) -> str:
    common = {
        "run_uid": RUN, "attempt": 0, "nonce": "0123456789abcdef", "task": Task(data="/data"),
        "paths": Paths(root="/checkpoints"), "limits": Limits(wall_s=300.0, threads=1), "seed": 3,
    }  # fmt: skip
    return json.dumps(JobDocument(**{**common, **fields}).to_json())


def step_to(fidelity: int, **fields: Any) -> str:
    hub = load_hub("tiny")
    config = {"model": MODEL, "opt": "adamw", "lr": 1e-3, "batch_size": 64, "sched": "cosine"}
    step: dict[str, Any] = {
        "step": f"c1-f{fidelity}", "config_id": 1, "config": config, "space_id": "native",
        "card": hub.card(MODEL).to_json(), "fidelity_from": fidelity - 1, "fidelity_to": fidelity,
        "max_fidelity": 4, **fields,
    }  # fmt: skip
    return document(**step)


def run(kube: Kube, name: str, command: str, text: str) -> tuple[int, StepResult]:
    """One Job to its end: the trainer's exit code and message."""
    spec = trainer_spec(RUN, command, text, "checkpoints")
    policy = {"podReplacementPolicy": "Failed", "podFailurePolicy": {"rules": POLICY}}
    kube.create(job(name, spec, **policy))
    kube.ended_job(name, seconds=240)
    ended = kube.pod_of(name)["status"]["containerStatuses"][0]["state"]["terminated"]
    return ended["exitCode"], StepResult.parse(
        ended["message"], nonce="0123456789abcdef", attempt=0
    )


def test_a_step_learns_the_digits_and_the_next_one_continues_it(
    restricted: Kube, digits: Callable[[Kube], str]
) -> None:
    digits(restricted)
    restricted.create(claim("checkpoints", "2Gi"))

    code, prepared = run(restricted, "prepare", "prepare", document())
    assert (code, prepared.state.value) == (0, "ok"), prepared.reason
    code, first = run(restricted, "c1-f1", "step", step_to(1))
    assert (code, first.state.value) == (0, "ok"), first.reason
    code, second = run(restricted, "c1-f2", "step", step_to(2))

    assert code == 0
    assert [epoch.epoch for epoch in second.epochs] == [2]
    assert first.epochs[0].value > 0.3  # three times chance after one epoch
    assert second.epochs[0].value > first.epochs[0].value - 0.1
    assert second.checkpoint_bytes > 100_000


def test_a_bad_job_fails_at_once_and_its_message_names_the_field(
    restricted: Kube, digits: Callable[[Kube], str]
) -> None:
    digits(restricted)
    restricted.create(claim("checkpoints", "2Gi"))

    code, told = run(restricted, "bad", "step", step_to(1, config_id=-1))

    assert code == 64
    assert told.state.value == "invalid_config"
    assert "config_id" in told.reason
    assert restricted.condition("job", "bad", "Failed")["reason"] == "PodFailurePolicy"  # type: ignore[index]

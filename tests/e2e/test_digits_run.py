"""`kubectl apply` of the digits: real trainer pods on real scans, until the budget is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledger_reader import epochs_of, events_of, faults, of_kind
from real_cluster import Kube, Testbed, until
from tuning_runs import Run

pytestmark = pytest.mark.chaos

Claim = Callable[[Kube], str]
EXAMPLE = Path("examples/digits/tuningrun-cluster.yaml")
RUN_SECONDS = 1500.0


def complete(kube: Kube) -> dict[str, Any]:
    """The run after `kubectl wait` for Complete; fails at once when it is Failed."""
    Run(kube=kube, system=kube, name="digits").complete(seconds=RUN_SECONDS)
    kube.kubectl("wait", "--for=condition=Complete", "tnr/digits", "--timeout=5s")
    return kube.get("tuningrun", "digits")


def folder_of(kube: Kube, testbed: Testbed, claim: str) -> Path:
    """Where a claim's volume lies on the node."""
    volume: str = kube.get("persistentvolumeclaim", claim)["spec"]["volumeName"]
    return testbed.folder / "volumes" / volume


def check(kube: Kube, operator: Kube, testbed: Testbed, steps: int) -> list[dict[str, str]]:
    """What holds of every finished run; returns its events."""
    run = kube.get("tuningrun", "digits")
    uid, status = run["metadata"]["uid"], run["status"]
    events = events_of(operator, uid)

    assert faults(events, steps) == []
    assert sum(map(len, epochs_of(events).values())) == status["consumed"]["steps"]
    assert [e["reason"] for e in of_kind(events, "close")] == ["BudgetExhausted"]
    runs = folder_of(kube, testbed, "digits-checkpoints") / "runs"
    assert (runs / uid / status["best"]["checkpoint"] / "state.pt").stat().st_size > 100_000
    return events


def test_the_example_survives_kill_9_of_the_operator_and_runs_to_its_best_model(
    restricted: Kube, operator: Kube, testbed: Testbed, digits: Claim, root: Path
) -> None:
    digits(restricted)
    restricted.apply(root / EXAMPLE)
    uid = restricted.get("tuningrun", "digits")["metadata"]["uid"]
    until(
        "some steps are told and another one runs",
        lambda: (
            sum(map(len, epochs_of(events_of(operator, uid)).values())) >= 8
            and any(not job["status"].get("conditions") for job in restricted.items("job"))
        ),
        seconds=RUN_SECONDS,
    )
    (pod,) = operator.items("pod", "app.kubernetes.io/name=quicktune-operator")
    restarts = pod["status"]["containerStatuses"][0]["restartCount"]

    testbed.signal_container(pod, "KILL")

    name = pod["metadata"]["name"]
    until(
        "the operator was started again",
        lambda: operator.container(name)["restartCount"] == restarts + 1,
    )
    status = complete(restricted)["status"]
    assert status["consumed"]["steps"] == 24
    assert float(status["best"]["score"]) > 0.5  # five times chance; how good is for `make bench`
    assert status["best"]["model"] in restricted.kubectl("get", "tnr")
    epochs = {event["ep"] for event in check(restricted, operator, testbed, 24)}
    assert len(epochs) == 2  # both leaders wrote, one after the other

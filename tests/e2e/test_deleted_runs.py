"""`kubectl delete tnr`: never hangs; Jobs go, volumes and ledger as `deletionPolicy` says."""

from __future__ import annotations

import pytest
from conftest import Simulate
from real_cluster import Kube, until
from tuning_runs import Run, simulated

pytestmark = pytest.mark.testbed

DAY = 24 * 3600


def lifetimes(run: Run, uid: str) -> dict[str, int]:
    """Seconds each key of a run has left in Redis; -1: for ever."""
    keys = run.system.execute("redis-0", "redis-cli", "--scan", "--pattern", f"*{uid}*").split()
    return {key: int(run.system.execute("redis-0", "redis-cli", "TTL", key)) for key in keys}


def claims(kube: Kube) -> set[str]:
    return {claim["metadata"]["name"] for claim in kube.items("persistentvolumeclaim")}


def test_a_kept_run_leaves_its_volume_and_its_ledger_for_thirty_days(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, budget={"maxSteps": 1})
    run.complete()
    uid = run.uid
    assert set(lifetimes(run, uid).values()) == {-1}

    restricted.delete("tuningrun", "sim", "--timeout=5s")

    until("its Jobs are gone", lambda: not restricted.items("job"))
    until("its keys expire", lambda: -1 not in lifetimes(run, uid).values())
    assert all(29 * DAY < left <= 30 * DAY for left in lifetimes(run, uid).values())
    assert "sim-checkpoints" in claims(restricted)


def test_a_deleted_run_takes_its_volume_and_its_ledger_along_in_the_middle_of_a_step(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, seconds=30, deletionPolicy="Delete")
    run.until_working(1)
    uid = run.uid
    assert "sim-checkpoints" in claims(restricted)

    restricted.delete("tuningrun", "sim", "--timeout=5s")

    until("its pods are gone", lambda: not restricted.items("pod"))
    until("its volume is gone", lambda: claims(restricted) == {"data"})
    until("its keys are gone", lambda: lifetimes(run, uid) == {})


def test_a_run_of_the_same_name_begins_anew(restricted: Kube, simulate: Simulate) -> None:
    first = simulate(restricted, seconds=30, budget={"maxSteps": 2})
    first.until_working(1)
    old = first.uid

    restricted.delete("tuningrun", "sim", "--timeout=5s")
    restricted.create(simulated(budget={"maxSteps": 2}))

    assert first.uid != old
    first.complete()
    assert first.faults(2) == []


def test_a_policy_that_was_changed_in_the_middle_of_a_run_acts(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, budget={"maxSteps": 2})
    run.until_told(1)
    run.patch(deletionPolicy="Delete")
    run.complete()

    restricted.delete("tuningrun", "sim", "--timeout=5s")

    until("its volume is gone", lambda: claims(restricted) == {"data"})


@pytest.mark.chaos
def test_a_run_that_was_deleted_while_nobody_looked_is_parted_with_later(
    restricted: Kube, simulate: Simulate, operator: Kube
) -> None:
    run = simulate(restricted, budget={"maxSteps": 1})
    run.complete()
    uid, workload = run.uid, "deployment/quicktune-operator"
    operator.kubectl("scale", workload, "--replicas=0")
    pods = "app.kubernetes.io/name=quicktune-operator"
    until("the operator is away", lambda: not operator.items("pod", pods))

    restricted.delete("tuningrun", "sim", "--timeout=5s")
    assert set(lifetimes(run, uid).values()) == {-1}
    operator.kubectl("scale", workload, "--replicas=1")

    until("its keys expire", lambda: -1 not in lifetimes(run, uid).values(), seconds=120)

"""What a person does to a run while it works: pause it, scale it, end it, give it more, delete it.

Steps only pretend to train; operator, Redis, Jobs, pods and volumes are real.
"""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Simulate
from ledger_reader import of_kind
from real_cluster import Kube, until

pytestmark = pytest.mark.testbed


# --- pause and go on ------------------------------------------------------------------------------


def test_a_drained_run_lets_its_open_steps_end_and_goes_on_when_resumed(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, seconds=4, parallelism=2, budget={"maxSteps": 4})
    run.until_working(2)
    open_then = run.live()

    run.patch(suspend=True)

    run.until_condition("Suspended", "True", "UserRequested")
    until("its Jobs ended too", lambda: not run.live(), seconds=10)
    assert {name: run.ends()[name] for name in open_then} == dict.fromkeys(open_then, "done")
    told = run.told()
    run.patch(suspend=False)
    run.complete()
    assert told < 4 == run.told()
    assert run.faults(4) == []


def test_an_evicted_run_gives_its_pods_up_at_once_and_no_attempt_is_used(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, seconds=15, parallelism=2, budget={"maxSteps": 2})
    run.until_working(2)
    before = {job["metadata"]["name"]: job["metadata"]["uid"] for job in run.jobs()}

    run.patch(suspend=True, suspendPolicy="Evict")

    until("no pod is left", lambda: not run.pods())
    run.until_condition("Suspended", "True", "UserRequested")
    assert all(job["spec"]["suspend"] for job in run.jobs())
    assert run.told() == 0
    run.patch(suspend=False)
    run.complete()
    assert set(run.ends()) == set(before)
    assert of_kind(run.events(), "retry", "cancel") == []
    assert {job["metadata"]["name"]: job["metadata"]["uid"] for job in run.jobs()} == before
    assert run.faults(2) == []


# --- ends -----------------------------------------------------------------------------------------


def test_a_stopped_run_deletes_its_open_steps_and_keeps_its_results(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, seconds=12, parallelism=2, budget={"maxSteps": 50})
    run.until_told(2)
    run.until_working(2)

    run.patch(stop=True)

    status = run.complete("Stopped")
    assert status["consumed"]["steps"] == run.told() >= 2
    assert float(status["best"]["score"]) > 0
    assert "cancel" in run.ends().values()
    until("no pod works", lambda: not run.working())
    until("its Jobs are gone", lambda: not run.live())


def test_a_reached_goal_ends_the_run(restricted: Kube, simulate: Simulate) -> None:
    goal = {"metric": "top1", "goal": "0.02"}

    run = simulate(restricted, objective=goal, budget={"maxSteps": 50})

    status = run.complete("GoalReached")
    assert float(status["best"]["observedScore"]) >= 0.02
    assert status["consumed"]["steps"] < 5


def test_a_raised_budget_reopens_a_run_and_a_lowered_one_ends_it(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, budget={"maxSteps": 2})
    run.complete()
    restricted.kubectl("wait", "--for=condition=Complete", "tnr/sim", "--timeout=5s")

    run.patch(budget={"maxSteps": 40})

    run.until_condition("Complete", "False")
    run.until_told(4)
    run.patch(budget={"maxSteps": 3})
    run.complete()
    told = run.told()
    assert 4 <= told <= 6
    assert run.status()["consumed"]["steps"] == told
    assert [e["k"] for e in of_kind(run.events(), "close", "reopen")] == [
        "close", "reopen", "close",
    ]  # fmt: skip
    assert run.faults(40) == []


def test_a_finished_run_is_deleted_when_its_time_is_over(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, budget={"maxSteps": 1}, ttlSecondsAfterFinished=30)

    run.complete()

    until("it is gone", lambda: not restricted.items("tuningrun"))
    until("its Jobs are gone", lambda: not restricted.items("job"))


# --- scale and change -----------------------------------------------------------------------------


def test_kubectl_scale_raises_and_lowers_what_runs_at_once(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, seconds=6, parallelism=1, budget={"maxSteps": 60})
    run.until_working(1)

    restricted.kubectl("scale", "tnr/sim", "--replicas=3")

    run.until_working(3)
    until("status says 3", lambda: run.status()["jobs"]["running"] == 3)
    chosen = restricted.kubectl("get", "pods", "-l", run.status()["selector"], "-o", "name")
    assert len(chosen.split()) >= 3
    restricted.kubectl("scale", "tnr/sim", "--replicas=1")
    run.until_working(1)
    run.until_told(run.told() + 1)
    assert set(run.ends().values()) == {"done"}  # nobody was killed for it
    assert len(run.working()) <= 1
    run.patch(stop=True)
    run.complete("Stopped")


def test_parallelism_zero_opens_nothing(restricted: Kube, simulate: Simulate) -> None:
    run = simulate(restricted, parallelism=0, budget={"maxSteps": 1})
    run.until_condition("Accepted", "True")

    restricted.kubectl("scale", "tnr/sim", "--replicas=1")

    run.complete()
    assert run.faults(1) == []


def test_a_changed_template_acts_on_the_next_steps_only(
    restricted: Kube, simulate: Simulate
) -> None:
    run = simulate(restricted, seconds=5, budget={"maxSteps": 3})
    (pod,) = run.until_working(1)
    first = pod["metadata"]["labels"]["job-name"]
    template: dict[str, Any] = run.get()["spec"]["template"]
    template["metadata"] = {"labels": {"colour": "green"}}
    template["spec"]["containers"][0]["env"] = [{"name": "QTT_SLEEP", "value": "0"}]

    run.patch(template=template)

    run.complete()
    assert run.ends()[first] == "done"
    colours = {
        job["metadata"]["name"]: job["spec"]["template"]["metadata"]["labels"].get("colour")
        for job in run.jobs()
    }
    assert colours.pop(first) is None
    assert set(colours.values()) == {"green"}
    assert len(colours) == 2
    assert run.faults(3) == []

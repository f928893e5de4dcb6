"""kill -9 of the operator at each of its write points (30-kubernetes 3.3); two operators at once.

One run goes through all deaths, one step at a time; what it decided must be what an undisturbed run
decides, in this process, with neither cluster nor store.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Simulate
from golden import GOLDEN, sequence_in_process, sequence_of
from operator_process import LEASE_SECONDS, Operators, operators
from real_cluster import Kube, until

from qtt_operator.failpoints import EXIT_CODE

pytestmark = pytest.mark.chaos

POINTS = (
    "elected", "noted", "opened", "created", "noted", "asked", "opened", "created", "ended",
    "committed", "told", "forgotten", "status:2",
)  # fmt: skip


@pytest.fixture
def beside(operator: Kube, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Operators]:
    """Operators beside the cluster, their logs in the report of a test that fails."""
    with operators(operator, tmp_path) as made:
        yield made
        report = getattr(request.node, "rep_call", None)
        if report is None or report.failed:
            print(made.log())  # noqa: T201


def test_an_operator_that_dies_at_every_write_point_decides_as_if_it_had_not(
    restricted: Kube, simulate: Simulate, beside: Operators
) -> None:
    run = simulate(restricted, **GOLDEN)

    for point in POINTS:
        process = beside.start(point)
        assert beside.died(process) == EXIT_CODE, f"{point}\n{beside.log()}"
    beside.start()
    run.complete(seconds=240)

    assert run.faults(8) == []
    assert sequence_of(run) == sequence_in_process(run.get()["spec"])
    assert run.status()["consumed"]["steps"] == 8


def test_a_retry_is_recorded_once_when_the_operator_dies_right_after_it(
    restricted: Kube, simulate: Simulate, beside: Operators
) -> None:
    run = simulate(restricted, seconds=6, budget={"maxSteps": 2})
    first = beside.start("retried")
    (pod,) = run.until_working(1)
    restricted.delete("pod", pod["metadata"]["name"], "--wait=false")

    assert beside.died(first) == EXIT_CODE
    beside.start()

    run.complete()
    assert run.faults(2) == []
    (retry,) = (e for e in run.events() if e["k"] == "retry")
    assert retry["a"] == "1"
    assert retry["reason"] in {"preempted", "Killed"}  # by how busy the node is


def test_a_leader_frozen_past_its_lease_writes_nothing_more(
    restricted: Kube, simulate: Simulate, beside: Operators
) -> None:
    run = simulate(restricted, seconds=1, parallelism=2, budget={"maxSteps": 8})
    first = beside.start()
    run.until_told(2)
    second = beside.start()
    beside.kill(first, signal.SIGSTOP)
    until(  # not before it has started a worker and read the run
        "the other one leads",
        lambda: {e["ep"] for e in run.events()} > {run.events()[0]["ep"]},
        seconds=180,
    )

    beside.kill(first, signal.SIGCONT)

    assert beside.died(first, LEASE_SECONDS * 15) != 0
    run.complete()
    assert second.poll() is None
    assert run.faults(8) == []
    epochs = [int(e["ep"]) for e in run.events()]
    assert epochs == sorted(epochs)
    assert len(set(epochs)) == 2


SKEW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, now);
  const char *skew = getenv("TEST_CLOCK_SKEW");
  if (id == CLOCK_REALTIME && skew) now->tv_sec += atol(skew);
  return code;
}
"""


@pytest.fixture
def skewed(tmp_path: Path) -> Path:
    """A library that shifts the wall clock of one process by $TEST_CLOCK_SKEW seconds."""
    compiler = shutil.which("gcc") or pytest.fail("a C compiler is needed")
    source, library = tmp_path / "skew.c", tmp_path / "skew.so"
    source.write_text(SKEW)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def test_leaders_whose_clocks_are_hours_apart_share_a_run(
    restricted: Kube, simulate: Simulate, beside: Operators, skewed: Path
) -> None:
    """Charges come from pods, the age of a Lease from our own clock, dates of events from Redis."""
    run = simulate(restricted, seconds=1, parallelism=2, budget={"maxSteps": 9})
    for turn, skew in enumerate((7200, -7200, 0)):
        process = beside.start(LD_PRELOAD=str(skewed), TEST_CLOCK_SKEW=str(skew))
        if skew:
            run.until_told(3 * (turn + 1))
            beside.kill(process)

    run.complete()

    assert run.faults(9) == []
    ends = [e for e in run.events() if e["k"] in {"done", "retry", "cancel"}]
    assert {e["k"] for e in ends} == {"done"}
    assert max(float(e["dev"]) for e in ends) < 120
    times = [int(e["id"].partition("-")[0]) for e in run.events()]
    assert times == sorted(times)
    assert times[-1] - times[0] < 600_000


@pytest.mark.slow
def test_random_deaths_decide_the_same(
    restricted: Kube, simulate: Simulate, beside: Operators
) -> None:
    """The golden run once more; when and where its operators die is drawn."""
    seed = random.SystemRandom().randrange(10**9)
    rng = random.Random(seed)
    run = simulate(restricted, **GOLDEN)
    deaths = []
    for _ in range(12):
        deaths.append(f"{rng.choice(POINTS).partition(':')[0]}:{rng.randint(1, 3)}")
        process = beside.start(deaths[-1])
        until(
            "it died or the run is over",
            lambda p=process: p.poll() is not None or run.condition("Complete")[0] == "True",
            seconds=240,
        )
        beside.kill(process)
    beside.start()
    run.complete(seconds=240)

    assert run.faults(8) == [], f"seed {seed}: {deaths}"
    assert sequence_of(run) == sequence_in_process(run.get()["spec"]), f"seed {seed}: {deaths}"
    assert json.loads(run.events()[-1]["budget"]) == {"maxSteps": 8}

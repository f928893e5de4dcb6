"""A real Prometheus looks at a run of the digits: panels have data, alerts fire and resolve.

With QTT_PANELS=FILE what every panel showed is kept there, for docs/panels.py.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import Simulate
from prometheus_server import Prometheus, program, prometheus, sooner
from real_cluster import Kube, Object, RefusedError, Testbed, until

pytestmark = [pytest.mark.testbed, pytest.mark.chaos]

Claim = Callable[[Kube], str]
BOARDS = ("fleet", "run", "operator")
WORKLOAD = "deployment/quicktune-operator"
PODS = "app.kubernetes.io/name=quicktune-operator"
RUN_SECONDS = 900.0

KILL_A_WORKER = """
import os, pathlib, signal
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    process = int(path.parent.name)
    if process != os.getpid() and b"optimizer_worker" in path.read_bytes():
        os.kill(process, signal.SIGKILL)
        print(process)
"""
NEVER_ON_A_GOOD_DAY = {
    "quicktune_optimizer_fallback_asks_total",  # is there, and 0: no increase to be shown
    "quicktune_reconcile_errors_total",
}
"""Counters with labels that only faults give values, beyond those that the test makes."""


@pytest.fixture
def scraped(operator: Kube, root: Path, tmp_path: Path, testbed: Testbed) -> Iterator[Prometheus]:
    """Prometheus with the chart's rules, their times ten times shorter."""
    binary = program()
    if binary is None:
        pytest.skip("no Prometheus on this machine: make check-chart fetches it from Debian")
    rules = (root / "helm/quicktune-operator/files/alerts.yaml").read_text()
    with prometheus(binary, tmp_path, sooner(rules), operator.namespace) as found:
        yield found


def asked(chart: Path, namespace: str) -> list[tuple[str, str, str, str]]:
    """(dashboard, panel's title, legend, expression) of every query, with choices put in."""
    found = []
    for name in BOARDS:
        board: Object = json.loads((chart / "dashboards" / f"{name}.json").read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"]
                for variable, value in {
                    "$__rate_interval": "20s", "$__range": "10m", "$namespace": namespace,
                    "$run": "digits",
                }.items():  # fmt: skip
                    expression = expression.replace(variable, value)
                found.append((name, panel["title"], target["legendFormat"], expression))
    return found


def start_digits(root: Path, kube: Kube, digits: Claim) -> None:
    """The example with one small model, an epoch a Job."""
    digits(kube)
    manifest = yaml.safe_load((root / "examples/digits/tuningrun-cluster.yaml").read_text())
    manifest["spec"]["search"]["models"] = ["mini_resnet"]
    manifest["spec"]["search"]["overrides"]["data_augmentation"] = "none"
    manifest["spec"]["fidelity"] = {"max": 4, "step": 1, "stepsPerJob": 1}
    manifest["spec"]["budget"] = {"maxSteps": 8}
    kube.apply(text=yaml.safe_dump(manifest))


def told(kube: Kube) -> int:
    """Steps that the status counts."""
    found: int = kube.get("tuningrun", "digits")["status"]["consumed"]["steps"]
    return found


def kill_a_trainer(kube: Kube, testbed: Testbed) -> bool:
    """Whether a step lost its trainer: the one last begun, it has most before it."""
    begun = {}
    for pod in kube.items("pod", "app.kubernetes.io/component=step"):
        (status,) = pod["status"].get("containerStatuses") or [{}]
        if running := status.get("state", {}).get("running"):
            begun[running["startedAt"]] = pod
    if not begun:
        return False
    try:
        testbed.signal_container(begun[max(begun)])
    except RefusedError:  # it ended by itself since
        return False
    return True


def test_every_panel_has_data_after_a_run_that_lost_a_pod_and_a_worker(
    scraped: Prometheus, operator: Kube, restricted: Kube, digits: Claim, root: Path,
    testbed: Testbed,
) -> None:  # fmt: skip
    begun = time.time()
    start_digits(root, restricted, digits)
    until("two steps are told", lambda: told(restricted) >= 2, seconds=RUN_SECONDS, every=1.0)
    assert operator.execute(WORKLOAD, "python", "-c", KILL_A_WORKER)
    until("a trainer is killed", lambda: kill_a_trainer(restricted, testbed), seconds=120)
    testbed.signal_container(operator.get("pod", "redis-0"))  # a call of it fails
    until(
        "the run is complete",
        lambda: restricted.condition("tuningrun", "digits", "Complete"),
        seconds=RUN_SECONDS, every=1.0,
    )  # fmt: skip
    until("it is scraped", lambda: scraped.now('quicktune_runs{phase="Completed"} > 0'))

    shown = [
        (*about, expression, scraped.since(begun, expression))
        for *about, expression in asked(root / "helm/quicktune-operator", restricted.namespace)
    ]
    if os.environ.get("QTT_PANELS"):
        Path(os.environ["QTT_PANELS"]).write_text(json.dumps(shown))

    empty = {expression for *_, expression, series in shown if not series}
    names = re.compile(r"quicktune_\w+")
    assert {e for e in empty if not set(names.findall(e)) <= NEVER_ON_A_GOOD_DAY} == set()
    choices = scraped.get("label/run/values", **{"match[]": "quicktune_run_info"})
    assert choices == ["digits"]


def test_the_three_gravest_alerts_fire_and_resolve(
    scraped: Prometheus, operator: Kube, simulate: Simulate, restricted: Kube
) -> None:
    """Nobody is there, nobody leads, the store is away."""
    simulate(restricted, seconds=1, parallelism=2, budget={"maxSteps": 1000})

    def fires(name: str, *, seconds: float = 90.0) -> None:
        until(f"{name} fires", lambda: name in scraped.firing(), seconds=seconds)

    def is_silent(*names: str) -> None:
        until(f"{names} are silent", lambda: not {*names} & scraped.firing(), seconds=120)

    is_silent("QuickTuneOperatorDown", "QuickTuneNoLeader", "QuickTuneStoreUnavailable")
    operator.kubectl("scale", "statefulset/redis", "--replicas=0")
    try:
        fires("QuickTuneStoreUnavailable", seconds=180)
    finally:
        operator.kubectl("scale", "statefulset/redis", "--replicas=1")
    is_silent("QuickTuneStoreUnavailable")

    operator.kubectl("scale", WORKLOAD, "--replicas=0")
    fires("QuickTuneOperatorDown")
    until("its pod is gone", lambda: not operator.items("pod", PODS), seconds=90)
    hold_the_lease(operator, 60)
    operator.kubectl("scale", WORKLOAD, "--replicas=1")
    fires("QuickTuneNoLeader")
    assert "QuickTuneOperatorDown" not in scraped.firing()
    is_silent("QuickTuneOperatorDown", "QuickTuneNoLeader")


def hold_the_lease(operator: Kube, seconds: int) -> None:
    """Somebody who does nothing leads for so long."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    spec = {
        "holderIdentity": "nobody", "leaseDurationSeconds": seconds, "renewTime": now,
        "acquireTime": now,
    }  # fmt: skip
    body = json.dumps({"spec": spec})
    operator.kubectl("patch", "lease", "quicktune-operator", "--type=merge", "-p", body)

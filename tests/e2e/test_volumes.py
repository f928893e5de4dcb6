"""Claims and checkpoints on a real cluster, written and deleted by the real trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ledger_reader import events_of, faults, of_kind
from manifests import claim
from real_cluster import Kube, Testbed, until
from tuning_runs import Run

pytestmark = pytest.mark.testbed

Claim = Callable[[Kube], str]
EXAMPLE = Path("examples/digits/tuningrun-cluster.yaml")
RUN_SECONDS = 900.0
TEMPLATE = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}


def manifest(root: Path, **spec: Any) -> str:
    """The digits with one small model, one epoch a Job and a small budget; `spec` overwrites."""
    found: dict[str, Any] = yaml.safe_load((root / EXAMPLE).read_text())
    found["spec"]["search"]["models"] = ["mini_resnet"]
    found["spec"]["search"]["overrides"]["data_augmentation"] = "none"
    found["spec"]["fidelity"] = {"max": 4, "step": 1, "stepsPerJob": 1}
    found["spec"] |= {"budget": {"maxSteps": 6}, "parallelism": 2, **spec}
    return yaml.safe_dump(found)


def complete(kube: Kube) -> dict[str, Any]:
    """The run's status once it is Complete; fails at once when it is Failed."""
    return Run(kube=kube, system=kube, name="digits").complete(seconds=RUN_SECONDS)


def claims(kube: Kube) -> dict[str, dict[str, Any]]:
    """The claims that the operator made, by name."""
    found = kube.items("persistentvolumeclaim", "app.kubernetes.io/managed-by=quicktune-operator")
    return {item["metadata"]["name"]: item for item in found}


def run_folder(kube: Kube, testbed: Testbed, name: str, below: str = "") -> Path:
    """Where the run's files on a claim lie on the node."""
    volume: str = kube.get("persistentvolumeclaim", name)["spec"]["volumeName"]
    uid = kube.get("tuningrun", "digits")["metadata"]["uid"]
    return testbed.folder / "volumes" / volume / below / "runs" / uid


def weights(folder: Path) -> set[str]:
    """Checkpoints below a run's folder."""
    return {str(path.parent.relative_to(folder)) for path in folder.glob("c*/f*/state.pt")}


def test_every_configuration_trains_on_a_claim_of_its_own(
    restricted: Kube, operator: Kube, testbed: Testbed, digits: Claim, root: Path
) -> None:
    digits(restricted)

    checkpoint = {"scope": "Config", "volumeClaimTemplate": TEMPLATE}
    restricted.apply(text=manifest(root, checkpoint=checkpoint))

    status = complete(restricted)
    uid = restricted.get("tuningrun", "digits")["metadata"]["uid"]
    assert faults(events_of(operator, uid), 6) == []
    best = status["best"]
    until("claims without a kept checkpoint are gone", lambda: len(claims(restricted)) == 1)
    ((name, found),) = claims(restricted).items()
    assert name.startswith(f"digits-c{best['configID']}-")
    assert "ownerReferences" not in found["metadata"]
    folder = run_folder(restricted, testbed, name)
    assert weights(folder) == {best["checkpoint"]}
    assert (folder / "dataset.json").is_file()  # described again by the step itself
    assert len({event["c"] for event in of_kind(events_of(operator, uid), "done")}) > 1


def test_a_finished_run_leaves_the_best_checkpoint_and_lets_nothing_of_it_be_lost(
    restricted: Kube, operator: Kube, testbed: Testbed, digits: Claim, root: Path
) -> None:
    digits(restricted)

    restricted.apply(text=manifest(root))

    best = complete(restricted)["best"]
    folder = run_folder(restricted, testbed, "digits-checkpoints")
    assert weights(folder) == {best["checkpoint"]}
    assert {path.name for path in folder.glob("c*")} == {best["checkpoint"].split("/")[0]}
    assert restricted.condition("job", "digits-gc-0", "Complete")
    uid = restricted.get("tuningrun", "digits")["metadata"]["uid"]
    (note,) = [e for e in of_kind(events_of(operator, uid), "note") if e["what"] == "garbage"]
    assert note["new"]

    restricted.delete("tuningrun", "digits")  # Retain: the claim stays, the ledger for 30 days

    left = until(
        "the ledger expires",
        lambda: int(operator.execute("redis-0", "redis-cli", "TTL", f"qtt:{{{uid}}}:log")) + 1,
    )
    assert 29 * 86400 < left <= 30 * 86400 + 1
    assert (folder / best["checkpoint"] / "state.pt").is_file()


def test_a_run_on_a_shared_claim_is_wiped_before_it_goes(
    restricted: Kube, operator: Kube, testbed: Testbed, digits: Claim, root: Path
) -> None:
    digits(restricted)
    restricted.create(claim("shared", "1Gi"))
    checkpoint = {"claimName": "shared", "subPath": "team"}
    restricted.apply(text=manifest(root, checkpoint=checkpoint, deletionPolicy="Delete"))
    uid = restricted.get("tuningrun", "digits")["metadata"]["uid"]
    until(
        "a step is told",
        lambda: of_kind(events_of(operator, uid), "done"),
        seconds=RUN_SECONDS, every=1.0,
    )  # fmt: skip
    folder = run_folder(restricted, testbed, "shared", "team")
    assert weights(folder)
    (folder.parent / "another-run").mkdir()

    restricted.delete("tuningrun", "digits", "--timeout=120s")

    assert not folder.exists()
    assert (folder.parent / "another-run").is_dir()
    until(
        "the ledger is deleted",
        lambda: operator.execute("redis-0", "redis-cli", "EXISTS", f"qtt:{{{uid}}}:log") == "0\n",
    )
    assert restricted.get("persistentvolumeclaim", "shared")["status"]["phase"] == "Bound"


def without_operator(operator: Kube) -> None:
    """End the operator's pod and wait until it is away."""
    operator.kubectl("scale", "deployment/quicktune-operator", "--replicas=0")
    pods = "app.kubernetes.io/name=quicktune-operator"
    until("the operator's pod is away", lambda: not operator.items("pod", pods))


def lose_everything(kube: Kube, operator: Kube, uid: str) -> None:
    """An empty Redis, and no Job that could tell anything."""
    keys = operator.execute("redis-0", "redis-cli", "KEYS", f"qtt:{{{uid}}}:*").split()
    operator.execute("redis-0", "redis-cli", "DEL", *keys)
    kube.kubectl("delete", "jobs", "--all", "--timeout=120s")


def scored(kube: Kube) -> str:
    """The best checkpoint's score on held-out images, once it was measured."""
    return str(kube.get("tuningrun", "digits")["status"]["best"].get("testScore", ""))


@pytest.mark.alone
def test_a_lost_ledger_is_read_from_the_volume_and_the_best_is_scored_at_last(
    restricted: Kube, operator: Kube, testbed: Testbed, digits: Claim, root: Path
) -> None:
    digits(restricted)
    restricted.apply(text=manifest(root))
    uid = restricted.get("tuningrun", "digits")["metadata"]["uid"]
    until(
        "three steps are counted",
        lambda: restricted.get("tuningrun", "digits")["status"]["consumed"]["steps"] >= 3,
        seconds=RUN_SECONDS, every=1.0,
    )  # fmt: skip
    try:
        without_operator(operator)
        told = [e for e in of_kind(events_of(operator, uid), "done")]
        lose_everything(restricted, operator, uid)
    finally:
        operator.kubectl("scale", "deployment/quicktune-operator", "--replicas=1")

    complete(restricted)

    events = events_of(operator, uid)
    assert faults(events, 6) == []
    assert [e for e in of_kind(events, "note") if e["what"] == "recovery" and e["new"]]
    again = {(e["c"], e["to"]): e["ck"] for e in of_kind(events, "done")}
    newest = {e["c"]: e for e in told}
    kept = {c: again.get((c, e["to"])) for c, e in newest.items()}
    assert kept == {c: e["ck"] for c, e in newest.items()}  # read, not trained again

    restricted.kubectl("annotate", "tuningrun", "digits", "quicktune.dev/evaluate=t1")

    score = until("the best is scored", lambda: scored(restricted), seconds=RUN_SECONDS, every=1.0)
    assert 0.0 <= float(score) <= 1.0

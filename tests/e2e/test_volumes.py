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

    def ended() -> dict[str, Any] | None:
        failed = kube.condition("tuningrun", "digits", "Failed")
        assert failed is None, failed
        return kube.condition("tuningrun", "digits", "Complete")

    until("the run is Complete", ended, seconds=RUN_SECONDS, every=1.0)
    status: dict[str, Any] = kube.get("tuningrun", "digits")["status"]
    return status


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
    mounted = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in restricted.items("pod", "app.kubernetes.io/component=step")
        for volume in pod["spec"]["volumes"]
        if volume["name"] == "checkpoints"
    }
    configs = {event["c"] for event in of_kind(events_of(operator, uid), "done")}
    assert {name.split("-")[1] for name in mounted} == {f"c{c}" for c in configs}


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

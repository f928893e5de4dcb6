"""Weights and data reach the pods: a Job that fetches, a folder that is pushed, an example for a
stock cluster.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ledger_reader import events_of, of_kind
from manifests import BUSYBOX, OPERATOR, TRAINER, TRAINER_USER, UNPRIVILEGED, claim
from real_cluster import Kube, Object, Testbed, until

from qtt_core.hub import load_hub

pytestmark = pytest.mark.testbed

PORT = 8000
RUN_SECONDS = 900.0
TAG = "test_resnet.r160_in1k"
SERVE = f"""
folder=$(python -c 'import qtt_trainer; print(qtt_trainer.__path__[0])')/weights
mkdir -p /tmp/www/timm/{TAG}/resolve/main
cp "$folder/test_resnet.safetensors" /tmp/www/timm/{TAG}/resolve/main/model.safetensors
exec python -m http.server {PORT} --directory /tmp/www
"""


def hub_server() -> Object:
    """A plain file server in the hub's place, with one model's weights."""
    container = {
        "name": "hub", "image": TRAINER, "command": ["sh", "-c", SERVE],
        "securityContext": UNPRIVILEGED, "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
    }  # fmt: skip
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "hub"},
        "spec": {
            "containers": [container], "securityContext": TRAINER_USER,
            "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": False,
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }  # fmt: skip


def own_hub() -> Object:
    """A ConfigMap of one card whose weights come from a hub."""
    card = replace(load_hub("tiny").card("mini_resnet"), tag=TAG, weights="hub", default=True)
    return {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "hub"},
        "data": {"hub.json": json.dumps({"cards": [card.to_json()]})},
    }  # fmt: skip


def tuning_run(root: Path, search: Object, *, endpoint: str = "", steps: int = 2) -> Object:
    """The digits on models of another hub, cut short."""
    run: Object = yaml.safe_load((root / "examples/digits/tuningrun-cluster.yaml").read_text())
    run["spec"]["search"] = {
        **search, "space": "native",
        "overrides": {**run["spec"]["search"]["overrides"], "data_augmentation": "none"},
    }  # fmt: skip
    run["spec"] |= {"budget": {"maxSteps": steps}, "parallelism": 1}
    (trainer,) = run["spec"]["template"]["spec"]["containers"]
    trainer["resources"]["limits"].pop("nvidia.com/gpu")
    if endpoint:
        trainer["env"].append({"name": "HF_ENDPOINT", "value": endpoint})
    return run


def ended(kube: Kube, kind: str, reason: str = "") -> Object:
    """The condition of the run `digits`, once it is there and has the reason."""

    def look() -> Object | None:
        conditions = kube.get("tuningrun", "digits").get("status", {}).get("conditions", [])
        found = {c["type"]: c for c in conditions}
        failed = found.get("Failed", {}).get("status") == "True"
        assert not failed, found
        seen = found.get(kind, {})
        wanted = seen.get("reason") == reason if reason else seen.get("status") == "True"
        return seen if wanted else None

    return until(f"{kind} {reason}", look, seconds=RUN_SECONDS, every=0.5)


def mounts(job: Object) -> dict[str, tuple[str, bool]]:
    """Path -> (claim, read-only)."""
    pod = job["spec"]["template"]["spec"]
    claims = {v["name"]: v.get("persistentVolumeClaim") for v in pod["volumes"]}
    return {
        m["mountPath"]: (claims[m["name"]]["claimName"], m.get("readOnly", False))
        for m in pod["containers"][0]["volumeMounts"]
        if claims[m["name"]] is not None
    }


def folder_of(kube: Kube, testbed: Testbed, name: str) -> Path:
    """Where a claim's volume lies on the node."""
    volume: str = kube.get("persistentvolumeclaim", name)["spec"]["volumeName"]
    return testbed.folder / "volumes" / volume


def test_one_job_fetches_weights_and_every_step_reads_them_offline(
    restricted: Kube, operator: Kube, testbed: Testbed, digits: Any, root: Path
) -> None:
    digits(restricted)
    restricted.create(hub_server(), own_hub())
    restricted.kubectl("wait", "--for=condition=Ready", "pod/hub", "--timeout=60s")
    address = restricted.get("pod", "hub")["status"]["podIP"]
    run = tuning_run(root, {"hubRef": {"name": "hub"}}, endpoint=f"http://{address}:{PORT}")

    restricted.create(run)

    ended(restricted, "Complete")
    uid = restricted.get("tuningrun", "digits")["metadata"]["uid"]
    (fetched,) = of_kind(events_of(operator, uid), "weights")
    assert (fetched["claim"], json.loads(fetched["models"])) == ("digits-weights", ["mini_resnet"])
    jobs = {job["metadata"]["name"]: job for job in restricted.items("job")}
    assert [name for name in jobs if "weights" in name] == ["digits-weights-a0"]
    assert mounts(jobs["digits-weights-a0"]) == {"/weights": ("digits-weights", False)}
    assert mounts(jobs["digits-prepare-a0"])["/weights"] == ("digits-weights", True)
    asked = restricted.kubectl("logs", "hub")
    assert asked.count("model.safetensors HTTP") == 2  # HEAD and GET of the Job, none of steps
    record = folder_of(restricted, testbed, "digits-weights") / "weights.json"
    assert json.loads(record.read_text())["models"]["mini_resnet"]["tag"] == TAG


def test_policies_single_the_fetching_pod_out(
    restricted: Kube, operator: Kube, digits: Any, root: Path
) -> None:
    digits(restricted)
    search = {"hub": "timm24", "models": ["dla46x_c"]}
    restricted.create(tuning_run(root, search, endpoint="http://127.0.0.1:1"))

    def fetching() -> list[Object]:
        return restricted.items("pod", "app.kubernetes.io/component=weights")

    until("a pod fetches", fetching)

    said = restricted.kubectl("get", "networkpolicies", "-o", "json")
    policies = {p["metadata"]["name"]: p["spec"] for p in json.loads(said)["items"]}
    labels = fetching()[0]["metadata"]["labels"]
    for name in ("quicktune-steps", "quicktune-weights"):
        assert policies[name]["podSelector"]["matchLabels"].items() <= labels.items()
    assert "egress" not in policies["quicktune-steps"]
    assert {p["port"] for e in policies["quicktune-weights"]["egress"] for p in e["ports"]} == {
        53, 443,
    }  # fmt: skip


def test_without_a_way_out_the_run_names_models_host_and_command_before_any_step(
    restricted: Kube, operator: Kube, digits: Any, root: Path
) -> None:
    """Nothing leaves the test cluster: the public hub cannot even be looked up."""
    digits(restricted)
    restricted.create(tuning_run(root, {"hub": "timm24", "models": ["dla46x_c", "mobilevit_xs"]}))

    accepted = ended(restricted, "Accepted", "WeightsMissing")

    assert accepted["status"] == "False"
    for words in (
        "dla46x_c", "mobilevit_xs", "huggingface.co:443 cannot be reached",
        "qtt weights fetch --hub timm24", "qtt data push DIR digits-weights",
    ):  # fmt: skip
        assert words in accepted["message"]
    kinds = {
        j["metadata"]["labels"]["app.kubernetes.io/component"] for j in restricted.items("job")
    }
    assert kinds == {"weights"}


# --- qtt data push --------------------------------------------------------------------------------


def qtt(*words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qtt_operator", *words],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def pushed(kube: Kube, folder: Path, target: str, *words: str) -> tuple[int, str]:
    child = qtt(
        "data", "push", str(folder), target, "-n", kube.namespace, "--image", BUSYBOX, *words
    )
    out, errors = child.communicate(timeout=300)
    return child.returncode, out + errors


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_a_folder_is_pushed_whole_onto_a_claim_of_a_restricted_namespace(
    restricted: Kube, testbed: Testbed, digits_folder: Path
) -> None:
    restricted.create(claim("data", "1Gi"))

    code, said = pushed(restricted, digits_folder, "data:sets/digits")

    assert code == 0, said
    assert "1798 files" in said  # and the mark that they are complete
    assert contents(folder_of(restricted, testbed, "data") / "sets/digits") == contents(
        digits_folder
    )
    assert restricted.items("pod") == []
    code, said = pushed(restricted, digits_folder, "data:sets/digits")
    assert (code, "0 files were sent" in said) == (0, True)


def test_an_interrupted_push_leaves_no_pod_and_is_gone_on_with(
    restricted: Kube, testbed: Testbed, tmp_path: Path
) -> None:
    restricted.create(claim("data", "1Gi"))
    for number in range(12):
        (tmp_path / f"{number:02d}.bin").write_bytes(os.urandom(16 << 20))
    child = qtt(
        "data", "push", str(tmp_path), "data:big", "-n", restricted.namespace, "--image", BUSYBOX
    )
    assert child.stderr is not None
    for line in child.stderr:
        if "files sent" in line:
            break
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)

    assert child.returncode == 75
    until("its pod is gone", lambda: restricted.items("pod") == [])
    assert not (folder_of(restricted, testbed, "data") / "big").exists()
    code, said = pushed(restricted, tmp_path, "data:big", "-o", "json")
    assert code == 0, said
    facts = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert (facts["files"], 0 < facts["sent"] < 12) == (12, True)
    assert contents(folder_of(restricted, testbed, "data") / "big") == contents(tmp_path)


def test_a_full_claim_is_named_and_what_was_sent_is_not_shown(
    restricted: Kube, testbed: Testbed, tmp_path: Path
) -> None:
    restricted.create(claim("data", "16Mi", storageClassName="small"))
    for number in range(4):
        (tmp_path / f"{number}.bin").write_bytes(os.urandom(8 << 20))

    code, said = pushed(restricted, tmp_path, "data:big")

    assert (code, "No space left" in said) == (74, True), said
    until("its pod is gone", lambda: restricted.items("pod") == [])


def test_a_push_without_claim_or_image_says_which_and_leaves_no_pod(
    restricted: Kube, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    code, said = pushed(restricted, tmp_path, "nothing")
    assert (code, "no such PersistentVolumeClaim" in said) == (64, True)
    restricted.create(claim("data", "1Gi"))

    code, said = pushed(
        restricted, tmp_path, "data", "--image", "testbed.local/no-such:1", "--wait", "4"
    )

    assert code == 69
    assert "no-such" in said
    until("its pod is gone", lambda: restricted.items("pod") == [])


# --- the example for a stock cluster --------------------------------------------------------------


def test_the_example_for_a_stock_cluster_fills_its_claim_and_is_complete(
    restricted: Kube, operator: Kube, testbed: Testbed, root: Path
) -> None:
    text = (root / "examples/digits/cluster.yaml").read_text()
    documents = list(yaml.safe_load_all(text))
    run = documents[-1]
    run["spec"]["search"]["models"] = ["mini_resnet"]
    run["spec"]["search"]["overrides"]["data_augmentation"] = "none"
    run["spec"]["budget"] = {"maxSteps": 4}
    (container,) = documents[1]["spec"]["template"]["spec"]["containers"]
    container["image"] = OPERATOR

    restricted.apply(text=yaml.safe_dump_all(documents))

    ended(restricted, "Complete")
    status = restricted.get("tuningrun", "digits")["status"]
    assert status["consumed"]["steps"] == 4
    assert float(status["best"]["score"]) > 0.1  # chance
    pictures = list(folder_of(restricted, testbed, "digits").rglob("*.png"))
    assert len(pictures) == 1797
    warnings = restricted.kubectl("events", "--types=Warning", "-o", "json")
    assert "BadData" not in warnings

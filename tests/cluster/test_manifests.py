"""Jobs as they are rendered: one golden object, and what a template, install or spec changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qtt_core.jobs import JobDocument, Limits, Paths, Task, parse_job
from qtt_core.ledger.events import Open
from qtt_core.plan import CreateJob, Evaluation
from qtt_core.spec import parse_manifest
from qtt_operator.claims import build_claim
from qtt_operator.manifests import build_job, build_pod
from qtt_operator.merging import merge
from qtt_operator.names import config_claim
from qtt_operator.owner import RunObject
from qtt_operator.pod_rules import refused
from qtt_operator.pods import JobRequest
from qtt_operator.settings import ClaimDefaults, OperatorSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "step-job.json"
SETTINGS = OperatorSettings(trainer_image="registry.example/trainer@sha256:1234")
DOCUMENT = JobDocument(
    run_uid="u-1", attempt=2, nonce="0123456789abcdef", task=Task(data="/data"),
    paths=Paths(root="/checkpoints", weights="/weights"), limits=Limits(wall_s=2340.0),
    step="c12-f3", config_id=12, config={"model": "m", "lr": 0.001}, card={"name": "m"},
    fidelity_from=2, fidelity_to=3, max_fidelity=50,
)  # fmt: skip
OPEN = Open(id="17-0", c="12", frm=2, to=3, h="ab" * 32, res=30.0, why={"rule": "ei"}, ver="1")


def owner(**spec: Any) -> RunObject:
    raw = {
        "apiVersion": "quicktune.dev/v1alpha1",
        "kind": "TuningRun",
        "metadata": {"name": "birds", "namespace": "vision"},
        "spec": {
            "dataset": {"claimName": "datasets", "path": "cub200"},
            "weights": {"claimName": "timm-weights"},
            "budget": {"maxSteps": 10},
            "queueName": "vision-spot",
            **spec,
        },
    }
    return RunObject(run=parse_manifest(raw), uid="u-1")


def request(kind: str = "step") -> JobRequest:
    job = CreateJob(
        kind=kind, c="12", frm=2, to=3, attempt=2, decision=OPEN.h, timeout_seconds=2400.0
    )
    return JobRequest(job=job, name="birds-c12-f3-a2", document=DOCUMENT, opened=OPEN, epoch=4)


def rendered(kind: str = "step", settings: OperatorSettings = SETTINGS, **spec: Any) -> Any:
    return build_job(owner(**spec), request(kind), settings)


def pod_of(job: Any) -> Any:
    return job["spec"]["template"]["spec"]


def trainer(job: Any) -> Any:
    return next(c for c in pod_of(job)["containers"] if c["name"] == "trainer")


def test_a_step_is_rendered_as_the_golden_job() -> None:
    """After a wanted change write the new object: `python -m tests.cluster.test_manifests`."""
    assert rendered() == json.loads(GOLDEN.read_text())


def test_the_same_decision_gives_the_same_bytes() -> None:
    assert json.dumps(rendered()) == json.dumps(rendered())


def test_the_trainer_reads_the_document_that_was_rendered() -> None:
    env = {e["name"]: e["value"] for e in trainer(rendered())["env"]}

    assert parse_job(json.loads(env["QTT_STEP"]), command="step") == DOCUMENT


def test_a_job_lives_until_its_end_is_recorded_and_never_retries_by_itself() -> None:
    spec = rendered()["spec"]

    assert "ttlSecondsAfterFinished" not in spec
    assert "activeDeadlineSeconds" not in spec  # it would count queue and pull
    assert spec["backoffLimit"] == 0
    actions = [rule["action"] for rule in spec["podFailurePolicy"]["rules"]]
    assert actions == ["Ignore", "FailJob"]


def test_the_pod_ends_after_the_trainers_own_limit_and_its_grace() -> None:
    assert pod_of(rendered())["activeDeadlineSeconds"] > 2340 + 120


def test_no_secret_token_or_store_reaches_a_trainer() -> None:
    text = json.dumps(rendered(settings=replace(SETTINGS, redis_url="redis://u:secret@store")))

    assert "secret@store" not in text
    assert "redis" not in text.lower()
    assert pod_of(rendered())["automountServiceAccountToken"] is False


def test_a_template_adds_and_never_takes_what_is_ours() -> None:
    template = {
        "metadata": {"labels": {"team": "birds", "quicktune.dev/run-uid": "stolen"}},
        "spec": {
            "restartPolicy": "Always",
            "automountServiceAccountToken": True,
            "nodeSelector": {"gpu": "l4"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "containers": [
                {
                    "name": "trainer",
                    "command": ["sh"],
                    "args": ["-c", "evil"],
                    "env": [{"name": "QTT_STEP", "value": "{}"}, {"name": "A", "value": "b"}],
                    "resources": {"limits": {"nvidia.com/gpu": 1}},
                    "volumeMounts": [{"name": "scratch", "mountPath": "/data"}],
                }
            ],
        },
    }
    job = rendered(template=template)
    pod, container = pod_of(job), trainer(job)
    env = {e["name"]: e.get("value") for e in container["env"]}

    assert job["spec"]["template"]["metadata"]["labels"]["quicktune.dev/run-uid"] == "u-1"
    assert job["spec"]["template"]["metadata"]["labels"]["team"] == "birds"
    assert pod["restartPolicy"] == "Never"
    assert pod["automountServiceAccountToken"] is False
    assert pod["nodeSelector"] == {"gpu": "l4"}
    assert "command" not in container
    assert container["args"] == ["step"]
    assert env["A"] == "b"
    assert json.loads(env["QTT_STEP"])["nonce"] == DOCUMENT.nonce
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts["/data"] == "dataset"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}


def test_an_image_of_the_users_own_keeps_its_command() -> None:
    template = {
        "spec": {"containers": [{"name": "trainer", "image": "me:1", "command": ["train"]}]}
    }
    job = rendered(trainer={"custom": True, "devices": 1}, template=template)

    assert trainer(job)["image"] == "me:1"
    assert trainer(job)["command"] == ["train"]
    assert trainer(job)["args"] == ["step"]


def after(pod: dict[str, Any], **lessons: Any) -> Any:
    """The pod of an attempt whose forerunners ended badly."""
    order = request()
    order = replace(order, job=replace(order.job, **lessons))
    shared = {"volumeClaimTemplate": {"accessModes": ["ReadWriteMany"], "resources": {}}}
    run = owner(template={"spec": pod}, checkpoint=shared)
    return pod_of(build_job(run, order, SETTINGS))


@pytest.mark.parametrize(
    ("quantity", "larger"),
    [
        ("4Gi", "6144Mi"),
        ("1000M", "1431Mi"),
        ("1e9", "1431Mi"),
        (2**30, "1536Mi"),
        ("half", "half"),
    ],
)
def test_an_attempt_after_one_that_lacked_memory_gets_more(quantity: object, larger: str) -> None:
    memory = {"requests": {"memory": quantity, "cpu": "2"}, "limits": {"memory": quantity}}
    pod = after({"containers": [{"name": "trainer", "resources": memory}]}, memory_factor=1.5)

    resources = pod["containers"][0]["resources"]
    assert resources == {
        "requests": {"memory": larger, "cpu": "2"}, "limits": {"memory": larger},
    }  # fmt: skip


def test_an_attempt_avoids_nodes_whose_device_failed_and_keeps_the_templates_wishes() -> None:
    zones = [
        {"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]}
        for zone in ("a", "b")
    ]
    wish = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": zones}}
    plain = after({}, avoid_nodes=("n1", "n2"))["affinity"]
    merged = after({"affinity": {"nodeAffinity": wish}}, avoid_nodes=("n1",))["affinity"]

    def terms(affinity: Any) -> Any:
        found = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        return [t["matchExpressions"] for t in found["nodeSelectorTerms"]]

    elsewhere = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["n1"]}
    assert terms(plain) == [[{**elsewhere, "values": ["n1", "n2"]}]]
    assert terms(merged) == [[zone["matchExpressions"][0], elsewhere] for zone in zones]
    assert "affinity" not in after({})


def test_a_run_bound_to_one_node_only_prefers_another() -> None:
    """Its volume is there: a pod that must not go there would never start."""
    order = request()
    order = replace(order, job=replace(order.job, avoid_nodes=("n1",)))
    affinity = pod_of(build_job(owner(), order, SETTINGS))["affinity"]

    assert list(affinity["nodeAffinity"]) == ["preferredDuringSchedulingIgnoredDuringExecution"]
    assert "podAffinity" in affinity


def test_the_install_comes_before_the_template() -> None:
    settings = replace(
        SETTINGS, pod_defaults={"nodeSelector": {"pool": "a"}, "priorityClassName": "low"}
    )
    job = rendered(settings=settings, template={"spec": {"priorityClassName": "high"}})

    assert pod_of(job)["nodeSelector"] == {"pool": "a"}
    assert pod_of(job)["priorityClassName"] == "high"


def test_prepare_needs_no_accelerator() -> None:
    resources = {"limits": {"nvidia.com/gpu": 1, "memory": "4Gi"}, "requests": {"amd.com/gpu": 1}}
    template = {"spec": {"containers": [{"name": "trainer", "resources": resources}]}}

    job = rendered("prepare", template=template)

    assert trainer(job)["resources"] == {"limits": {"memory": "4Gi"}, "requests": {}}
    assert trainer(job)["args"] == ["prepare"]


@pytest.mark.parametrize(
    ("checkpoint", "together"),
    [
        (None, True),
        ({"volumeClaimTemplate": {"accessModes": ["ReadWriteMany"], "resources": {}}}, False),
        ({"volumeClaimTemplate": {"accessModes": ["ReadWriteOnce"], "resources": {}}}, True),
        ({"claimName": "mine"}, False),
    ],
    ids=["default", "shared volume", "one node's volume", "a claim of the user's"],
)
def test_pods_that_share_a_volume_of_one_node_run_on_it(
    checkpoint: dict[str, Any] | None, together: bool
) -> None:
    spec = {} if checkpoint is None else {"checkpoint": checkpoint}

    assert ("affinity" in pod_of(rendered(**spec))) is together


PER_CONFIG = {
    "checkpoint": {
        "scope": "Config",
        "volumeClaimTemplate": {"accessModes": ["ReadWriteOnce"], "resources": {}},
    }
}


def mounts_of(
    kind: str,
    *,
    c: str = "12",
    volumes: tuple[str, ...] = (),
    gc: Any = (),
    evaluation: Evaluation | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """Path of a mount ("run" = the run's folder) -> (claim, path in it, whether read-only)."""
    base = request(kind)
    job = replace(base.job, c=c, evaluation=evaluation)
    asked = replace(base, job=job, document=replace(DOCUMENT, gc=gc), volumes=volumes)
    whole = build_job(owner(**spec), asked, SETTINGS)
    sources = {v["name"]: v for v in pod_of(whole)["volumes"]}
    found = {}
    for mount in trainer(whole)["volumeMounts"]:
        path = mount["mountPath"].replace("/checkpoints/runs/u-1", "run")
        claim = sources[mount["name"]].get("persistentVolumeClaim", {}).get("claimName", "")
        if path.startswith(("run", "/data", "/checkpoints", "/weights")):
            found[path] = (claim, mount.get("subPath", ""), mount.get("readOnly", False))
    return found


C12, C7 = config_claim("birds", "12", "u-1"), config_claim("birds", "7", "u-1")
DATA, WEIGHTS = ("datasets", "cub200", True), ("timm-weights", "", True)
BOTH = Evaluation(checkpoints=("c12/f3", "c7/f5"), claim="held-out", path="cub")
OWN = Evaluation(checkpoints=("c12/f3",))


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"kind": "step"}, {"/data": DATA, "/weights": WEIGHTS,
                            "run": ("birds-checkpoints", "runs/u-1", False)}),
        ({"kind": "garbage"}, {"run": ("birds-checkpoints", "runs/u-1", False)}),
        ({"kind": "recovery"}, {"run": ("birds-checkpoints", "runs/u-1", True)}),
        ({"kind": "garbage", "gc": (".",), "checkpoint": {"claimName": "mine", "subPath": "a"}},
         {"/checkpoints/runs": ("mine", "a/runs", False)}),
        ({"kind": "evaluate", "evaluation": BOTH},
         {"/data": ("held-out", "cub", True), "/weights": WEIGHTS,
          "run": ("birds-checkpoints", "runs/u-1", True)}),
        ({"kind": "evaluate", "evaluation": OWN},
         {"/data": DATA, "/weights": WEIGHTS, "run": ("birds-checkpoints", "runs/u-1", True)}),
        ({"kind": "step", **PER_CONFIG},
         {"/data": DATA, "/weights": WEIGHTS, "run": (C12, "runs/u-1", False)}),
        ({"kind": "prepare", "c": "prepare", **PER_CONFIG},
         {"/data": DATA, "/weights": WEIGHTS, "run": ("", "", False)}),
        ({"kind": "garbage", "volumes": ("7",), **PER_CONFIG}, {"run": (C7, "runs/u-1", False)}),
        ({"kind": "recovery", "volumes": ("7", "12"), **PER_CONFIG},
         {"run": ("", "", False), "run/c7": (C7, "runs/u-1/c7", True),
          "run/c12": (C12, "runs/u-1/c12", True)}),
        ({"kind": "evaluate", "evaluation": BOTH, **PER_CONFIG},
         {"/data": ("held-out", "cub", True), "/weights": WEIGHTS, "run": ("", "", False),
          "run/c12": (C12, "runs/u-1/c12", True), "run/c7": (C7, "runs/u-1/c7", True),
          "run/dataset.json": (C12, "runs/u-1/dataset.json", True)}),
    ],
    ids=["step", "garbage", "recovery", "wipe", "evaluate elsewhere", "evaluate the test split",
         "step per config", "prepare per config", "garbage per config", "recovery per config",
         "evaluate per config"],
)  # fmt: skip
def test_a_pod_sees_what_its_kind_needs_and_no_more(
    asked: dict[str, Any], wanted: dict[str, Any]
) -> None:
    assert mounts_of(**asked) == wanted


def test_a_chore_is_small_waits_in_no_queue_and_is_ours_even_for_a_custom_trainer() -> None:
    mine = {"name": "trainer", "image": "me:1", "command": ["train"]}
    mine["resources"] = {"limits": {"nvidia.com/gpu": 1, "memory": "24Gi"}}
    template = {"spec": {"containers": [mine]}}
    job = rendered("garbage", template=template, trainer={"custom": True, "devices": 1})

    assert trainer(job)["image"] == SETTINGS.trainer_image
    assert "command" not in trainer(job)
    assert trainer(job)["args"] == ["garbage"]
    assert trainer(job)["resources"]["requests"]["memory"] == "128Mi"
    assert not [name for name in job["metadata"]["labels"] if "kueue" in name]
    assert trainer(rendered("garbage", template=template))["image"] == "me:1"


def test_kueue_sees_its_labels_on_the_job_only() -> None:
    job = rendered(workloadPriorityClass="low")

    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "vision-spot"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    assert not [k for k in job["spec"]["template"]["metadata"]["labels"] if "kueue" in k]


def test_the_checked_pod_is_the_jobs_pod() -> None:
    job = rendered()

    assert build_pod(job)["spec"] == pod_of(job)


def test_a_claim_is_made_only_where_none_is_named_and_goes_with_the_run_only_if_wished() -> None:
    defaults = ClaimDefaults(size="7Gi", storageClassName="fast")
    kept = build_claim(owner(), defaults)
    wiped = build_claim(owner(deletionPolicy="Delete"), defaults)

    assert build_claim(owner(checkpoint={"claimName": "mine"}), defaults) is None
    assert kept is not None
    assert kept["spec"]["storageClassName"] == "fast"
    assert "ownerReferences" not in kept["metadata"]
    assert wiped is not None
    assert wiped["metadata"]["ownerReferences"][0]["uid"] == "u-1"


@pytest.mark.parametrize(
    ("pod", "field"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"serviceAccountName": "admin"}, "serviceAccountName"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "volumes[v]"),
        (
            {"volumes": [{"name": "v", "projected": {"sources": [{"serviceAccountToken": {}}]}}]},
            "volumes[v]",
        ),
        (
            {"containers": [{"name": "trainer", "securityContext": {"privileged": True}}]},
            "containers[trainer]",
        ),
        ({"containers": [{"name": "proxy"}]}, "containers"),
    ],
)
def test_what_an_install_does_not_allow_is_named(pod: dict[str, Any], field: str) -> None:
    faults = refused(owner(template={"spec": pod}).run, SETTINGS)

    assert [fault.field for fault in faults] == [f"spec.template.spec.{field}"]


def test_an_optimizer_of_somebody_else_must_be_allowed_and_be_installed() -> None:
    there = owner(optimizer={"algorithm": "External", "name": "optuna-tpe"}).run
    unknown = owner(optimizer={"algorithm": "External", "name": "grid"}).run
    grid_only = replace(SETTINGS, external_optimizers=("grid",))

    (forbidden,) = refused(there, grid_only)
    (missing,) = refused(unknown, grid_only)

    assert (forbidden.field, missing.field) == ("spec.optimizer.name",) * 2
    assert "is installed, but not allowed here; allowed: grid" in forbidden.expected
    assert "known here: optuna-gp, optuna-tpe" in missing.expected
    assert refused(there, replace(SETTINGS, external_optimizers=("optuna-tpe",))) == []


def test_an_allowed_service_account_is_allowed() -> None:
    settings = replace(SETTINGS, allowed_service_accounts=("trainers",), allow_host_path=True)
    pod = {
        "serviceAccountName": "trainers",
        "volumes": [{"name": "v", "hostPath": {"path": "/mnt"}}],
    }

    assert refused(owner(template={"spec": pod}).run, settings) == []


@pytest.mark.parametrize(
    ("base", "over", "wanted"),
    [
        ({"a": 1}, {"a": None}, {}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        (
            {"env": [{"name": "A", "value": "1"}]},
            {"env": [{"name": "A", "value": "2"}, {"name": "B", "value": "3"}]},
            {"env": [{"name": "A", "value": "2"}, {"name": "B", "value": "3"}]},
        ),
        (
            {"env": [{"name": "A", "value": "1"}]},
            {"env": [{"name": "A", "valueFrom": {"fieldRef": {}}}]},
            {"env": [{"name": "A", "valueFrom": {"fieldRef": {}}}]},
        ),
        (
            {"volumes": [{"name": "tmp", "emptyDir": {}}]},
            {"volumes": [{"name": "tmp", "persistentVolumeClaim": {"claimName": "c"}}]},
            {"volumes": [{"name": "tmp", "persistentVolumeClaim": {"claimName": "c"}}]},
        ),
        (
            {"tolerations": [{"key": "a"}]},
            {"tolerations": [{"key": "a"}, {"key": "b"}]},
            {"tolerations": [{"key": "a"}, {"key": "b"}]},
        ),
        ({"args": ["x", "y"]}, {"args": ["z"]}, {"args": ["z"]}),
    ],
    ids=["null removes", "maps", "env by name", "env source", "volume source", "append", "replace"],
)
def test_merging(base: Any, over: Any, wanted: Any) -> None:
    before = json.dumps(base)

    assert merge(base, over) == wanted
    assert json.dumps(base) == before


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(rendered(), indent=1) + "\n")

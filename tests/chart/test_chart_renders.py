"""What the chart makes of values: valid objects, few of them, as safe as they are said to be."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from kube_schemas import write_schemas
from value_sets import VALUES, Object, of_kind, one

Render = Callable[..., list[Object]]

THEIRS = "ServiceMonitor,PodMonitor,PrometheusRule"
"""Kinds that Kubernetes does not describe; promtool checks the rules."""


def pod_templates(objects: list[Object]) -> dict[str, Object]:
    """Every pod spec by the name of its owner."""
    found = {
        item["metadata"]["name"]: item["spec"]["template"]["spec"]
        for item in objects
        if item["kind"] in {"Deployment", "StatefulSet", "DaemonSet"}
    }
    return found | {pod["metadata"]["name"]: pod["spec"] for pod in of_kind(objects, "Pod")}


def test_lint_finds_no_fault(helm: str, chart: Path) -> None:
    done = subprocess.run([helm, "lint", "--strict", chart], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


def test_the_default_renders_at_most_forty_objects(render: Render) -> None:
    assert len(render("default")) <= 40


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    modules = os.environ.get("GOMODCACHE") or Path(
        os.environ.get("GOPATH", Path.home() / "go"), "pkg/mod"
    )
    found = sorted(Path(modules, "k8s.io").glob("kubernetes@*/api/openapi-spec/swagger.json"))
    if not found:
        pytest.skip("no k8s.io/kubernetes in the Go module cache: make testbed fetches it")
    folder = tmp_path_factory.mktemp("schemas")
    write_schemas(found[-1], folder)
    return folder


@pytest.fixture
def check_schema(kubeconform: str, schemas: Path) -> Callable[[list[Object]], str]:
    def call(objects: list[Object]) -> str:
        location = f"{schemas}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
        command = [kubeconform, "-schema-location", location, "-skip", THEIRS, "-summary", "-"]
        text = yaml.safe_dump_all(objects)
        return subprocess.run(command, input=text, capture_output=True, text=True).stdout

    return call


@pytest.mark.parametrize("name", VALUES)
def test_every_object_fits_the_schema_of_its_kind(
    name: str, render: Render, check_schema: Callable[[list[Object]], str]
) -> None:
    objects = render(name)
    skipped = sum(item["kind"] in THEIRS.split(",") for item in objects)

    assert (
        f"Valid: {len(objects) - skipped}, Invalid: 0, Errors: 0, Skipped: {skipped}"
        in check_schema(objects)
    )


def test_the_schema_check_sees_a_misspelt_field(
    render: Render, check_schema: Callable[[list[Object]], str]
) -> None:
    deployment = one(render("default"), "Deployment")
    wrong = {**deployment, "spec": {**deployment["spec"], "replica": 2}}

    assert "replica" in check_schema([wrong])


@pytest.mark.parametrize("name", VALUES)
def test_every_pod_meets_the_restricted_standard(name: str, render: Render) -> None:
    for owner, pod in pod_templates(render(name)).items():
        security = pod["securityContext"]
        assert security["runAsNonRoot"], owner
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, owner
            assert container["resources"]["limits"]["memory"], owner
        assert {*(k for v in pod.get("volumes", ()) for k in v)} <= {
            "name", "configMap", "emptyDir", "secret", "persistentVolumeClaim",
        }  # fmt: skip
        assert not pod.get("hostNetwork")
        assert not pod["enableServiceLinks"]


@pytest.mark.parametrize("name", VALUES)
def test_only_the_operators_pod_gets_an_api_token(name: str, render: Render) -> None:
    with_token = [
        owner
        for owner, pod in pod_templates(render(name)).items()
        if pod.get("automountServiceAccountToken") is not False
    ]

    assert with_token == [of_kind(render(name), "Deployment")[0]["metadata"]["name"]]


@pytest.mark.parametrize("name", VALUES)
def test_selectors_find_the_pods_they_are_meant_for(name: str, render: Render) -> None:
    objects = render(name)
    labels = {
        item["metadata"]["name"]: item["spec"]["template"]["metadata"]["labels"]
        for item in objects
        if item["kind"] in {"Deployment", "StatefulSet", "DaemonSet"}
    }

    def selected(selector: dict[str, str]) -> list[str]:
        return [owner for owner, have in labels.items() if selector.items() <= have.items()]

    for service in of_kind(objects, "Service"):
        assert selected(service["spec"]["selector"]) == [service["metadata"]["name"]]
    for policy in of_kind(objects, "NetworkPolicy"):
        about = policy["metadata"]["name"]
        chosen = policy["spec"]["podSelector"]["matchLabels"]
        if about.endswith(("-steps", "-weights")):
            assert selected(chosen) == []
        else:
            assert selected(chosen) == [about]
    for budget in of_kind(objects, "PodDisruptionBudget"):
        chosen = budget["spec"]["selector"]["matchLabels"]
        assert selected(chosen) == [budget["metadata"]["name"]]


def test_two_replicas_replace_each_other_and_one_is_never_joined_by_another(render: Render) -> None:
    two, single = render("two-replicas"), render("default")

    assert one(two, "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert one(two, "PodDisruptionBudget")["spec"]["minAvailable"] == 1
    assert one(single, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert of_kind(single, "PodDisruptionBudget") == []


def test_a_change_of_a_setting_rolls_the_operator_and_nothing_else_does(render: Render) -> None:
    def pod(values: Object) -> Object:
        template: Object = one(render(values), "Deployment")["spec"]["template"]
        return template

    assert pod({"limits": {"maxOpenJobs": 7}}) != pod({})
    assert pod({"metrics": {"dashboards": {"enabled": False}}}) == pod({})


def test_a_watched_namespace_gets_roles_and_the_cluster_none(render: Render) -> None:
    objects = render("namespaced")

    assert of_kind(objects, "ClusterRole") == []
    assert of_kind(objects, "ClusterRoleBinding") == []
    roles = {r["metadata"]["namespace"]: r["rules"] for r in of_kind(objects, "Role")}
    assert set(roles) == {"vision", "speech", "quicktune-system"}
    policies = {"networkpolicies"}  # the chart makes them where it knows the namespaces
    of_the_cluster = one(render("default"), "ClusterRole")["rules"]
    assert roles["vision"] == [r for r in of_the_cluster if set(r["resources"]) != policies]
    for binding in of_kind(objects, "RoleBinding"):
        assert binding["subjects"] == [
            {
                "kind": "ServiceAccount",
                "name": "quicktune-operator",
                "namespace": "quicktune-system",
            }
        ]


def test_trainers_of_a_watched_namespace_are_cut_off(render: Render) -> None:
    for namespace in ("vision", "speech"):
        (policy,) = (
            p
            for p in of_kind(render("namespaced"), "NetworkPolicy")
            if p["metadata"]["namespace"] == namespace and p["metadata"]["name"].endswith("-steps")
        )
        assert policy["spec"] == {
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "quicktune-step"}},
            "policyTypes": ["Ingress", "Egress"],
        }


def test_no_one_may_read_secrets_or_touch_nodes_webhooks_or_crds(render: Render) -> None:
    for role in (*of_kind(render("default"), "ClusterRole"), *of_kind(render("default"), "Role")):
        for rule in role["rules"]:
            assert "*" not in (*rule["verbs"], *rule["resources"], *rule["apiGroups"])
            assert not {"secrets", "nodes", "customresourcedefinitions"} & {*rule["resources"]}


def test_monitoring_objects_need_the_api_and_the_wish(
    helm_template: Callable[..., subprocess.CompletedProcess[str]], render: Render
) -> None:
    wished = helm_template(VALUES["monitored"])

    assert "kind: ServiceMonitor" not in wished.stdout
    assert "kind: PrometheusRule" not in wished.stdout
    assert of_kind(render("default"), "ServiceMonitor") == []
    assert len(of_kind(render("monitored"), "ServiceMonitor")) == 1
    assert len(of_kind(render("monitored"), "PrometheusRule")) == 1


def test_a_pod_monitor_finds_the_port_and_the_pods(render: Render) -> None:
    objects = render("everything")
    (monitor,) = of_kind(objects, "PodMonitor")
    (deployment,) = of_kind(objects, "Deployment")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    template = deployment["spec"]["template"]
    (operator,) = template["spec"]["containers"]

    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= template["metadata"]["labels"].items()
    assert endpoint["port"] in {port["name"] for port in operator["ports"]}
    assert (endpoint["interval"], endpoint["honorLabels"]) == ("15s", True)
    assert monitor["metadata"]["labels"]["team"] == "ml"


def test_what_must_outlive_the_release_is_kept(render: Render) -> None:
    kept = {
        item["kind"]
        for item in render("default")
        if (item["metadata"].get("annotations") or {}).get("helm.sh/resource-policy") == "keep"
    }

    assert kept == {"CustomResourceDefinition", "Secret"}


def test_the_notes_name_the_next_command(helm: str, chart: Path) -> None:
    command = [helm, "install", "qt", chart, "--dry-run=client", "--namespace", "tuning"]
    done = subprocess.run(command, capture_output=True, text=True)

    assert "helm test qt --namespace tuning" in done.stdout, done.stderr
    assert "kind: TuningRun" in done.stdout.partition("NOTES:")[2]

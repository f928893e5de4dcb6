"""What the chart says twice, or says of our code: settings, versions, the CRD, rights."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from value_sets import VALUES, Object, of_kind, one

import qtt_core
from qtt_operator import settings as settings_module
from qtt_operator.isolation import build_policy, build_way_out
from qtt_operator.settings import ClaimDefaults, OperatorSettings, load_settings

Render = Callable[..., list[Object]]
HelmTemplate = Callable[..., subprocess.CompletedProcess[str]]

VERBS = {"get": "get", "page": "list", "create": "create", "replace": "update", "patch": "patch",
         "delete": "delete", "watch": "watch"}  # fmt: skip
FOLLOWED = {("quicktune.dev", "tuningruns"), ("batch", "jobs"), ("", "pods")}
"""Watched by kopf or by an informer, which is told its resource at run time."""


def settings_of(objects: list[Object], tmp_path: Path) -> OperatorSettings:
    """The settings as the operator would read them."""
    config = next(o for o in of_kind(objects, "ConfigMap") if "settings.yaml" in o["data"])
    path = tmp_path / "settings.yaml"
    path.write_text(config["data"]["settings.yaml"])
    return load_settings(path, {})


def test_the_chart_carries_the_version_of_the_package(chart: Path) -> None:
    about = yaml.safe_load((chart / "Chart.yaml").read_text())

    assert about["version"] == about["appVersion"] == qtt_core.__version__


def test_the_chart_carries_the_crd_as_it_is(chart: Path, root: Path) -> None:
    name = "quicktune.dev_tuningruns.yaml"

    assert (chart / "files" / name).read_bytes() == (root / "crds" / name).read_bytes()


@pytest.mark.parametrize(("server", "selectable"), [("1.29.0", False), ("1.31.0", True)])
def test_the_crd_is_rendered_unchanged_but_for_labels_policy_and_what_a_server_does_not_know(
    server: str, selectable: bool, helm_template: HelmTemplate, render: Render, root: Path
) -> None:
    source = yaml.safe_load((root / "crds" / "quicktune.dev_tuningruns.yaml").read_text())
    objects = list(yaml.safe_load_all(helm_template({}, "--kube-version", server).stdout))
    rendered = one(objects, "CustomResourceDefinition", source["metadata"]["name"])

    assert ("selectableFields" in rendered["spec"]["versions"][0]) is selectable
    if not selectable:
        source["spec"]["versions"][0].pop("selectableFields")
    assert rendered["spec"] == source["spec"]
    assert rendered["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert of_kind(render("bare"), "CustomResourceDefinition") == []


def test_every_setting_of_the_operator_is_rendered_and_no_other(render: Render) -> None:
    config = one(render("everything"), "ConfigMap", "tuner")
    written = yaml.safe_load(config["data"]["settings.yaml"])

    assert set(written) == {item.name for item in fields(OperatorSettings)}
    assert set(written["checkpoint_defaults"]) == {item.name for item in fields(ClaimDefaults)}


@pytest.mark.parametrize("name", VALUES)
def test_the_operator_reads_the_settings(name: str, render: Render, tmp_path: Path) -> None:
    settings = settings_of(render(name), tmp_path)

    assert settings.namespaces == tuple(VALUES[name].get("watchNamespaces", ()))
    assert settings.lease_namespace == "quicktune-system"


def test_the_chart_changes_no_default_of_the_operator_by_accident(
    render: Render, tmp_path: Path
) -> None:
    of_the_place = {
        "redis_url", "redis_password_file", "lease_namespace", "trainer_image", "isolate_steps",
    }  # fmt: skip
    settings, plain = settings_of(render("default"), tmp_path), OperatorSettings()

    assert {
        item.name
        for item in fields(OperatorSettings)
        if getattr(settings, item.name) != getattr(plain, item.name)
    } == of_the_place


def test_values_reach_the_settings(render: Render, tmp_path: Path) -> None:
    settings = settings_of(render("everything"), tmp_path)

    assert settings.lease_name == "tuner"
    assert settings.checkpoint_defaults == ClaimDefaults(
        accessModes=("ReadWriteMany",), size="50Gi", storageClassName="nfs"
    )
    assert (settings.weights_claim, settings.weights_fetch) == ("timm", "Never")
    assert settings.weights_endpoint == "http://mirror:8080/hub"
    assert settings.weights_defaults == ClaimDefaults(
        accessModes=("ReadWriteMany",), size="9Gi", storageClassName="nfs"
    )
    assert settings.external_optimizers == ("grid",)
    assert settings.max_parallelism == 16
    assert settings.job_ttl_seconds == 10_000_000  # Helm reads numbers as floats: 1e+07
    assert settings.redis_url == "redis://quicktune@tuner-redis.quicktune-system.svc:6379/0"
    assert settings.trainer_image == f"quicktune-trainer:{qtt_core.__version__}"


def test_an_external_redis_is_reached_by_tls_with_files(render: Render, tmp_path: Path) -> None:
    objects = render("external-redis")
    folder = "/etc/quicktune/redis-tls"

    assert settings_of(objects, tmp_path).redis_url == (
        f"rediss://tuner@redis.example:6380/2?ssl_ca_certs={folder}/ca.crt"
        f"&ssl_certfile={folder}/tls.crt&ssl_keyfile={folder}/tls.key"
    )
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts["redis-tls"] == folder
    assert volumes["redis-tls"]["secret"]["secretName"] == "redis-ca"
    assert volumes["redis"]["secret"]["items"] == [{"key": "pw", "path": "password"}]
    ports = one(objects, "NetworkPolicy")["spec"]["egress"][-1]["ports"]
    assert ports == [{"port": 6380, "protocol": "TCP"}]


@pytest.mark.parametrize("name", VALUES)
def test_every_file_that_the_settings_name_is_mounted(
    name: str, render: Render, tmp_path: Path
) -> None:
    objects = render(name)
    (deployment,) = of_kind(objects, "Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    settings = settings_of(objects, tmp_path)
    named = {settings.redis_password_file, container["args"][-1]}
    named |= set(re.findall(r"=(/[^&]+)", settings.redis_url))

    assert {str(Path(path).parent) for path in named if path} <= mounts


def test_no_password_stands_in_a_setting_an_argument_or_a_variable(render: Render) -> None:
    for name in VALUES:
        for item in render(name):
            if item["kind"] == "Secret":
                continue
            assert "secretKeyRef" not in str(item)
            assert "requirepass" not in str(item)


def test_the_policy_for_steps_chooses_the_pods_that_the_operator_makes(render: Render) -> None:
    policy = one(
        [p for p in render("namespaced") if p["metadata"].get("namespace") == "vision"],
        "NetworkPolicy", "quicktune-operator-steps",
    )  # fmt: skip

    assert policy["spec"] == build_policy("vision")["spec"]


@pytest.mark.parametrize("endpoint", ["", "http://mirror", "https://mirror/hub", "http://m:8080"])
def test_the_way_out_for_weights_is_the_one_that_the_operator_makes(
    endpoint: str, render: Render
) -> None:
    objects = render(
        {"watchNamespaces": ["vision"], "trainer": {"weights": {"endpoint": endpoint}}}
    )

    policy = one(objects, "NetworkPolicy", "quicktune-operator-weights")
    assert policy["spec"] == build_way_out("vision", endpoint)["spec"]


def used_by_the_code() -> set[tuple[str, str, str]]:
    """(group, resource, verb) of every call `cluster.VERB(RESOURCE, …)` of the operator."""
    folder = Path(settings_module.__file__).parent
    trees = [ast.parse(path.read_text()) for path in folder.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    places: dict[str, tuple[str, str]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            words = {
                k.arg: k.value.value
                for k in node.value.keywords
                if isinstance(k.value, ast.Constant)
            }
            if {"group", "version", "plural"} <= words.keys() and isinstance(
                node.targets[0], ast.Name
            ):
                places[node.targets[0].id] = (words["group"], words["plural"])
    found = {(*place, verb) for place in FOLLOWED for verb in ("list", "watch")}
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        if not isinstance(call.func, ast.Attribute) or call.func.attr not in VERBS or not call.args:
            continue
        first = call.args[0]
        if isinstance(first, ast.Name) and first.id in places:
            group, plural = places[first.id]
            sub = [
                k.value.value
                for k in call.keywords
                if k.arg == "sub" and isinstance(k.value, ast.Constant)
            ]
            found.add((group, "/".join([plural, *sub]), VERBS[call.func.attr]))
    return found


def granted(objects: list[Object]) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of all that the chart's roles allow."""
    return {
        (group, resource, verb)
        for role in (
            one(objects, "ClusterRole"),
            one(objects, "Role", "quicktune-operator-lease"),
        )
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_rights_are_those_that_the_code_uses(render: Render) -> None:
    """Also compared with the API server's audit log, in the test cluster."""
    assert granted(render("default")) == used_by_the_code()


def test_the_page_on_security_lists_these_rights(render: Render, root: Path) -> None:
    chapter = (root / "docs/security.md").read_text().partition("## Rights of the operator")[2]
    rows = re.findall(
        r"^\| (`[\w.]+`|core) \| ([\w/]+)[^|]* \| ([a-z, ]+) \|", chapter, re.MULTILINE
    )
    page = {
        ("" if group == "core" else group.strip("`"), resource, verb)
        for group, resource, verbs in rows
        for verb in verbs.split(", ")
    }

    assert page == granted(render("default"))

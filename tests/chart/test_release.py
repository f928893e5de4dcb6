"""What `make dist` hands out: complete, usable without the checkout, the same bytes again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name
from value_sets import Object, of_kind

import qtt_core

VERSION = qtt_core.__version__
WHEEL = f"quicktune_operator-{VERSION}-py3-none-any.whl"
SOURCES = f"quicktune_operator-{VERSION}"
CHART = f"quicktune-operator-{VERSION}.tgz"
NOON = "1750000000"


def dist(root: Path, folder: Path) -> Path:
    """Everything, written at a given time."""
    command = [sys.executable, str(root / "release/dist.py"), "--to", str(folder)]
    subprocess.run(
        [*command, "--registry", "registry.example/"], check=True, capture_output=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": NOON},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def made(helm: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release."""
    return dist(root, tmp_path_factory.mktemp("release") / "dist")


def test_a_second_build_has_the_same_bytes(made: Path, root: Path, tmp_path: Path) -> None:
    again = dist(root, tmp_path / "dist")

    assert (again / "SHA256SUMS").read_text() == (made / "SHA256SUMS").read_text()


def test_the_sums_are_those_of_all_other_files(made: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=made, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout
    named = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert named == {path.name for path in made.iterdir()} - {"SHA256SUMS"}
    assert named == {WHEEL, f"{SOURCES}.tar.gz", CHART, "install.yaml", "sbom.cdx.json"}


def test_the_wheel_installs_without_a_network_and_knows_its_version(
    made: Path, tmp_path: Path
) -> None:
    words = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    target = ["--target", str(tmp_path / "site"), str(made / WHEEL)]
    subprocess.run([sys.executable, "-m", "pip", "install", *words, *target], check=True)

    where = "import qtt_core, qtt_trainer; print(qtt_core.__version__, qtt_core.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", where], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, check=True,
    )  # fmt: skip

    assert done.stdout.split() == [VERSION, str(tmp_path / "site/qtt_core/__init__.py")]


def test_the_source_archive_builds_the_same_wheel(made: Path, tmp_path: Path) -> None:
    with tarfile.open(made / f"{SOURCES}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    command = [sys.executable, "-P", "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(
        command, cwd=tmp_path / SOURCES, check=True, capture_output=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": NOON},
    )  # fmt: skip

    ours, theirs = zipfile.ZipFile(made / WHEEL), zipfile.ZipFile(tmp_path / WHEEL)
    assert {i.filename: i.CRC for i in ours.infolist()} == {
        i.filename: i.CRC for i in theirs.infolist()
    }


def rendered(helm: str, chart: Path, *words: str) -> list[Object]:
    """All objects of a chart, under the names that a release has."""
    command = [helm, "template", "quicktune-operator", str(chart), "-n", "quicktune-system", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [item for item in yaml.safe_load_all(done.stdout) if item]


SECRET = ("--set", "redis.existingSecret.name=quicktune-operator-redis")


def test_the_chart_archive_renders_what_the_folder_renders(
    made: Path, helm: str, chart: Path
) -> None:
    assert rendered(helm, made / CHART, *SECRET) == rendered(helm, chart, *SECRET)
    with tarfile.open(made / CHART) as archive:
        names = archive.getnames()
    assert names[0] == "quicktune-operator/Chart.yaml"
    kept = {f"quicktune-operator/{p.relative_to(chart)}" for p in chart.rglob("*") if p.is_file()}
    assert set(names) == kept


def test_install_yaml_is_the_chart_with_the_images_of_a_registry_and_without_a_secret(
    made: Path, helm: str, chart: Path
) -> None:
    objects = [o for o in yaml.safe_load_all((made / "install.yaml").read_text()) if o]

    def named(item: Object) -> tuple[str, str]:
        return item["kind"], item["metadata"]["name"]

    whole = {named(o) for o in rendered(helm, chart, *SECRET, "--skip-tests")}
    assert {named(o) for o in objects} == whole
    assert of_kind(objects, "Secret") == []
    assert of_kind(objects, "Pod") == []
    text = (made / "install.yaml").read_text()
    for image in ("quicktune-operator", "quicktune-trainer"):
        assert f"registry.example/{image}:{VERSION}" in text


def test_the_first_lines_of_install_yaml_make_what_it_needs(made: Path) -> None:
    """The Secret that the pods mount is the one that a reader is told to create."""
    text = (made / "install.yaml").read_text()
    secrets = {
        volume["secret"]["secretName"]
        for item in yaml.safe_load_all(text)
        if item and item["kind"] in {"Deployment", "StatefulSet"}
        for volume in item["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume
    }

    assert secrets == set(re.findall(r"create secret generic (\S+) -n quicktune-system", text))


def test_the_bill_of_materials_has_the_pinned_versions(made: Path, root: Path) -> None:
    bill: Any = json.loads((made / "sbom.cdx.json").read_text())
    pinned = {
        canonicalize_name(line.partition("==")[0]): line.partition("==")[2].strip()
        for name in ("constraints.txt", "constraints-torch.txt")
        for line in (root / name).read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    listed = {item["name"]: item["version"] for item in bill["components"]}

    assert {"torch", "timm", "kopf", "kubernetes", "redis", "gpytorch", "pillow"} <= listed.keys()
    assert {n: v for n, v in listed.items() if pinned.get(n) != v} == {}
    assert not {"pytest", "mypy", "ruff"} & listed.keys()
    assert bill["metadata"]["component"]["version"] == VERSION
    refs = {item["bom-ref"] for item in [*bill["components"], bill["metadata"]["component"]]}
    assert {edge["ref"] for edge in bill["dependencies"]} == refs
    assert {ref for edge in bill["dependencies"] for ref in edge["dependsOn"]} <= refs

"""Writes all that a release hands out into a folder, the same bytes for the same commit.

    python release/dist.py [--to dist] [--registry registry.example/]

The wheel and the source archive, the chart's archive, `install.yaml` for `kubectl apply` (the chart
with its defaults, images under `--registry`), `sbom.cdx.json` and `SHA256SUMS`. Needs Helm 3 or 4,
on PATH or in the folder of the test cluster's programs; no network.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from sbom import sbom_text

import qtt_core

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "quicktune-operator"
NAMESPACE = "quicktune-system"
SECRET = "quicktune-operator-redis"

HEADER = f"""\
# Quick-Tune on Kubernetes {qtt_core.__version__} with the chart's defaults, without Helm.
#
#   kubectl create namespace {NAMESPACE}
#   kubectl create secret generic {SECRET} -n {NAMESPACE} \\
#     --from-literal=password="$(openssl rand -hex 20)"
#   kubectl apply --server-side -f install.yaml
#
# The password is made once and by you: a file that everybody downloads cannot hold it.
"""


def find_helm() -> str:
    """Raises: SystemExit if there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = sorted(cache.glob("testbed/*/bin/helm"), key=lambda path: path.stat().st_mtime)
    found = shutil.which("helm") or (str(kept[-1]) if kept else None)
    if found is None:
        sys.exit("dist: no Helm: put Helm 3 or 4 on PATH, or let `make testbed` build one")
    return found


def build_time() -> int:
    """Seconds since 1970 that stand for now: SOURCE_DATE_EPOCH, or when the commit was made."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
        given = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(given)


def build_python(folder: Path, now: int) -> None:
    """The wheel and the source archive."""
    command = [sys.executable, "-P", "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist"]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(now)}
    subprocess.run(
        [*command, "-d", str(folder)], cwd=ROOT, env=environment, check=True, stdout=sys.stderr
    )


def package_chart(folder: Path, helm: str, now: int) -> Path:
    """The chart's archive: Helm says what is in it, and its clock is taken out."""
    with tempfile.TemporaryDirectory() as part:
        subprocess.run([helm, "package", str(CHART), "-d", part], check=True, stdout=sys.stderr)
        (made,) = Path(part).glob("*.tgz")
        with tarfile.open(made) as archive:
            members = [(item, archive.extractfile(item)) for item in archive if item.isfile()]
            files = {item.name: found.read() for item, found in members if found is not None}
    path = folder / made.name
    path.write_bytes(_archive(files, now))
    return path


def _archive(files: dict[str, bytes], now: int) -> bytes:
    raw = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=now, filename="") as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name in sorted(files, key=lambda name: (not name.endswith("/Chart.yaml"), name)):
            item = tarfile.TarInfo(name)
            item.size, item.mtime = len(files[name]), now
            archive.addfile(item, io.BytesIO(files[name]))
    return raw.getvalue()


def write_install(folder: Path, helm: str, chart: Path, registry: str) -> None:
    """The rendered chart; `helm test` and what Helm alone understands are left out."""
    command = [
        helm, "template", "quicktune-operator", str(chart), "--skip-tests",
        "--namespace", NAMESPACE,
        "--set", f"redis.existingSecret.name={SECRET}",
        "--set", f"image.repository={registry}quicktune-operator",
        "--set", f"trainer.image.repository={registry}quicktune-trainer",
    ]  # fmt: skip
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (folder / "install.yaml").write_text(HEADER + text)


def write_sums(folder: Path) -> None:
    """As `sha256sum --check` reads them."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    """Build elsewhere: the source archive is of this folder, and an old `dist` stays until then."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "dist", metavar="DIR")
    parser.add_argument("--registry", default="", help="before both images, with its last slash")
    given = parser.parse_args()
    helm, now, target = find_helm(), build_time(), given.to.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as part:
        folder = Path(part) / "dist"
        folder.mkdir()
        build_python(folder, now)
        chart = package_chart(folder, helm, now)
        write_install(folder, helm, chart, given.registry)
        (folder / "sbom.cdx.json").write_text(sbom_text(now))
        write_sums(folder)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(folder, target)
    print((target / "SHA256SUMS").read_text(), end="")


if __name__ == "__main__":
    main()

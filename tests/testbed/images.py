#!/usr/bin/env python3
"""Builds the images that the tests run, once for each state of the sources, and prints their folder.

    python images.py          # ~/.cache/testbed/images/HASH: what `cluster.py --image` takes

The folder is an OCI layout: operator and trainer hold the same torch, and an archive each would
hold it twice. Needs root, Debian's packages and a Python package index.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from machine import cache_folder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = (
    ".dockerignore", "pyproject.toml", "constraints.txt", "constraints-torch.txt", "README.md",
    "qtt_core", "operator", "trainer_image",
    *(f"tests/testbed/{name}" for name in ("build-image.sh", "debian-image.sh", "images.py")),
)  # fmt: skip
BUILDS = (
    ("build-image.sh", "--torch", "testbed.local/operator:1", "{layout}", str(ROOT), "-f", f"{ROOT}/operator/Dockerfile"),
    ("build-image.sh", "--torch", "testbed.local/trainer:1", "{layout}", str(ROOT), "-f", f"{ROOT}/trainer_image/Dockerfile"),
    ("debian-image.sh", "testbed.local/redis:1", "{layout}", "redis-server", "--", "redis-server"),
)
IMAGE_PYTHON = "3.13"  # of the base that build-image.sh makes
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "mpmath", "psutil", "scikit-learn")  # what our suites need beside an image's own packages
KEEP = 4  # layouts of other states: another checkout may be importing one


def files() -> list[Path]:
    """Every file that an image depends on, sorted."""
    found = []
    for source in map(ROOT.joinpath, SOURCES):
        inside = [source] if source.is_file() else source.rglob("*")
        found += [p for p in inside if p.is_file() and "__pycache__" not in p.parts]
    return sorted(found)


def state() -> str:
    """A digest of names and contents."""
    digest = hashlib.sha256()
    for path in files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def build(layout: Path) -> None:
    """All images into one layout; a layout that was left unfinished is never used."""
    part = layout.with_name(f".{layout.name}")
    shutil.rmtree(part, ignore_errors=True)
    for script, *arguments in BUILDS:
        begun = time.monotonic()
        words = [argument.format(layout=part) for argument in arguments]
        subprocess.run([str(HERE / script), *words], check=True, stdout=sys.stderr)
        name = next(word for word in words if ":" in word)
        print(f"images: {name} in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    part.rename(layout)


def tools_folder() -> Path:
    """Where `TOOLS` lie for the images' Python: mounted, so that the images stay what is shipped."""
    constraints = (ROOT / "constraints.txt").read_bytes()
    digest = hashlib.sha256(f"{IMAGE_PYTHON} {TOOLS}".encode() + constraints)
    return cache_folder() / f"tools-{digest.hexdigest()[:16]}"


def fetch_tools(folder: Path) -> None:
    """Before a cluster is booted: from inside of one there is no way out."""
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(part),
        "--python-version", IMAGE_PYTHON, "--only-binary=:all:", "-c", str(ROOT / "constraints.txt"), *TOOLS,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    part.rename(folder)


def report(layout: Path) -> None:
    """Bytes of each image's layers, as unpacked archives."""
    for entry in json.loads((layout / "index.json").read_text())["manifests"]:
        name = entry["annotations"]["org.opencontainers.image.ref.name"]
        manifest = json.loads((layout / "blobs" / "sha256" / entry["digest"].partition(":")[2]).read_text())
        print(f"images: {name} {sum(layer['size'] for layer in manifest['layers']) / 1e6:.0f} MB", file=sys.stderr)


def prune(folder: Path) -> None:
    for stale in sorted(folder.glob("[0-9a-f]*"), key=lambda p: -p.stat().st_mtime)[KEEP:]:
        shutil.rmtree(stale)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    folder = cache_folder() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        layout = folder / state()
        if not layout.exists():
            build(layout)
            report(layout)
        layout.touch()
        prune(folder)
        if not tools_folder().exists():
            fetch_tools(tools_folder())
    print(layout)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"images: {error.cmd[0]} {error.cmd[2]} failed with {error.returncode}")

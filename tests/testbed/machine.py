#!/usr/bin/env python3
"""Says whether this machine can run the test cluster, and everything that it lacks, at once.

    python machine.py      # silent and 0, or one line for each fault and 69 (`EX_UNAVAILABLE`)

Standard library only: it is asked before anything else is built.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
UNAVAILABLE = 69
MIN_MEMORY_GIB, MIN_DISK_GIB = 6.0, 15.0  # the build's cache, two images with torch, unpacked
TOOLS = ("apt-get", "dpkg-query", "flock", "mount", "nsenter", "unshare", "openssl")
TRIAL = (  # all that the cluster's first process does with the kernel, on a temporary folder
    "set -e; cd {folder}; mkdir low up work all; mount -t overlay none -o lowerdir=low,upperdir=up,workdir=work all; "
    "mount --bind low up; mount --make-shared up; ip link set lo up"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is asked of the machine. Memory and disk in GiB; an empty string = absent, or no fault."""

    platform: str
    root: bool
    go: str
    missing_tools: tuple[str, ...]
    namespaces_fault: str
    cgroup_fault: str
    memory_gib: float
    disk_gib: float


def faults(machine: Machine, go_wanted: str) -> list[str]:
    """One sentence for each thing that is missing, with what would be right."""
    if machine.platform != "linux":
        return [f"the system is {machine.platform}; the cluster needs Linux"]
    found = []
    if not machine.root:
        found.append("this user is not root; run it as root (sudo make testbed)")
    if not machine.go:
        found.append(f"no Go on PATH; install Go {go_wanted} or later")
    elif version(machine.go) < version(go_wanted):
        found.append(f"Go is {machine.go}; install {go_wanted} or later")
    if machine.missing_tools:
        found.append(f"no {', '.join(machine.missing_tools)} on PATH; use Debian 12 or later")
    if machine.root and machine.namespaces_fault:
        found.append(f"namespaces or overlay mounts are refused ({machine.namespaces_fault})")
    if machine.root and machine.cgroup_fault:
        found.append(f"cgroups cannot be made ({machine.cgroup_fault})")
    if machine.memory_gib < MIN_MEMORY_GIB:
        found.append(f"{machine.memory_gib:.1f} GiB of memory are free; {MIN_MEMORY_GIB:.0f} are needed")
    if machine.disk_gib < MIN_DISK_GIB:
        found.append(f"{machine.disk_gib:.1f} GiB of disk are free below the cache; {MIN_DISK_GIB:.0f} are needed")
    return found


def version(text: str) -> tuple[int, ...]:
    """`go1.26.8` -> (1, 26, 8); a development version counts as its numbers."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def go_wanted(module: Path = HERE / "kube" / "go.mod") -> str:
    """The Go version that the Kubernetes module asks for."""
    return next(line.split()[1] for line in module.read_text().splitlines() if line.startswith("go "))


def look() -> Machine:
    """This machine."""
    return Machine(
        platform=sys.platform,
        root=os.geteuid() == 0,
        go=output("go", "env", "GOVERSION") if shutil.which("go") else "",
        missing_tools=tuple(tool for tool in TOOLS if not shutil.which(tool)),
        namespaces_fault=try_namespaces(),
        cgroup_fault=try_cgroups(),
        memory_gib=memory_gib(),
        disk_gib=shutil.disk_usage(existing(cache_folder())).free / 2**30,
    )


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def try_namespaces() -> str:
    """Why the kernel refuses what the cluster does with it; empty if it does not."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return ""
    with tempfile.TemporaryDirectory(dir=existing(Path("/var/tmp"))) as folder:
        command = ["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", TRIAL.format(folder=folder)]
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else tried.stderr.strip() or f"exit {tried.returncode}"


def try_cgroups() -> str:
    top = Path("/sys/fs/cgroup")
    try:
        parents = [top] if (top / "cgroup.controllers").exists() else [top / "memory", top / "cpu"]
        for parent in parents:
            trial = parent / f"testbed-trial-{os.getpid()}"
            trial.mkdir()
            trial.rmdir()
    except OSError as error:
        return str(error)
    return ""


def memory_gib() -> float:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) / 2**20 if found else 0.0


def cache_folder() -> Path:
    """Where programs and images are kept: `$XDG_CACHE_HOME/testbed`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "testbed"


def existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def main() -> int:
    found = faults(look(), go_wanted())
    if found:
        print("this machine cannot run the test cluster:", *found, sep="\n  - ", file=sys.stderr)
    return UNAVAILABLE if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs a command and measures it with everything it started: wall, CPU, peak memory."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import psutil

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "out"
QTT = str(Path(sys.executable).with_name("qtt"))
MANIFEST = ROOT / "examples" / "digits" / "tuningrun.yaml"
DIGITS = ROOT / "examples" / "digits" / "digits"

SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a command took. `peak_bytes`: the largest sum of PSS over the tree at one moment."""

    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    processes: int
    output: str


def watch(
    command: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> Usage:
    """Run a command to its end; its output is kept and not shown.

    PSS counts a page shared by n processes as 1/n in each: the forks of a warm trainer share torch,
    and a sum of resident sizes would count it once per fork. CPU seconds are those of all
    descendants that were waited for.
    """
    before, begun = _cpu_of_children(), monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, env=env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    peak, most = 0, 0
    while process.poll() is None:
        used, count = _memory_of_tree(process.pid)
        peak, most = max(peak, used), max(most, count)
        try:
            process.wait(SAMPLE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    wall = monotonic() - begun
    reader.join(timeout=10)
    return Usage(
        exit_code=process.returncode, wall_seconds=wall, cpu_seconds=_cpu_of_children() - before,
        peak_bytes=peak, processes=most, output="".join(lines),
    )  # fmt: skip


def _memory_of_tree(pid: int) -> tuple[int, int]:
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    return sum(_pss(process) for process in tree), len(tree)


def _pss(process: psutil.Process) -> int:
    """Proportional set size; the resident size where there is no PSS (macOS); 0 once ended."""
    try:
        full = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(full, "pss", full.rss))


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

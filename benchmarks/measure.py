"""Runs a command and measures it with everything it started: wall, CPU, peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "out"
QTT = str(Path(sys.executable).with_name("qtt"))
MANIFEST = ROOT / "examples" / "digits" / "tuningrun.yaml"
PREPARE = ROOT / "examples" / "digits" / "prepare.py"
DIGITS = ROOT / "examples" / "digits" / "digits"

SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a command took. `peak_bytes`: the largest sum of PSS over the tree at one moment.

    `cpu_seconds` are those of the command and of every descendant that was waited for.
    """

    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def watch(
    command: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> Usage:
    """Run a command to its end; its output is kept and not shown.

    PSS counts a page shared by n processes as 1/n in each: the forks of a warm trainer share torch,
    and a sum of resident sizes would count it once per fork.
    """
    begun = monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, env=env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    peak = 0
    while True:
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        peak = max(peak, _memory_of_tree(process.pid))
        sleep(SAMPLE_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)  # reaped here, not by Popen
    wall = monotonic() - begun
    reader.join(timeout=10)
    return Usage(
        exit_code=process.returncode, wall_seconds=wall, peak_bytes=peak,
        cpu_seconds=used.ru_utime + used.ru_stime, output="".join(lines),
    )  # fmt: skip


def qtt_json(*arguments: str) -> Any:
    """What `qtt … -o json` prints."""
    command = [QTT, *arguments, "-o", "json"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def ledger_of(run: str, state_dir: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first, as `qtt ledger export` writes them."""
    command = [QTT, "ledger", "export", run, "-", "--state-dir", str(state_dir)]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def must_succeed(usage: Usage, what: str) -> Usage:
    """The usage, or the end of the command's output and exit 1."""
    if usage.exit_code:
        print(usage.output[-3000:], file=sys.stderr)
        sys.exit(f"{what} ended with exit code {usage.exit_code}")
    return usage


def _memory_of_tree(pid: int) -> int:
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_pss(process) for process in tree)


def _pss(process: psutil.Process) -> int:
    """Proportional set size; the resident size where there is no PSS (macOS); 0 once ended."""
    try:
        full = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(full, "pss", full.rss))

"""What every test may rely on: one thread a process, repeatable examples, known paths."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Test modules import torch after this file: the suite's tensors are small, and threads beyond the
# cores only wait for each other.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# A shell in the background has its children ignore Ctrl-C, and theirs; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

# No deadline: a shared core makes any example slow once. In CI the examples are drawn from the
# test's name, so that a red run is red again; elsewhere `.hypothesis/` keeps what was found.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout that is being tested."""
    return ROOT


@pytest.fixture(scope="session")
def micro_runs() -> Path:
    """The published micro runs as CSV; a test that needs them is skipped where they are not."""
    path = os.environ.get("QUICKTUNE_MICRO_RUNS", "")
    if not path:
        pytest.skip("QUICKTUNE_MICRO_RUNS is not set: no CSV of the published micro runs")
    if not Path(path).is_file():
        pytest.fail(f"QUICKTUNE_MICRO_RUNS names no file: {path}")
    return Path(path)

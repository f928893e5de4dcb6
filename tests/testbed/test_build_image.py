"""An image is built even when the kernel refuses, for a moment, what buildah asks of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("build-image.sh")

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the script is for Debian"
)

REFUSED = "Close_Fd sealing memfd copy: Device or resource busy"
# buildah that fails with $SAYS so many times as $FAILS says, and notes every build.
BUILDAH = """#!/bin/bash
case " $* " in
  *" images "*) echo an-id ;;
  *" build "*)
    echo build >> "$CALLS"
    echo "STEP 3/8: RUN true"
    (($(wc -l < "$CALLS") > FAILS)) || { echo "$SAYS" >&2; exit 1; } ;;
  *" push "*) echo push >> "$CALLS" ;;
esac
"""
STUBS = {"buildah": BUILDAH, "dpkg-query": "#!/bin/sh\necho installed\n", "sleep": "#!/bin/sh\n"}


def build(
    folder: Path, *, fails: int, says: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's end, and what buildah was asked to do."""
    for name, text in STUBS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    ended = subprocess.run(
        [SCRIPT, "testbed.local/x:1", folder / "x.tar", folder],
        capture_output=True, text=True, check=False,
        env={
            "PATH": f"{folder}:/usr/bin:/bin", "XDG_CACHE_HOME": str(folder / "cache"),
            "TMPDIR": str(folder), "CALLS": str(calls), "FAILS": str(fails), "SAYS": says,
        },
    )  # fmt: skip
    return ended, calls.read_text().split()


def test_a_refused_seal_costs_another_attempt_and_is_said(tmp_path):
    ended, calls = build(tmp_path, fails=2, says=REFUSED)

    assert ended.returncode == 0, ended.stderr
    assert calls == ["build", "build", "build", "push"]
    assert ended.stderr.count(REFUSED) == 2
    assert "attempt 2 of 4" in ended.stderr
    assert "attempt 3 of 4" in ended.stderr


def test_a_seal_that_is_always_refused_fails_the_build(tmp_path):
    ended, calls = build(tmp_path, fails=99, says=REFUSED)

    assert ended.returncode != 0
    assert calls == ["build"] * 4


def test_another_fault_is_not_tried_again(tmp_path):
    ended, calls = build(tmp_path, fails=99, says="error: No space left on device")

    assert ended.returncode != 0
    assert calls == ["build"]
    assert "attempt" not in ended.stderr


def test_nothing_of_a_build_is_left_behind(tmp_path):
    build(tmp_path, fails=0, says="")

    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*STUBS, "cache", "calls"])

"""`install.yaml` of a release, as somebody without Helm applies it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from real_cluster import Kube, command

pytestmark = pytest.mark.testbed


def test_a_server_accepts_every_object_of_it(
    operator: Kube, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run: strict about fields, and nothing of the installed operator is changed."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1750000000")
    command(sys.executable, str(root / "release" / "dist.py"), "--to", str(tmp_path / "dist"))
    manifest = tmp_path / "dist" / "install.yaml"
    objects = [item for item in yaml.safe_load_all(manifest.read_text()) if item]

    forced = ("--server-side", "--force-conflicts", "--dry-run=server")
    said = operator.kubectl("apply", *forced, "-f", str(manifest))

    assert said.count("serverside-applied (server dry run)") == len(objects) > 10

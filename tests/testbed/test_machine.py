"""A machine that cannot run the cluster is told everything it lacks, before anything is built."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("machine.py")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("testbed_machine", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


machine = load()

ABLE = machine.Machine(
    platform="linux", root=True, go="go1.26.8", missing_tools=(), namespaces_fault="",
    cgroup_fault="", memory_gib=20.0, disk_gib=60.0,
)  # fmt: skip

LACKS = {
    "another system": ({"platform": "darwin"}, "needs Linux"),
    "no root": ({"root": False}, "not root"),
    "no Go": ({"go": ""}, "no Go on PATH; install Go 1.26.8 or later"),
    "an old Go": ({"go": "go1.26.7"}, "Go is go1.26.7; install 1.26.8 or later"),
    "no package manager": ({"missing_tools": ("apt-get",)}, "no apt-get on PATH"),
    "a locked container": ({"namespaces_fault": "EPERM"}, "refused (EPERM)"),
    "read-only cgroups": ({"cgroup_fault": "EROFS"}, "cgroups cannot be made (EROFS)"),
    "little memory": ({"memory_gib": 3.2}, "3.2 GiB of memory"),
    "a full disk": ({"disk_gib": 2.0}, "2.0 GiB of disk"),
}


def test_an_able_machine_has_no_fault():
    assert machine.faults(ABLE, "1.26.8") == []


@pytest.mark.parametrize("go", ["go1.26.8", "go1.27", "go2.0.1", "go1.30rc1"])
def test_this_go_or_a_later_one_will_do(go):
    assert machine.faults(replace(ABLE, go=go), "1.26.8") == []


@pytest.mark.parametrize("lack", list(LACKS))
def test_what_is_missing_is_named_with_what_would_be_right(lack):
    change, said = LACKS[lack]

    (fault,) = machine.faults(replace(ABLE, **change), "1.26.8")

    assert said in fault


def test_everything_that_is_missing_is_said_at_once():
    faults = machine.faults(replace(ABLE, root=False, go="", memory_gib=1.0), "1.26.8")

    assert len(faults) == 3


def test_the_go_version_is_read_from_the_module_that_is_built():
    assert machine.version(machine.go_wanted()) >= (1, 26)


AS_NOBODY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import machine, shutil, subprocess, tempfile, encodings.idna  # while the interpreter can be read
wanted = machine.go_wanted()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(*machine.faults(machine.look(), wanted), sep="\\n")
"""


def test_a_user_without_root_is_told_so():
    if not sys.platform.startswith("linux") or machine.os.geteuid() != 0:
        pytest.skip("only root can become somebody else")

    ended = subprocess.run(
        [sys.executable, "-I", "-c", AS_NOBODY, str(SCRIPT.parent)],
        capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": "/tmp"},
    )  # fmt: skip

    assert "not root" in ended.stdout
    assert "no Go on PATH" in ended.stdout


def test_a_machine_that_cannot_is_told_why_with_the_exit_code_for_unavailable():
    """An empty PATH: no Go, no package manager, whoever runs it."""
    ended = subprocess.run(
        [sys.executable, "-I", str(SCRIPT)],
        capture_output=True, text=True, check=False, env={"PATH": ""},
    )  # fmt: skip

    assert ended.returncode == machine.UNAVAILABLE
    assert ended.stderr.startswith("this machine cannot run the test cluster:")
    assert "no Go on PATH" in ended.stderr

"""Who may import whom: by static analysis (lint-imports), and seen from a fresh process."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

CORE_OF_THE_TRAINER = {"errors", "fields", "hub", "jobs", "results", "space", "spec", "steps"}

LIGHT = [
    "qtt_core.planner",
    "qtt_core.spec",
    "qtt_core.ledger.fold",
    "qtt_operator.turn",
    "qtt_operator.cli",
    "qtt_operator.local",
    "qtt_operator.optimizer_pool",
]
"""Loaded by the operator's main process, where torch would cost 0.5 GiB and two seconds."""

HEAVY = ("torch", "gpytorch", "sklearn")

PLANTED = {
    "planner-imports-optimizer": ("qtt_core/planner.py", "import qtt_core.encoding"),
    "core-imports-redis": ("qtt_core/spec.py", "import redis"),
    "core-imports-operator": ("qtt_core/steps.py", "import qtt_operator.turn"),
    "operator-imports-trainer": ("operator/qtt_operator/turn.py", "import qtt_trainer"),
    "trainer-imports-operator": ("trainer_image/qtt_trainer/data.py", "import qtt_operator"),
    "trainer-imports-ledger": (
        "trainer_image/qtt_trainer/data.py",
        "import qtt_core.ledger.events",
    ),
    "turn-imports-redis": ("operator/qtt_operator/turn.py", "import redis"),
    "pool-imports-worker": (
        "operator/qtt_operator/optimizer_pool.py",
        "import qtt_operator.optimizer_worker",
    ),
    "local-imports-kubernetes": ("operator/qtt_operator/local.py", "import kubernetes"),
    "operator-imports-torch": ("operator/qtt_operator/observe.py", "import torch"),
    "operator-imports-facade": ("operator/qtt_operator/cli.py", "import quicktune"),
}


def contracts(root: Path) -> list[dict]:
    """The import contracts of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_nothing_heavy(module, root, run):
    """Seen from a fresh process: an import inside a function or by name escapes static analysis."""
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"

    ended = run([sys.executable, "-c", code], root)

    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


def test_the_operators_main_process_does_not_load_configspace(root, run):
    """ConfigSpace pulls SciPy: 75 MiB and 0.7 s; an optimizer worker builds the spaces."""
    code = "import sys, qtt_operator.turn, qtt_core.planner; print('ConfigSpace' in sys.modules)"

    assert run([sys.executable, "-c", code], root).stdout.strip() == "False"


def test_the_tree_keeps_its_import_contracts(root, run, tool):
    ended = run([tool("lint-imports"), "--no-cache"], root)

    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(("path", "line"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_breaks_a_contract(path, line, copy, run, tool):
    target = copy / path
    target.write_text(target.read_text() + f"\n{line}\n")

    ended = run([tool("lint-imports"), "--no-cache"], copy)

    assert ended.returncode == 1
    assert "BROKEN" in ended.stdout, ended.stdout + ended.stderr


def test_every_module_of_the_core_has_its_layer(copy, run, tool):
    (copy / "qtt_core" / "newcomer.py").write_text('"""Belongs nowhere yet."""\n')

    ended = run([tool("lint-imports"), "--no-cache"], copy)

    assert ended.returncode == 1
    assert "newcomer" in ended.stdout


def test_the_trainers_list_of_core_modules_is_the_documented_one(root):
    contract = next(c for c in contracts(root) if c.get("source_modules") == ["qtt_trainer"])

    allowed = {line.rpartition("qtt_core.")[2] for line in contract["ignore_imports"]}

    assert allowed == CORE_OF_THE_TRAINER

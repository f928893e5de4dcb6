"""Optimizers of other packages, found in the metadata of what is installed."""

import pytest

from qtt_core import external
from qtt_core.errors import OptimizerError

METADATA = """Metadata-Version: 2.1
Name: grids
Version: 1.0
Provides-Extra: fast
Requires-Dist: numpy>=1; extra == "fast"
Requires-Dist: no-such-package>=2; extra == "fast"
Requires-Dist: nor-this-one
"""
ENTRY_POINTS = """[quicktune.optimizers]
grid = grids:build
fast-grid = grids:build [fast]
lost-grid = grids:gone
broken-grid = no_such_module:build
"""


@pytest.fixture
def grids(tmp_path, monkeypatch):
    """An installed package with four entry points."""
    (tmp_path / "grids.py").write_text("def build(space, **arguments):\n    return space\n")
    about = tmp_path / "grids-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(METADATA)
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("grids")
def test_an_installed_one_is_found_and_loaded():
    assert external.obstacle("grid") is None
    assert external.load("grid")("a space") == "a space"


@pytest.mark.usefixtures("grids")
def test_an_unknown_name_lists_the_known_ones():
    assert {"grid", "fast-grid", "optuna-gp", "optuna-tpe"} <= set(external.installed())
    with pytest.raises(OptimizerError, match=r"'gird'.*known here: .*fast-grid, grid.*optuna-tpe"):
        external.load("gird")


@pytest.mark.usefixtures("grids")
def test_packages_of_an_extra_that_are_not_here_are_named_with_what_to_type():
    """Those that every use of the package needs are pip's own concern."""
    with pytest.raises(OptimizerError, match=r"needs no-such-package: pip install 'grids\[fast\]'"):
        external.load("fast-grid")


@pytest.mark.usefixtures("grids")
@pytest.mark.parametrize(
    ("name", "words"), [("lost-grid", "no attribute 'gone'"), ("broken-grid", "no_such_module'")]
)
def test_one_that_cannot_be_imported_says_why(name, words):
    with pytest.raises(OptimizerError, match=f"cannot be loaded: .*{words}"):
        external.load(name)

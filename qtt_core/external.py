"""Optimizers of others, by entry point (`optimizer.algorithm: External`): which can be had here.

An entry point of the group names a callable that takes what `qtt_core.optimizer.QuickTune` takes.
Reads the metadata of installed packages; nothing is imported before `load`.
"""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from typing import Any

from qtt_core.errors import OptimizerError

GROUP = "quicktune.optimizers"
_EXTRA = re.compile(r"(?P<package>[\w.-]+).*extra == [\"'](?P<extra>[\w.-]+)[\"']")


def installed() -> tuple[str, ...]:
    """The names that packages here bring."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


def obstacle(name: str) -> str | None:
    """Why a name cannot be used here and what to do about it; None if it can."""
    found = _find(name)
    if found is None:
        known = (
            f"known here: {', '.join(installed())}" if installed() else "no package here has one"
        )
        return f"install the package with this entry point of {GROUP}; {known}"
    absent = _absent(found)
    if absent and found.dist is not None:
        wish = f"{found.dist.name}[{','.join(found.extras)}]"
        return f"needs {', '.join(absent)}: pip install '{wish}'"
    return None


def load(name: str) -> Any:
    """What builds the optimizer of this name. Raises: OptimizerError."""
    problem, found = obstacle(name), _find(name)
    if problem is not None or found is None:
        raise OptimizerError(f"external optimizer {name!r}: {problem}")
    try:
        return found.load()
    except (ImportError, AttributeError) as error:
        where = f"external optimizer {name!r} ({found.value})"
        raise OptimizerError(f"{where} cannot be loaded: {error}") from error


def _find(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=GROUP, name=name)), None)


def _absent(entry: EntryPoint) -> list[str]:
    """Packages of the extras that an entry point names and that are not here."""
    needs = (entry.dist.requires if entry.dist is not None else None) or ()
    wanted = [match for match in map(_EXTRA.match, needs) if match]
    return [m["package"] for m in wanted if m["extra"] in entry.extras and not _has(m["package"])]


def _has(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True

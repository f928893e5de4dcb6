"""Versions of what computed a result, for checkpoints and reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from qtt_core import __version__

LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy")


def installed_versions() -> dict[str, str]:
    """Name -> version of this project, Python and the libraries that touch numbers or pixels."""
    found = {"quicktune": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found

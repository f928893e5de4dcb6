"""How often processes of this pod ended because the ledger refused their write.

Such a process ends at once, before anybody scrapes it: a newer leader works. Its container is
started again in the same pod, and the next process finds the count on the pod's own /tmp.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

NAME = "quicktune-fenced"


def pods_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """What outlives a container of a pod; elsewhere nothing is kept."""
    return Path(tempfile.gettempdir()) if "KUBERNETES_SERVICE_HOST" in environ else None


def remember(folder: Path | None) -> None:
    """One more; a full disk must not keep the process from ending."""
    if folder is not None:
        with contextlib.suppress(OSError), (folder / NAME).open("ab") as file:
            file.write(b".")


def remembered(folder: Path | None) -> int:
    """How many so far."""
    try:
        return (folder / NAME).stat().st_size if folder is not None else 0
    except OSError:
        return 0

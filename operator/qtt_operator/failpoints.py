"""Where a test lets this process die: `QTT_FAILPOINT=committed`, or `committed:3` for the third.

They stand between two writes, where a crash leaves the first one without the second (30-kubernetes
3.3). Without the variable a place costs one comparison.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "QTT_FAILPOINT"
EXIT_CODE = 137

NAMES = (
    "elected", "asked", "opened", "created", "ended", "committed", "retried", "noted", "told",
    "forgotten", "status",
)  # fmt: skip
"""What has just happened: the Lease taken, an answer of the optimizer come, a decision recorded,
its job started, an end seen, a result recorded, a retry recorded, a note recorded, the optimizer
told, a job's time to live set, a status written."""


def armed(environ: Mapping[str, str]) -> tuple[str, int]:
    """The place and how often it is passed before; ("", 0) for none. Raises: ValueError."""
    text = environ.get(VARIABLE, "")
    name, _, nth = text.partition(":")
    if name and name not in NAMES:
        raise ValueError(f"{VARIABLE}={text}: use one of {', '.join(NAMES)}, or one with :N")
    return name, int(nth or 1) if name else 0


_name, _left = armed(os.environ)


def reached(name: str) -> None:
    """Die here if the environment says so: no handler, no buffer, no farewell runs."""
    global _left
    if name == _name:
        _left -= 1
        if _left == 0:
            os._exit(EXIT_CODE)  # SIGKILL to oneself does nothing to a container's first process

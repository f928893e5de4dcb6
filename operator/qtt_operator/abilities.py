"""What this version and this machine can do with a manifest that is right in itself. Pure but for
the list of installed packages; starts nothing and loads no torch.
"""

from __future__ import annotations

from qtt_core import external
from qtt_core.errors import Fault
from qtt_core.jobs import READABLE_CHANNELS, READABLE_FORMATS
from qtt_core.spec import TuningRun


def unreadable(run: TuningRun) -> list[Fault]:
    """Data sets that our trainer cannot read; a trainer of the user's own may read anything."""
    dataset = run.spec.dataset
    if run.spec.trainer.custom:
        return []
    faults = []
    if dataset.format not in READABLE_FORMATS:
        remedy = "is not read yet; convert the data set to ImageFolder: <split>/<class>/<image>"
        faults.append(Fault("spec.dataset.format", dataset.format, remedy))
    if dataset.in_channels not in READABLE_CHANNELS:
        remedy = "images are read with 1 channel (grey) or 3 (RGB)"
        faults.append(Fault("spec.dataset.inChannels", dataset.in_channels, remedy))
    return faults


def not_installed(run: TuningRun) -> list[Fault]:
    """An external optimizer that is not installed beside us, or not all of it."""
    wanted = run.spec.optimizer.name
    if run.spec.optimizer.algorithm != "External" or wanted is None:
        return []
    problem = external.obstacle(wanted)
    return [] if problem is None else [Fault("spec.optimizer.name", wanted, problem)]

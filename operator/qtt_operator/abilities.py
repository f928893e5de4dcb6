"""What this version and this machine can do with a manifest that is right in itself. Pure but for
the list of installed packages; starts nothing and loads no torch.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from qtt_core.errors import Fault
from qtt_core.jobs import READABLE_CHANNELS, READABLE_FORMATS
from qtt_core.spec import TuningRun
from qtt_core.steps import OPTIMIZER_ENTRY_POINTS


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
    """An optimizer of the user's own that is not installed beside us."""
    wanted = run.spec.optimizer.name
    if run.spec.optimizer.algorithm != "External" or wanted is None:
        return []
    here = sorted(entry.name for entry in entry_points(group=OPTIMIZER_ENTRY_POINTS))
    if wanted in here:
        return []
    known = f"known here: {', '.join(here)}" if here else "no package here has one"
    remedy = f"install the package with this entry point of {OPTIMIZER_ENTRY_POINTS}; {known}"
    return [Fault("spec.optimizer.name", wanted, remedy)]

"""What can be wrong with the images, each with the state it ends a job in (20-trainer 6).

One constructor argument only: a DataLoader rebuilds a worker's exception from its type and message.
"""

from __future__ import annotations

from typing import ClassVar

from qtt_core.errors import DataError
from qtt_core.results import State


class BadDataError(DataError):
    """Folders or images that cannot be trained on; the user's to mend."""

    state: ClassVar[State] = State.BAD_DATA


class DatasetChangedError(DataError):
    """The data set is no longer the one that `prepare` read."""

    state: ClassVar[State] = State.DATASET_CHANGED


class DataUnreachableError(DataError):
    """The volume failed while reading; another attempt may succeed."""

    state: ClassVar[State] = State.INFRA_STORAGE


class DecodeError(BadDataError):
    """One file that is no readable image."""

"""The command `prepare`: reads the data set once and leaves `dataset.json` for every later step.

Order: folders and classes (no image opened), then every image, then metafeatures, then landmarkers;
torch is loaded for the last only, so that a user's mistake is answered within a second. Nothing
below the data root is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtt_core.errors import DataError
from qtt_core.hub import ModelCard, parse_card
from qtt_core.jobs import READABLE_CHANNELS, READABLE_FORMATS, JobDocument
from qtt_core.results import State, StepResult
from qtt_core.steps import canonical_json
from qtt_trainer import metafeatures
from qtt_trainer.data_errors import BadDataError, DatasetChangedError
from qtt_trainer.dataset_manifest import DatasetManifest, save_manifest
from qtt_trainer.endings import EndedError
from qtt_trainer.pretrained import missing_weights
from qtt_trainer.scan import FoundFile, FoundSplit, QuickFacts, combine_edges, folders, scan_split
from qtt_trainer.splits import (
    MAX_OVERLAP_SHARE,
    Assignment,
    assign,
    check_corrupt,
    check_layout,
    raise_data_faults,
)
from qtt_trainer.verify import Verified, verify_files

log = logging.getLogger(__name__)

MISSING_BYTES = 1000
"""Of the 4096 bytes of a termination message: names of models without weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The scanned folders of both roles; `val` is None for an auto split."""

    train: FoundSplit
    val: FoundSplit | None

    @property
    def files(self) -> list[FoundFile]:
        """Every candidate image."""
        return [*self.train.files, *(self.val.files if self.val else ())]


def run(job: JobDocument) -> StepResult:
    """Prepare the job's data set; a fault of the data becomes the result's state and reason.

    Raises: OSError if `dataset.json` cannot be written; SpecError for a malformed card.
    """
    started = time.monotonic()
    try:
        manifest, timing = prepare(job)
    except DataError as error:
        state: State = getattr(error, "state", State.BAD_DATA)
        elapsed = time.monotonic() - started
        return StepResult(
            attempt=job.attempt,
            nonce=job.nonce,
            state=state,
            reason=str(error),
            timing={"total": elapsed},
        )
    lacking = missing_weights(_cards(job), job.paths.weights)
    return StepResult(
        attempt=job.attempt,
        nonce=job.nonce,
        state=State.OK,
        timing={**timing, "total": time.monotonic() - started},
        warnings=manifest.warnings,
        prepared=summary(manifest, lacking),
    )


def prepare(job: JobDocument) -> tuple[DatasetManifest, dict[str, float]]:
    """Read, check and describe the data set, and write its manifest; also seconds of each part.

    Raises: BadDataError with every fault found; DatasetChangedError if the job names another
    fingerprint; DataUnreachableError; OSError if the manifest cannot be written.
    """
    clock = _Clock()
    manifest, assignment, verified = _read(job, clock)
    manifest = _measured(job, manifest, assignment, verified)
    clock.lap("metafeatures")
    return _saved(job, manifest), clock.laps


def describe_again(job: JobDocument) -> DatasetManifest:
    """The manifest once more, without metafeatures, for a volume that `prepare` did not see.

    Class map, splits and left-out files follow from the images, the job and its seed alone.
    Raises: as `prepare` does; DatasetChangedError unless the fingerprint is the job's.
    """
    manifest, _, _ = _read(job, _Clock())
    return _saved(job, manifest)


def _saved(job: JobDocument, manifest: DatasetManifest) -> DatasetManifest:
    run_dir = Path(job.paths.root) / "runs" / job.run_uid
    return replace(manifest, digest=save_manifest(manifest, run_dir, job.task.class_map))


def _read(job: JobDocument, clock: _Clock) -> tuple[DatasetManifest, Assignment, Verified]:
    """Scan and verify; the manifest lacks what is measured on images."""
    root = Path(job.task.data)
    found = scan(job, root)
    clock.lap("scan")
    verified = verify_files(root, found.files, threads=job.limits.threads)
    raise_data_faults(check_corrupt(found.train, verified.faults))
    mark = combine_edges((f.path, f.size, verified.edges[f.path]) for f in found.files)
    if job.task.fingerprint not in {"", mark}:
        raise DatasetChangedError(
            f"{root}: the data set is not the one this run began with "
            f"(fingerprint {mark[:12]}, expected {job.task.fingerprint[:12]}); "
            "restore it, or start a new run"
        )
    assignment = assign(
        found.train,
        found.val,
        broken=verified.faults.keys(),
        auto_split=job.task.auto_split,
        seed=job.seed,
    )
    clock.lap("verify")
    manifest = DatasetManifest(
        class_names=assignment.class_names,
        splits=assignment.splits,
        fingerprint=mark,
        quick=QuickFacts.of(found.files),
        excluded=verified.faults,
        auto_split=assignment.auto_split,
        val_missing_classes=assignment.val_missing_classes,
        channels=job.task.in_chans,
    )
    return manifest, assignment, verified


def scan(job: JobDocument, root: Path) -> Found:
    """Find the folders of both roles and check their layout; opens no image.

    Raises: BadDataError with every fault.
    """
    task = job.task
    if task.format not in READABLE_FORMATS:
        raise BadDataError(
            f"dataset.format {task.format!r} cannot be read by this version; "
            "convert the data set to ImageFolder: <split>/<class>/<image>"
        )
    if task.in_chans not in READABLE_CHANNELS:
        raise BadDataError(f"{task.in_chans} channels: images are read with 1 (grey) or 3 (RGB)")
    if not root.is_dir():
        raise BadDataError(f"{root}: the data set's folder does not exist or is no folder")
    present = folders(root)
    train = scan_split(root, task.train_split)
    val = scan_split(root, task.val_split)
    if train and val and _same_folder(root, task.train_split, task.val_split):
        raise BadDataError(
            f"{root}: train ({task.train_split!r}) and val ({task.val_split!r}) are the same "
            "folder; validating on training images says nothing; remove val, set dataset.autoSplit"
        )
    check_layout(
        str(root),
        train,
        val,
        names=(task.train_split, task.val_split),
        auto_split=task.auto_split,
        present=present,
        num_classes=task.num_classes,
    )
    assert train is not None, "checked by check_layout"
    return Found(train=train, val=val)


def summary(manifest: DatasetManifest, lacking: Sequence[str]) -> dict[str, Any]:
    """What travels in the termination message: the ledger's `prepared`, without the file lists."""
    shown = list(lacking)
    while len(canonical_json(shown)) > MISSING_BYTES:
        shown.pop()
    facts: dict[str, Any] = {
        "fingerprint": manifest.fingerprint,
        "n_train": manifest.n_train,
        "n_val": manifest.n_val,
        "classes": manifest.num_classes,
        "metafeatures": dict(manifest.metafeatures),
        "excluded": manifest.excluded_counts(),
        "missing_weights": shown,
        "digest": manifest.digest,
    }
    if len(shown) < len(lacking):
        facts["missing_weights_total"] = len(lacking)
    if manifest.landmarker_model:
        facts["landmarker_model"] = manifest.landmarker_model
    return facts


def _measured(
    job: JobDocument, manifest: DatasetManifest, assignment: Assignment, verified: Verified
) -> DatasetManifest:
    root = Path(job.task.data)
    measured = metafeatures.measure(assignment, verified.images, root, channels=job.task.in_chans)
    probes, model = _landmarkers(job, root, assignment)
    measured |= probes
    measured |= {name: float(value) for name, value in job.task.metafeatures.items()}
    return replace(
        manifest,
        metafeatures=measured,
        metafeatures_version=metafeatures.VERSION,
        landmarker_model=model,
        warnings=_warnings(assignment, verified, measured["overlap_share"]),
    )


def _landmarkers(
    job: JobDocument, root: Path, assignment: Assignment
) -> tuple[dict[str, float], str]:
    """(values and missing flag, name of the model); without usable weights only the flag."""
    from qtt_trainer import landmarkers

    card = landmarkers.smallest(_cards(job), job.paths.weights)
    if card is None:
        return {"landmarker_missing": 1.0}, ""
    try:
        values = landmarkers.landmarkers(
            card,
            assignment,
            root,
            cache=job.paths.weights,
            img_size=job.task.img_size,
            channels=job.task.in_chans,
        )
    except EndedError as error:  # the step that needs this model will say it again, and stop
        log.warning("no landmarkers: %s", error)
        return {"landmarker_missing": 1.0}, ""
    return {**values, "landmarker_missing": 0.0}, card.name


def _warnings(assignment: Assignment, verified: Verified, overlap: float) -> tuple[str, ...]:
    warnings = list(assignment.warnings)
    if verified.faults:
        path, reason = next(iter(verified.faults.items()))
        count = len(verified.faults)
        warnings.append(f"{count} unreadable images are left out, such as {path} ({reason})")
    if overlap > MAX_OVERLAP_SHARE:
        warnings.append(
            f"{overlap:.1%} of the validation images are also training images (equal bytes): "
            "scores will be too high"
        )
    return tuple(warnings)


def _cards(job: JobDocument) -> list[ModelCard]:
    return [parse_card(raw) for raw in job.cards]


def _same_folder(root: Path, first: str, second: str) -> bool:
    return (root / first).samefile(root / second)


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now

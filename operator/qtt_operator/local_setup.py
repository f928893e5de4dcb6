"""From a manifest and command-line options to everything a local run needs, before anything starts.

Reads the manifest, resolves claims to folders, chooses devices and hub, and gathers the notes about
fields that act on a cluster only. Every user's mistake ends here, as SpecError or SpecDriftError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qtt_core.errors import SpecDriftError
from qtt_core.hub import Hub
from qtt_core.ledger.events import Run
from qtt_core.spec import RunSpec, TuningRun, changed_immutable_fields
from qtt_operator.devices import (
    Slot,
    count_cores,
    count_cuda,
    default_devices,
    make_slots,
    parse_devices,
)
from qtt_operator.documents import Places
from qtt_operator.lint import load_checked, local_notes
from qtt_operator.local_backend import SERVE
from qtt_operator.run_folder import DEFAULT_STATE_DIR, PRIORS, RunFolder, claim_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOptions:
    """The command line of `qtt run`."""

    manifest: Path
    mounts: Mapping[str, Path] = field(default_factory=dict)
    devices: str | None = None
    state_dir: Path = Path(DEFAULT_STATE_DIR)
    priors: Path | None = None
    """Folder of own priors; None: `priors` in the state folder."""
    fresh: bool = False
    redis_url: str | None = None
    test: bool = True
    serve: Sequence[str] = SERVE
    """Command of a trainer parent."""
    trainer: Sequence[str] = ()
    """Command of a trainer of the user's own, for `spec.trainer.custom`; empty: ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSetup:
    """A run that can start."""

    run: TuningRun
    spec: RunSpec
    """The manifest's, with the parallelism that the devices allow."""
    folder: RunFolder
    places: Places
    hub: Hub
    space_id: str
    space_sha: str
    space_definition: str
    """ConfigSpace's JSON of a `configSpaceRef`, empty for a named space."""
    priors: str
    """Folder of own priors."""
    files: Mapping[str, str]
    """Field -> digest of the file that it names."""
    slots: tuple[Slot, ...]
    prior: str = ""
    """As in the event `Run`; chosen once the ledger is known."""
    notes: tuple[str, ...] = ()


def prepare_local(options: LocalOptions) -> LocalSetup:
    """Read and resolve. Raises: SpecError with every fault and its remedy."""
    checked = load_checked(options.manifest, own_trainer=options.trainer)
    run, beside = checked.run, options.manifest.absolute().parent
    slots, notes = _slots(options.devices, run.spec.parallelism)
    folder = RunFolder(path=(options.state_dir / run.name).absolute())
    spec = replace(run.spec, parallelism=len(slots)) if options.devices else run.spec
    places, more = _places(run, options, beside, folder)
    return LocalSetup(
        run=run,
        spec=spec,
        folder=folder,
        places=places,
        hub=checked.hub,
        space_id=checked.space.space_id,
        space_sha=checked.space.sha,
        space_definition=checked.space_definition,
        priors=str((options.priors or options.state_dir / PRIORS).absolute()),
        files=checked.files,
        slots=slots,
        notes=(*notes, *more, *local_notes(run, beside, options.mounts)),
    )


def check_drift(recorded: Run, run: TuningRun, files: Mapping[str, str]) -> None:
    """Refuse a manifest, or a file it names, that describes another run than the one started.

    Raises: SpecDriftError naming the fields and `--fresh`.
    """
    fields = list(changed_immutable_fields(recorded.spec, run.raw_spec))
    fields += [
        f"the file of {name}"
        for name, digest in files.items()
        if recorded.files.get(name, digest) != digest  # a field that came or went is named above
    ]
    if fields:
        remedy = "undo the change, or start over with --fresh (the old state is kept aside)"
        raise SpecDriftError(fields, remedy)


def _slots(devices: str | None, parallelism: int) -> tuple[tuple[Slot, ...], list[str]]:
    cores, cuda = count_cores(), count_cuda()
    if devices is not None:
        return make_slots(parse_devices(devices, cuda), cores), []
    chosen = default_devices(parallelism, cores, cuda)
    notes = []
    if len(chosen) < parallelism:
        kind = "CUDA devices" if cuda else "cores"
        notes.append(f"parallelism {parallelism} on {len(chosen)} {kind}: {len(chosen)} at a time")
    return make_slots(chosen, cores), notes


def _places(
    run: TuningRun, options: LocalOptions, beside: Path, folder: RunFolder
) -> tuple[Places, list[str]]:
    """Where data, checkpoints and weights lie on this machine."""
    dataset, weights, checkpoint = run.spec.dataset, run.spec.weights, run.spec.checkpoint
    notes = []
    data = claim_folder(
        "spec.dataset.claimName", dataset.claim_name, options.mounts, beside, path=dataset.path
    )
    weights_dir = ""
    if weights.claim_name:
        field_name = "spec.weights.claimName"
        weights_dir = str(claim_folder(field_name, weights.claim_name, options.mounts, beside))
    root = folder.path
    claim = checkpoint.claim_name if checkpoint else None
    if claim and claim in options.mounts:
        path = checkpoint.sub_path if checkpoint else ""
        root = claim_folder("spec.checkpoint.claimName", claim, options.mounts, beside, path=path)
    elif checkpoint is not None:
        notes.append(f"spec.checkpoint: checkpoints go to {folder.path} (or use --mount)")
    offline = weights.fetch == "Never"
    cache = str(folder.path / "cache")
    return (
        Places(data=str(data), root=str(root), weights=weights_dir, cache=cache, offline=offline),
        notes,
    )

"""`qtt lint`: every fault of a manifest in one go, advice beside it; also how `qtt run` reads one.

From file to checked run: YAML, fields and rules (`qtt_core.spec`), hub and model limits, search
space, overrides, initial configurations, the files that `hubRef` and `configSpaceRef` name. It
starts nothing, writes nothing, needs no cluster and loads no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtt_core import spec
from qtt_core.catalogue import choose
from qtt_core.errors import Fault, SpecError
from qtt_core.fields import raise_faults
from qtt_core.hub import Hub, load_hub, read_hub, select
from qtt_core.space import SearchSpace, build_space, custom_space
from qtt_core.spec import Reference, Search, TuningRun
from qtt_core.steps import Config, digest
from qtt_operator.abilities import not_installed, unreadable
from qtt_operator.manifest_file import read_manifest, scan_manifest
from qtt_operator.run_folder import DEFAULT_STATE_DIR, PRIORS

_SPACE_REF, _HUB_REF = "spec.search.configSpaceRef", "spec.search.hubRef"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """A run whose references were resolved; `initial` are canonical, in the manifest's order."""

    run: TuningRun
    hub: Hub
    """Limited to the run's models."""
    space: SearchSpace
    initial: tuple[Config, ...] = ()
    space_definition: str = ""
    """ConfigSpace's JSON of a `configSpaceRef`, for `OptimizerSetup.space_definition`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Field -> digest of the file that it names, however it is laid out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LintReport:
    """What `qtt lint` prints: faults (exit 64), advice, and notes about a local run."""

    path: str
    faults: tuple[Fault, ...] = ()
    advice: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    checked: CheckedRun | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """Whether the manifest can be used."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for `-o json`."""
        return {
            "path": self.path,
            "ok": self.ok,
            "faults": [_fault_json(fault) for fault in self.faults],
            "advice": [_fault_json(fault) for fault in self.advice],
            "notes": list(self.notes),
        }


def load_run(path: Path) -> TuningRun:
    """The run of a manifest file, checked as `load_checked` does. Raises: SpecError."""
    return load_checked(path).run


def load_checked(path: Path, own_trainer: Sequence[str] = ()) -> CheckedRun:
    """The run of a manifest file with its hub and space, for a run on this machine.

    `own_trainer`: the command that trains, for `spec.trainer.custom`; empty: ours.
    Raises: SpecError with every fault; also where the manifest names another trainer.
    """
    checked = check_run(spec.parse_manifest(read_manifest(path)), path.absolute().parent)
    wrong = _wrong_trainer(checked.run.spec.trainer.custom, own_trainer)
    raise_faults([*wrong, *not_installed(checked.run)])
    return checked


def _wrong_trainer(custom: bool, command: Sequence[str]) -> list[Fault]:
    """Manifest and command line must name the same trainer, and its program must be there."""
    if custom and not command:
        remedy = "say how it is started: --trainer COMMAND; a cluster starts the template's image"
        return [Fault("spec.trainer.custom", True, remedy)]
    if command and not custom:
        remedy = "acts with spec.trainer.custom: true only; set that, or leave the option out"
        return [Fault("--trainer", " ".join(command), remedy)]
    if command and shutil.which(command[0]) is None:
        return [Fault("--trainer", command[0], "no such program; name one on PATH, or its path")]
    return []


def lint_file(
    path: Path, mounts: Mapping[str, Path] | None = None, priors: Path | None = None
) -> LintReport:
    """Everything wrong with a manifest file; never raises for a user's mistake.

    `mounts`: claim -> folder, as given by `--mount`. A claim without a folder is only a note: the
    manifest may be meant for a cluster. A mount that is not there is a fault. `priors`: folder of
    own priors, as given by `--priors`; without it a prior that is not here is only advice.
    """
    try:
        raw, faults = scan_manifest(path)
    except SpecError as error:
        return LintReport(path=str(path), faults=error.faults)
    faults = [*faults, *_mount_faults(mounts or {})]
    run, wrong = spec.scan_manifest(raw)
    faults += wrong
    if run is None:
        return LintReport(path=str(path), faults=tuple(faults))
    beside = path.absolute().parent
    checked, more = _resolve(run, beside) if _resolvable(wrong) else (None, [])
    unknown = _unknown_prior(checked, priors)
    faults += [*more, *unreadable(run), *_folder_faults("--priors", priors)]
    faults += [] if priors is None else unknown
    return LintReport(
        path=str(path),
        faults=tuple(faults),
        advice=(
            *spec.check_spec(run),
            *not_installed(run),  # no fault: the manifest may be meant for a cluster
            *(unknown if priors is None else ()),  # likewise
            *(_space_advice(checked, beside) if checked else ()),
        ),
        notes=tuple(local_notes(run, beside, mounts or {})),
        checked=None if faults else checked,
    )


def check_run(run: TuningRun, beside: Path) -> CheckedRun:
    """Resolve hub, space and configurations; files of references lie in the folder `beside`.

    Raises: SpecError with every fault.
    """
    checked, faults = _resolve(run, beside)
    raise_faults([*faults, *unreadable(run)])
    assert checked is not None  # no faults
    return checked


def choose_hub(run: TuningRun, beside: Path) -> Hub:
    """The run's cards: a shipped hub or a `hubRef`'s file, cut to models, limits and image size.

    Raises: SpecError.
    """
    search, limits = run.spec.search, run.spec.search.model_limits
    return select(
        _whole_hub(search, beside),
        models=search.models,
        max_params=limits.max_params,
        max_gmacs=limits.max_gmacs,
        licences=limits.licences,
        image_size=run.spec.dataset.image_size,
    )


def _whole_hub(search: Search, beside: Path) -> Hub:
    if search.hub_ref is None:
        return load_hub(search.hub)
    return read_hub(search.hub_ref.name, reference_text(_HUB_REF, search.hub_ref, beside))


def choose_space(
    run: TuningRun, hub: Hub, beside: Path, *, overrides: Mapping[str, str] | None = None
) -> SearchSpace:
    """The run's space over a hub: a named one with overrides, or a `configSpaceRef`'s file.

    Raises: SpecError.
    """
    search, fidelity = run.spec.search, run.spec.fidelity
    ref = search.config_space_ref
    if ref is None:
        return build_space(
            search.space or "",
            hub,
            max_fidelity=fidelity.max,
            step=fidelity.step,
            overrides=search.overrides if overrides is None else overrides,
            in_channels=run.spec.dataset.in_channels,
        )
    if search.overrides:
        remedy = "acts on a named space only; change the file of configSpaceRef instead"
        raise SpecError([Fault("spec.search.overrides", dict(search.overrides), remedy)])
    return custom_space(
        reference_text(_SPACE_REF, ref, beside),
        hub,
        max_fidelity=fidelity.max,
        step=fidelity.step,
        any_name=run.spec.trainer.custom,
    )


def reference_text(field_name: str, reference: Reference, beside: Path) -> str:
    """A ConfigMap's key as a file: `<name>/<key>` or `<key>` beside the manifest.

    Raises: SpecError that names both places.
    """
    places = (beside / reference.name / reference.key, beside / reference.key)
    for place in places:
        if place.is_file():
            try:
                return place.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise SpecError(
                    [Fault(field_name, str(place), f"cannot be read: {error}")]
                ) from error
    remedy = f"no file {places[0]} or {places[1]}; put the ConfigMap's key there"
    raise SpecError([Fault(field_name, f"{reference.name}/{reference.key}", remedy)])


def local_notes(run: TuningRun, beside: Path, mounts: Mapping[str, Path]) -> list[str]:
    """What a local run of this manifest ignores or still needs, one sentence each."""
    notes = []
    ignored = spec.cluster_only_fields(run)
    checkpoint = run.spec.checkpoint
    if checkpoint and checkpoint.claim_name in mounts:
        used = {"spec.checkpoint.claimName", "spec.checkpoint.subPath"}
        ignored = [path for path in ignored if path not in used]
    if ignored:
        notes.append(f"acts on a cluster only, ignored by `qtt run`: {', '.join(ignored)}")
    for claim in dict.fromkeys((run.spec.dataset.claim_name, run.spec.weights.claim_name)):
        if claim and claim not in mounts and not (beside / claim).is_dir():
            mount = f"--mount {claim}=/path/to/the/folder"
            notes.append(f"claim {claim}: no folder {beside / claim}; `qtt run` needs {mount}")
    return notes


def _resolve(run: TuningRun, beside: Path) -> tuple[CheckedRun | None, list[Fault]]:
    """What can be resolved, and every fault: a bad override does not hide a bad configuration."""
    try:
        hub = choose_hub(run, beside)
    except SpecError as error:
        return None, list(error.faults)
    faults: list[Fault] = []
    try:
        space = choose_space(run, hub, beside)
    except SpecError as error:
        faults = list(error.faults)
        if run.spec.search.config_space_ref is not None or not _overrides_only(faults):
            return None, faults
        space = choose_space(run, hub, beside, overrides={})
    initial, more = initial_configs(run.spec.search.initial_configs, space)
    faults += more
    if faults:
        return None, faults
    texts = _referenced(run, beside)
    checked = CheckedRun(
        run=run,
        hub=hub,
        space=space,
        initial=initial,
        space_definition=texts.get(_SPACE_REF, ""),
        files={name: digest(json.loads(text, parse_constant=str)) for name, text in texts.items()},
    )
    return checked, []


def _referenced(run: TuningRun, beside: Path) -> dict[str, str]:
    """Field -> text of the file that it names."""
    search = run.spec.search
    references = {_HUB_REF: search.hub_ref, _SPACE_REF: search.config_space_ref}
    return {
        name: reference_text(name, reference, beside)
        for name, reference in references.items()
        if reference is not None
    }


def initial_configs(
    given: Sequence[Mapping[str, str]], space: SearchSpace
) -> tuple[tuple[Config, ...], list[Fault]]:
    """Canonical initial configurations, and the faults of those that are none."""
    configs: list[Config] = []
    faults: list[Fault] = []
    for i, raw in enumerate(given):
        try:
            configs.append(space.canonical(raw))
        except SpecError as error:
            where = f"spec.search.initialConfigs[{i}]"
            faults += [Fault(f"{where}.{f.field}", f.value, f.expected) for f in error.faults]
    return tuple(configs), faults


_NEEDED = tuple(
    f"spec.{name}"
    for name in (
        "search.space",
        "search.hub",  # hubRef too
        "search.configSpaceRef",
        "search.models",
        "search.modelLimits",
        "fidelity",
        "dataset.imageSize",
        "dataset.inChannels",
    )
)


def _resolvable(faults: Sequence[Fault]) -> bool:
    """Whether hub and space are known in spite of faults elsewhere."""
    fields = [fault.field for fault in faults]
    return "spec.search" not in fields and not any(f.startswith(_NEEDED) for f in fields)


def _overrides_only(faults: Sequence[Fault]) -> bool:
    return all(fault.field.startswith("spec.search.overrides") for fault in faults)


def _space_advice(checked: CheckedRun, beside: Path) -> list[Fault]:
    """Settings without effect, repeated configurations, models that the image size removed."""
    run, space = checked.run, checked.space
    search = run.spec.search
    found = [
        Fault(f"spec.search.overrides.{name}", value, "has no effect: never active in this space")
        for name, value in search.overrides.items()
        if name not in space.names
    ]
    for i, (raw, config) in enumerate(zip(search.initial_configs, checked.initial, strict=True)):
        where = f"spec.search.initialConfigs[{i}]"
        found += [
            Fault(f"{where}.{name}", value, "has no effect beside the other values; left out")
            for name, value in raw.items()
            if name not in config
        ]
        if config in checked.initial[:i]:
            found.append(Fault(where, dict(raw), "repeats an earlier one; asked once"))
    return found + _hub_advice(run, _whole_hub(search, beside))


def _hub_advice(run: TuningRun, hub: Hub) -> list[Fault]:
    """What the run leaves out of a whole hub, or seems to."""
    size, search = run.spec.dataset.image_size, run.spec.search
    known = {card.licence.lower() for card in hub.cards}
    listed = ", ".join(sorted(known - {""})) or "not given"
    named = f"no model of hub {hub.name} has it; their licences are {listed}"
    found = [
        Fault(f"spec.search.modelLimits.licences[{i}]", licence, named)
        for i, licence in enumerate(search.model_limits.licences)
        if licence.lower() not in known
    ]
    lost = [card.name for card in hub.cards if not card.fits(size)]
    if lost and not search.models:
        text = f"leaves out models whose weights load at their own size only: {', '.join(lost)}"
        found.append(Fault("spec.dataset.imageSize", size, text))
    return found


def _unknown_prior(checked: CheckedRun | None, priors: Path | None) -> list[Fault]:
    """What a run would say to its `portfolio`: neither shipped nor in the folder, or damaged."""
    if checked is None:
        return []
    own = priors or Path(DEFAULT_STATE_DIR) / PRIORS
    search, optimizer = checked.run.spec.search, checked.run.spec.optimizer
    try:
        choose(search.portfolio, algorithm=optimizer.algorithm, hub=checked.hub, own=own)
    except SpecError as error:
        return list(error.faults)
    return []


def _folder_faults(option: str, folder: Path | None) -> list[Fault]:
    missing = folder is not None and not folder.is_dir()
    return [Fault(option, str(folder), "no such folder")] if missing else []


def _mount_faults(mounts: Mapping[str, Path]) -> list[Fault]:
    return [
        Fault("--mount", f"{claim}={folder}", "no such folder")
        for claim, folder in mounts.items()
        if not folder.is_dir()
    ]


def _fault_json(fault: Fault) -> dict[str, str]:
    return {"field": fault.field, "value": str(fault.value), "expected": fault.expected}

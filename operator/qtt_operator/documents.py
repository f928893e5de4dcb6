"""Renders job documents: the one place that turns a decision into what the trainer reads. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qtt_core.hub import Hub
from qtt_core.jobs import Flags, JobDocument, Limits, Paths, Task
from qtt_core.ledger.events import Prepared
from qtt_core.ledger.fold import LedgerState
from qtt_core.plan import CreateJob, Evaluation, Identity, Supply
from qtt_core.spec import RunSpec
from qtt_core.steps import Config, OptimizerSetup, Options, nonce, step_key

GRACE_SHARE, GRACE_SECONDS = 0.1, 60.0
"""The trainer ends by itself this much before the back end would kill it: time to checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a step finds things: absolute folders as the trainer process sees them."""

    data: str
    root: str
    weights: str = ""
    cache: str = ""
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContents:
    """What stays the same for every job of a run."""

    spec: RunSpec
    identity: Identity
    hub: Hub
    places: Places
    space_definition: str = ""
    """ConfigSpace's JSON of a `configSpaceRef`, empty for a named space."""
    supply: Supply = field(default_factory=Supply)
    priors: str = ""
    """Folder of own priors, as the optimizer worker sees it."""

    @property
    def references(self) -> dict[str, str]:
        """What the manifest refers to, as the store keeps it (`RedisLedger.refer`)."""
        hub = self.spec.search.hub_ref
        files = {} if hub is None else {"hub": json.dumps(self.hub.to_json())}
        return files | ({"space": self.space_definition} if self.space_definition else {})


def job_document(
    run: RunContents,
    job: CreateJob,
    ledger: LedgerState,
    config: Config | None = None,
    gc: tuple[str, ...] = (),
) -> JobDocument:
    """The document of `prepare` or of a step; the back end adds device and threads.

    Raises: SpecError if the configuration names a model that the hub lacks.
    """
    common = JobDocument(
        run_uid=run.identity.uid,
        attempt=job.attempt,
        nonce=nonce(job.decision, job.attempt),
        task=_task(run, ledger),
        paths=Paths(root=run.places.root, weights=run.places.weights, cache=run.places.cache),
        limits=Limits(wall_s=_wall(job.timeout_seconds), oom_kills=job.oom_kills),
        flags=Flags(allow_restart=job.allow_restart, offline=run.places.offline),
        seed=run.identity.seed,
        step=step_key(int(job.c), job.to) if job.c.isdigit() else step_key(job.c, job.to),
    )
    if config is None:
        common = replace(common, cards=tuple(card.to_json() for card in run.hub.cards))
        return common if job.evaluation is None else _scoring(run, common, job.evaluation)
    return replace(
        common,
        config_id=int(job.c),
        config=dict(config),
        space_id=run.identity.space_id,
        space_sha=run.identity.space_sha,
        card=run.hub.card(str(config["model"])).to_json(),
        fidelity_from=job.frm,
        fidelity_to=job.to,
        step_epochs=run.spec.fidelity.step,
        max_fidelity=run.spec.fidelity.max,
        gc=gc,
    )


def _scoring(run: RunContents, document: JobDocument, evaluation: Evaluation) -> JobDocument:
    """The kept checkpoints of a decision, on the run's own test split or on another claim's."""
    task = replace(document.task, split=run.spec.dataset.test_split)
    return replace(document, task=task, checkpoints=evaluation.checkpoints)


def optimizer_setup(run: RunContents, ledger: LedgerState) -> OptimizerSetup:
    """What the optimizer worker builds from: spec, hub and what `prepare` measured.

    The goal travels as a score in [0, 1], like every score inside.
    """
    spec, settings = run.spec, run.spec.optimizer
    goal = spec.objective.goal
    options = Options(
        pool_size=spec.search.pool_size,
        initial_configs=tuple(dict(config) for config in spec.search.initial_configs),
        goal=None if goal is None else spec.metric.to_score(goal),
        min_gain_per_gpu_hour=spec.objective.min_gain_per_gpu_hour,
        acquisition=settings.acquisition,
        cost_aware=settings.cost_aware,
        cost_factor=settings.cost_factor,
        steps_per_job=spec.fidelity.steps_per_job,
        refit=settings.refit,
        **_given(
            init_random=settings.init_random,
            patience=settings.patience,
            tolerance=settings.tolerance,
        ),
    )
    prepared = ledger.prepared
    return OptimizerSetup(
        algorithm=settings.algorithm,
        external=settings.name,
        space=spec.search.space or run.identity.space_id,
        hub=run.hub.to_json(),
        max_fidelity=spec.fidelity.max,
        step=spec.fidelity.step,
        seed=run.identity.seed,
        overrides=spec.search.overrides,
        space_definition=run.space_definition,
        in_channels=spec.dataset.in_channels,
        metafeatures=_facts(prepared) if prepared else {},
        prior=run.identity.prior,
        priors=run.priors,
        metric=spec.objective.metric,
        options=options,
    )


def _facts(prepared: Prepared) -> dict[str, float]:
    """Metafeatures with the counts the predictors need, whatever their source."""
    counts = {"n_train": prepared.n_train, "n_val": prepared.n_val, "num_classes": prepared.classes}
    return {name: float(value) for name, value in {**counts, **prepared.metafeatures}.items()}


def _given(**values: Any) -> dict[str, Any]:
    """Only what the manifest sets: the rest keeps the algorithm's default."""
    return {name: value for name, value in values.items() if value is not None}


def evaluate_document(
    run: RunContents,
    ledger: LedgerState,
    *,
    checkpoints: tuple[str, ...],
    split: str,
    token: str,
    data: str | None = None,
) -> JobDocument:
    """Score kept checkpoints on a split the search never read; `data` defaults to the run's."""
    task = _task(run, ledger)
    return JobDocument(
        run_uid=run.identity.uid,
        attempt=0,
        nonce=nonce(token, 0),
        task=replace(task, split=split, data=data or task.data),
        paths=Paths(root=run.places.root, weights=run.places.weights, cache=run.places.cache),
        flags=Flags(offline=run.places.offline),
        seed=run.identity.seed,
        step=token,
        checkpoints=checkpoints,
        cards=tuple(card.to_json() for card in run.hub.cards),
    )


def _task(run: RunContents, ledger: LedgerState) -> Task:
    dataset = run.spec.dataset
    return Task(
        data=run.places.data,
        train_split=dataset.train_split,
        val_split=dataset.val_split,
        fingerprint=ledger.prepared.fingerprint if ledger.prepared else "",
        metric=run.spec.objective.metric,
        format=dataset.format,
        img_size=dataset.image_size,
        auto_split=dataset.auto_split,
        in_chans=dataset.in_channels,
        num_classes=dataset.num_classes,
        metafeatures=_numbers(dataset.metafeatures),
    )


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _wall(timeout: float) -> float:
    return timeout - min(GRACE_SECONDS, GRACE_SHARE * timeout)

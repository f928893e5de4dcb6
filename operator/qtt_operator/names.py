"""Every name that people or other programs read: Jobs, condition types and reasons."""

from __future__ import annotations

import hashlib

COMPLETE_REASONS = ("BudgetExhausted", "GoalReached", "GainExhausted", "SpaceExhausted", "Stopped")
FAILED_REASONS = ("TooManyFailedConfigs", "BadData", "CheckpointVolumeLost", "StoreLost")


REASONS = {
    "Accepted": (
        "Valid", "Invalid", "InvalidSearchSpace", "DatasetNotFound", "BadData", "WeightsMissing",
        "PodRejected", "SpecDrift",
    ),
    "StoreAvailable": (
        "Connected", "Unreachable", "ReadOnly", "EvictionPolicy", "DataRegressed", "NewerSchema",
    ),
    "OptimizerHealthy": (
        "Ready", "Timeout", "OutOfMemory", "Failed", "FallbackRandom", "VersionSkew",
    ),
    "Progressing": (
        "StepsRunning", "FetchingWeights", "WaitingForQuota", "Unschedulable", "ImagePull",
        "VolumeAttach", "ReadWriteManyUnavailable", "InfraRetriesExhausted",
        "DiskFull", "NoProgress",
    ),
    "Suspended": ("UserRequested", "Draining", "DatasetChanged"),
    "Complete": (*COMPLETE_REASONS, "Reopened"),
    "Failed": (*FAILED_REASONS, "Reopened"),
}  # fmt: skip
"""Type of a condition -> its reasons; a run that ended is not `Progressing` for the same reason."""


def job_name(run: str, c: str, to: int, attempt: int) -> str:
    """`birds-c12-f3-a0`, `birds-prepare-a0`: deterministic, so that a create is idempotent."""
    return f"{run}-c{c}-f{to}-a{attempt}" if c.isdigit() else f"{run}-{c}-a{attempt}"


def attempt_folder(c: str, to: int, attempt: int) -> str:
    """Where an attempt's log and result lie, relative to the run's folder (20-trainer 5.2)."""
    return f"c{c}/attempts/f{to}.a{attempt}" if c.isdigit() else f"attempts/{c}.a{attempt}"


def checkpoint_folder(c: str, to: int) -> str:
    """Where a step's checkpoint lies, relative to the run's folder."""
    return f"c{c}/f{to}"


# --- on a cluster ---------------------------------------------------------------------------------

GROUP = "quicktune.dev"
RUN_LABEL, RUN_UID_LABEL = f"{GROUP}/run", f"{GROUP}/run-uid"
CONFIG_LABEL, FIDELITY_LABEL = f"{GROUP}/config", f"{GROUP}/fidelity"
ATTEMPT_LABEL = f"{GROUP}/attempt"
COMPONENT_LABEL = "app.kubernetes.io/component"
DECISION_ANNOTATION, OPEN_ANNOTATION = f"{GROUP}/decision", f"{GROUP}/open"
SEQUENCE_ANNOTATION, EPOCH_ANNOTATION = f"{GROUP}/seq", f"{GROUP}/epoch"
SUSPENDED_ANNOTATION, HELD_ANNOTATION = f"{GROUP}/suspended", f"{GROUP}/held-seconds"
"""On a Job: that we suspended it; device time of its pods that are gone."""
FILLED_BY_ANNOTATION = f"{GROUP}/filled-by"
"""On a data set's claim: the Job that must be Complete before a run reads it."""
RETRY_ANNOTATION, FINETUNE_ANNOTATION = f"{GROUP}/retry", f"{GROUP}/finetune"
EVALUATE_ANNOTATION = f"{GROUP}/evaluate"
TRAINER = "trainer"
"""The container that runs a step."""

SHARED_WEIGHTS = "quicktune-weights"
"""The claim that we make for all runs of a namespace, where many nodes can mount one."""

CHORES = ("garbage", "recovery")
"""Kinds of Jobs that belong to no decision: they look after the volume."""

FETCHES = "weights"
"""The kind of Job that has a way out, and mounts nothing but the claim that it fills."""


def checkpoint_claim(run: str) -> str:
    """The claim that the operator makes for a run's checkpoints."""
    return f"{run}-checkpoints"


def weights_claim(run: str) -> str:
    """The claim that the operator makes for a run's pretrained weights."""
    return f"{run}-weights"


def config_claim(run: str, c: str, uid: str) -> str:
    """`birds-c12-3fa9c`: a claim of one configuration (scope Config).

    The last part comes of the run's uid: a claim that an earlier run of this name left is not ours.
    """
    return f"{run}-c{c}-{hashlib.sha256(uid.encode()).hexdigest()[:5]}"

"""Every field of `.status`: kind, bounds, meaning. The CRD's schema is made from it.

`status.build_status` writes it, on a cluster and as `status.yaml` on one machine; a test holds the
two together. All lists are bounded: the whole stays below 8 KiB at any number of steps.
"""

from __future__ import annotations

from typing import Any

from qtt_core import plan as p
from qtt_core.schema import (
    INT64,
    Field,
    Kind,
    choice,
    integer,
    section,
    sequence,
    text,
)

MESSAGE_LENGTH = 1024
TOP = 5


def _time(about: str, **more: Any) -> Field:
    return Field(kind=Kind.TIME, about=about, **more)


def _count(about: str) -> Field:
    return integer(about, 0, INT64)


def _word(about: str, high: int = 256) -> Field:
    return text(about, high, low=0)


_CONDITION = section(
    "A fact about the run; address it by its type, never by its place.",
    {
        "type": text("What the condition is about.", 64, required=True),
        "status": choice("Whether it holds.", "True", "False", "Unknown", required=True),
        "observedGeneration": _count("Generation of the spec that it was computed from."),
        "lastTransitionTime": _time("When the status last changed.", required=True),
        "reason": text(
            "One word for programs.",
            64,
            pattern=r"[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9])?",
            hint="use one word",
            required=True,
        ),
        "message": text("A sentence for people.", MESSAGE_LENGTH, low=0, required=True),
    },
)

_TRIAL = {
    "configID": _count("Number of the configuration."),
    "model": _word("Its model."),
    "score": _word("Its score on the validation split, in the metric's unit."),
    "fidelity": _count("Epochs after which it had that score."),
    "costSeconds": _word("Seconds that it was trained and evaluated."),
}

STATUS = section(
    "What is known about the run; computed from the ledger and the cluster, can be lost.",
    {
        "phase": choice(
            "The conditions in one word, for people; programs read conditions.",
            *(phase.value for phase in p.Phase),
        ),
        "conditions": sequence("Facts about the run.", _CONDITION, 16, keys=("type",)),
        "observedGeneration": _count("Generation of the spec that was last acted on."),
        "seed": _count("Seed of the search, drawn if the spec names none."),
        "epoch": _count("Term of the leader that wrote the ledger last."),
        "selector": _word("Labels of the run's pods, for the scale subresource."),
        "startTime": _time("First entry of the ledger."),
        "completionTime": _time("When the run ended."),
        "lastStepTime": _time("When the last Job ended."),
        "estimatedCompletionTime": _time("When the budget will be spent at the present pace."),
        "jobs": section(
            "Jobs of steps.",
            {
                "running": _count("Running now."),
                "queued": _count("Created and not running yet."),
                "succeeded": _count("Ended with a result."),
                "failed": _count("Ended with a fact against their configuration."),
                "infraRetries": _count("Repeated for no fault of their configuration."),
            },
        ),
        "configs": section(
            "Configurations.",
            {
                "started": _count("With at least one step."),
                "stopped": _count("That get no further step."),
                "failed": _count("That failed."),
            },
        ),
        "consumed": section(
            "What was charged.",
            {
                "steps": _count("Steps of fidelity.step epochs."),
                "gpuSeconds": _count("Seconds of device time over all attempts."),
                "overheadSeconds": _count("Of them: in steps with a result, but not training."),
                "wastedSeconds": _count("Of them: in attempts without a result."),
                "queueSeconds": _count("Seconds that Jobs waited; not charged."),
            },
        ),
        "best": section(
            "The configuration to take: chosen with regard to noise.",
            {
                **_TRIAL,
                "score": _word("Its expected score, in the metric's unit."),
                "observedScore": _word("The best score that was seen, of any configuration."),
                "testScore": _word("Its score on held-out images, where one was measured."),
                "checkpoint": _word("Folder of its checkpoint below the run's.", 512),
                "time": _time("When its last step ended."),
            },
        ),
        "top": sequence(
            "The best configurations by observed score.", section("One of them.", _TRIAL), TOP
        ),
        "storeRef": _word("Where the ledger is: the store's address and the run's key."),
        "specHash": _word("Digest of the fields that may not change."),
        "prior": _word("The meta-learned prior it searches with; absent: it began cold."),
        "templateHash": _word("Digest of the template that the next steps take."),
        "jobFeatures": choice(
            "Degraded: the server drops pod failure policies, and any lost pod fails its Job.",
            "Full",
            "Degraded",
        ),
        "lastError": section(
            "What went wrong last.",
            {
                "time": _time("When."),
                "reason": _word("One word for programs."),
                "message": _word("A sentence for people.", MESSAGE_LENGTH),
            },
        ),
    },
)

"""Every field of `spec`: kind, bounds, default, what may change, what it means. The one source.

The parser (`spec_fields`), the defaults (`spec_defaults`), the CRD's schema and the tables of
docs/manifest.md are made from it. Rules between fields live in `spec_rules`. A description stands
alone: it is what `kubectl explain` prints. Source of names and bounds: 30-kubernetes 1.2, 1.3.
"""

from __future__ import annotations

from typing import Any

from qtt_core.schema import (
    INT32,
    INT64,
    Field,
    Kind,
    Reach,
    boolean,
    choice,
    decimal,
    duration,
    integer,
    mapping,
    section,
    sequence,
    text,
)
from qtt_core.steps import MAX_JOB_EPOCHS

CLUSTER = Reach.CLUSTER

ALGORITHMS = (
    "QuickTune",
    "QuickTunePaper",
    "ASHA",
    "SuccessiveHalving",
    "FreezeThawRandom",
    "Portfolio",
    "Random",
    "External",
)


def _claim(about: str, **more: Any) -> Field:
    """A claim is also a folder beside the manifest: its name must not lead elsewhere."""
    hint = "use the name of a claim, not a path; folders go into path"
    return text(about, forbidden=r"^\.\.?$|[/\x00]", hint=hint, **more)


def _relative(about: str, high: int, low: int, default: str, **more: Any) -> Field:
    """A path that stays where it starts."""
    hint = "use a relative path that stays inside the claim"
    forbidden = r"^/|(^|/)\.\.(/|$)|\x00"
    return text(about, high, low=low, default=default, forbidden=forbidden, hint=hint, **more)


def _reference(about: str, what: str, key: str, **more: Any) -> Field:
    fields = {
        "name": _claim(
            f"ConfigMap in the run's namespace that holds {what}; `qtt run` takes the folder of "
            "that name beside the manifest.",
            required=True,
        ),
        "key": _claim("Key of the ConfigMap; locally a file in that folder.", default=key),
    }
    return section(about, fields, **more)


_SETTING = text("A quoted value.", 128, low=0)
_PAIR = text("A text.", 1024, low=0)

DATASET = section(
    "Where the images are and how they are split.",
    {
        "claimName": _claim(
            "PersistentVolumeClaim that holds the images; `qtt run` takes the folder of that name "
            "beside the manifest, or --mount NAME=DIR.",
            required=True,
        ),
        "path": _relative("Folder inside the claim.", 512, 0, ""),
        "format": choice(
            "How the images are stored; this version reads ImageFolder and refuses the others when "
            "it prepares the data.",
            "ImageFolder",
            "CSV",
            "WebDataset",
            "Parquet",
            default="ImageFolder",
        ),
        "trainSplit": _relative("Folder of the training images.", 64, 1, "train"),
        "valSplit": _relative(
            "Folder of the validation images; a missing one is an error unless autoSplit is set.",
            64,
            1,
            "val",
        ),
        "testSplit": _relative(
            "Folder of the test images: read after the search only, may be missing.", 64, 1, "test"
        ),
        "autoSplit": decimal(
            "Share of train, stratified by class, that is held out as validation; between 0 and 1."
        ),
        "numClasses": integer("Number of classes; must agree with the folders.", 2, 100_000),
        "imageSize": integer("Side of an image in pixels; absent: each model's own.", 16, 1024),
        "inChannels": integer(
            "Channels of an image: 1 (grey) or 3 (RGB) with the trainer that is shipped.",
            1,
            64,
            default=3,
        ),
        "metaFeatures": mapping(
            "Override measured features of the data set, by name.",
            decimal("A quoted decimal."),
        ),
    },
    required=True,
    fixed=True,
)

SEARCH = section(
    "What is searched: models, hyperparameters and the pool of candidates.",
    {
        "space": text(
            "Named search space: native, quicktune-v1, qtt-compat or paper-table3; exactly one of "
            "space and configSpaceRef.",
            63,
        ),
        "configSpaceRef": _reference(
            "A ConfigSpace of your own, as its JSON.", "the space", "space.json"
        ),
        "portfolio": text(
            "Meta-learned prior: Auto (the shipped one that knows half of the hub's models, if "
            "any), micro, mini, extended, None (a cold start), or the name of a prior on the "
            "install's priors volume (with `qtt run`: in `--priors`).",
            63,
            default="Auto",
        ),
        "hub": text("Pretrained models to choose from: timm24 or tiny.", 63, default="timm24"),
        "hubRef": _reference(
            "Model cards of your own, in place of hub.", "the model cards", "hub.json"
        ),
        "models": sequence(
            "Keep only the cards with these names.", text("Name of a model.", 128), 256, unique=True
        ),
        "modelLimits": section(
            "Keep only the cards within these limits.",
            {
                "maxParams": integer("Most parameters of a model.", 1, INT64),
                "maxGMACs": decimal(
                    "Most multiply-adds an image, in 10^9, at the run's image size."
                ),
                "licences": sequence(
                    "Licences of weights that are accepted; absent: any.",
                    text("A licence.", 64),
                    32,
                    unique=True,
                ),
            },
        ),
        "poolSize": integer(
            "Candidate configurations drawn at the start.", 1, 100_000, default=512
        ),
        "initialConfigs": sequence(
            "Configurations tried first, in this order; names left out take the space's default.",
            mapping("Name of a hyperparameter: quoted value.", _SETTING),
            32,
        ),
        "overrides": mapping(
            'Narrow the space: lr: "1e-3" fixes a value, model: "a,b" narrows the choice.', _SETTING
        ),
    },
    default={"space": "native"},
    fixed=True,
)

OBJECTIVE = section(
    "What is optimised, and when it is good enough.",
    {
        "metric": text(
            "Metric measured on the validation split after each epoch: top1, top5, "
            "balanced_accuracy, macro_f1 or log_loss; another name only with trainer.custom.",
            63,
            default="top1",
        ),
        "direction": choice(
            "Whether more is better; absent: the metric's own (a custom one: Maximize).",
            "Maximize",
            "Minimize",
        ),
        "goal": decimal("End when a validation score is this good, in the metric's unit."),
        "minGainPerGPUHour": decimal(
            "End when no more than this is to be expected from another hour of device time, in the "
            "metric's unit."
        ),
    },
    default={},
    fixed=True,
)

FIDELITY = section(
    "How long a configuration trains, and in which portions.",
    {
        "max": integer(
            "Most epochs that a configuration gets.", 1, 1000, required=True, fixed=True
        ),
        "step": integer(
            "Epochs of a step: what is decided, charged and checkpointed at once.",
            1,
            MAX_JOB_EPOCHS,
            default=1,
            fixed=True,
        ),
        "stepsPerJob": Field(
            kind=Kind.INT_OR_TEXT,
            about="Steps of one configuration in a row before the next decision: a positive "
            "integer, or Auto for the optimizer's own next rung; at most max and 150 epochs.",
            default="Auto",
        ),
    },
    default={"max": 50},
)

OPTIMIZER = section(
    "The algorithm that chooses, and its switches.",
    {
        "algorithm": choice("Algorithm of the search.", *ALGORITHMS, default="QuickTune"),
        "name": text(
            "With External only: an entry point of the group quicktune.optimizers that the "
            "operator's image has and the install allows.",
            63,
        ),
        "acquisition": choice(
            "Acquisition function; acts in QuickTunePaper only.",
            "EI",
            "UCB",
            "Thompson",
            "Exploit",
            default="EI",
        ),
        "costAware": boolean("Weigh improvement against predicted cost.", default=True),
        "costFactor": decimal(
            "How strongly cost is weighed; absent: 0.7 in QuickTune, 1 in QuickTunePaper."
        ),
        "initRandom": integer(
            "Random configurations before the model is asked (3); acts in QuickTunePaper only.",
            0,
            10_000,
        ),
        "patience": integer(
            "Epochs without a gain of tolerance after which a configuration is left alone; "
            "absent: 5.",
            1,
            1000,
        ),
        "tolerance": decimal("Least gain that patience counts, in the score; absent: 0.001."),
        "refit": choice(
            "When the surrogate is fitted anew; acts in QuickTunePaper only.",
            "Always",
            "Never",
            "Auto",
            default="Auto",
        ),
        "seed": integer("Seed of the search; absent: drawn once and recorded.", 0, INT64),
        "timeout": duration("Limit of one question to the optimizer; absent: 60s."),
    },
    default={},
    fixed=True,
)

BUDGET = section(
    "When the run ends: at least one limit. A run that ended because its budget was spent goes on "
    "when the budget is raised.",
    {
        "maxSteps": integer("Steps of fidelity.step epochs; never exceeded.", 1, INT64),
        "maxGPUSeconds": integer(
            "Seconds of device time over all attempts, CPU slots included; exceeded by at most "
            "parallelism times one Job.",
            1,
            INT64,
        ),
        "maxWallclock": duration("Time since the run began."),
    },
    required=True,
)

TRAINER = section(
    "Who trains: the image that is shipped, or one of your own.",
    {
        "custom": boolean(
            "A trainer of your own, which keeps the step contract: the template's image, or on one "
            "machine the command of --trainer.",
            default=False,
        ),
        "devices": integer(
            "Devices a step; more than 1 with trainer.custom only.", 1, 64, default=1
        ),
    },
    default={},
    fixed=True,
)

WEIGHTS = section(
    "Where pretrained weights come from.",
    {
        "claimName": _claim(
            "PersistentVolumeClaim of pretrained weights, or locally a folder as for "
            "dataset.claimName; absent: the install's claim, or one that the operator makes, or "
            "locally your own hub cache."
        ),
        "fetch": choice(
            "Auto: fetch what is missing, on a cluster by one Job before the first step. Never: "
            "stay offline. Absent: the install's choice.",
            "Auto",
            "Never",
        ),
    },
    default={},
    fixed=True,
)

_CLAIM_TEMPLATE = section(
    "A claim that the operator makes: one for the run, or one for each configuration.",
    {
        "accessModes": sequence(
            "How the claim may be mounted; ReadWriteOncePod with parallelism 1 only.",
            choice("An access mode.", "ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"),
            4,
            low=1,
            unique=True,
            required=True,
        ),
        "storageClassName": text("Storage class; absent: the cluster's default.", low=0),
        "resources": section(
            "What the claim asks for.",
            {
                "requests": mapping(
                    "Name: quantity, such as storage: 200Gi.",
                    Field(kind=Kind.QUANTITY, about="An amount such as 200Gi."),
                    4,
                )
            },
            required=True,
        ),
    },
    fixed=True,
    reach=CLUSTER,
)

CHECKPOINT = section(
    "Where checkpoints live and which are kept; absent: the install's choice, by default one "
    "ReadWriteOnce claim a run. Locally they lie in the run's state folder.",
    {
        "claimName": _claim(
            "PersistentVolumeClaim for checkpoints; locally used with --mount only. Exactly one of "
            "claimName and volumeClaimTemplate.",
            fixed=True,
            reach=CLUSTER,
        ),
        "subPath": _relative("Folder inside the claim.", 512, 0, "", fixed=True, reach=CLUSTER),
        "volumeClaimTemplate": _CLAIM_TEMPLATE,
        "scope": choice(
            "Run: one volume for all configurations. Config: one claim for each configuration, "
            "<run>-c<id>-<5 digits>, made at its first step and deleted once it is closed and "
            "nothing in it is kept; needs volumeClaimTemplate.",
            "Run",
            "Config",
            default="Run",
            fixed=True,
            reach=CLUSTER,
        ),
        "maxVolumes": integer(
            "Most claims at once with scope Config. At the limit the least promising configuration "
            "gives its claim up; continued later, it is trained from the beginning.",
            1,
            10_000,
            reach=CLUSTER,
        ),
        "retention": choice(
            "Which checkpoints stay: the best, the best topK, all or none; those that a running "
            "search may still need always do. On a cluster a Job deletes the others before the "
            "run is Complete; a run that is to go on later needs All, or trains them again.",
            "Incumbent",
            "TopK",
            "All",
            "None",
            default="Incumbent",
        ),
        "topK": integer("How many checkpoints stay with retention TopK.", 1, 100, default=3),
    },
)

FAILURE_POLICY = section(
    "How often what is retried. Only facts about a configuration (it diverged, it does not fit "
    "into memory) reach the optimizer; everything else is retried, charged, and never told.",
    {
        "maxAppFailuresPerConfig": integer(
            "Retries after a bug in the trainer, then the configuration is left out.",
            0,
            100,
            default=1,
        ),
        "maxInfraRetriesPerStep": integer(
            "Retries after a kill, a time-out, a full disk; a killed runner does not count.",
            0,
            99,
            default=6,
        ),
        "maxFailedConfigs": integer(
            "The run fails beyond this; absent: half of search.poolSize, at least 10.", 1, INT64
        ),
        "onOOM": choice(
            "What happens to a configuration that does not fit into memory: it is closed, or tried "
            "once more with 1.5 times the memory that template gives trainer. Devices cannot be "
            "enlarged, nor can one machine: there it is tried once more as it is.",
            "FailConfig",
            "RetryLarger",
            default="FailConfig",
        ),
        "stepTimeout": duration(
            "Limit of one Job; absent: 10 times the expected time + 5 min, at least 15 min."
        ),
        "pendingTimeout": duration("Limit of a Job's wait for a node; absent: 30m.", reach=CLUSTER),
    },
    default={},
)

TEMPLATE = section(
    "Merged into the pod of each next step; its container is called trainer.",
    {
        "metadata": section(
            "Labels and annotations of the pods.",
            {
                "labels": mapping("Labels of the pods.", _PAIR),
                "annotations": mapping("Annotations of the pods.", _PAIR),
            },
        ),
        "spec": Field(
            kind=Kind.ANY,
            about="A pod's spec. It has no schema here: the rendered Pod is dry-run on the server "
            "before the first step. More than one device for trainer needs trainer.custom.",
        ),
    },
    reach=CLUSTER,
)

SPEC = section(
    "What the user wants: data, space, budget, and how to run.",
    {
        "suspend": boolean("Open no further steps; results are kept.", default=False),
        "suspendPolicy": choice(
            "With suspend: Drain lets running steps end, Evict suspends their Jobs.",
            "Drain",
            "Evict",
            default="Drain",
            reach=CLUSTER,
        ),
        "stop": boolean("End now and keep the results; cannot be undone.", default=False),
        "parallelism": integer(
            "Jobs at once; on one machine at most its devices.", 0, 512, default=1
        ),
        "dataset": DATASET,
        "search": SEARCH,
        "objective": OBJECTIVE,
        "fidelity": FIDELITY,
        "optimizer": OPTIMIZER,
        "budget": BUDGET,
        "trainer": TRAINER,
        "weights": WEIGHTS,
        "checkpoint": CHECKPOINT,
        "failurePolicy": FAILURE_POLICY,
        "gpuShare": text(
            "Share of a time-sliced device that a step has: seconds are charged times the share.",
            8,
            default="1",
            pattern=r"1|0?\.[0-9]*[1-9][0-9]*",
            hint='use a quoted share of more than 0 and at most 1, such as "1" or "0.5"',
        ),
        "queueName": text("Queue of Kueue that admits the Jobs.", low=0, reach=CLUSTER),
        "workloadPriorityClass": text("Kueue's priority class.", low=0, reach=CLUSTER),
        "template": TEMPLATE,
        "deletionPolicy": choice(
            "What happens to checkpoints and ledger when the object is deleted. Retain: the claims "
            "stay, the ledger for 30 days. Delete: both go, of a claim that you named the run's "
            "folder.",
            "Retain",
            "Delete",
            default="Retain",
            reach=CLUSTER,
        ),
        "ttlSecondsAfterFinished": integer(
            "Delete the object this many seconds after its end; absent: never.",
            0,
            INT32,
            reach=CLUSTER,
        ),
    },
)

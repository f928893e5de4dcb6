"""The vocabulary of a turn: what the planner is given and what it may order.

`PlannerInput` is everything a decision may depend on; a `Plan` is an ordered list of actions. Both
are plain frozen data, so that a decision can be written down, replayed and tested as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qtt_core.ledger.events import EVALUATION, Cancel, Done, Event, Fail, Open, Retry
from qtt_core.ledger.fold import LedgerState
from qtt_core.results import State, StepResult
from qtt_core.spec import RunSpec
from qtt_core.steps import BudgetView, Config, Proposal

# --- observed --------------------------------------------------------------------------------


class JobPhase(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


class Cause(StrEnum):
    """Words of a back end for ends that say nothing about the trainer (`JobEnd.reason`)."""

    RUNNER_LOST = "RunnerLost"
    VANISHED = "Vanished"
    EVICTED = "Evicted"
    NODE_LOST = "NodeLost"
    DEADLINE = "DeadlineExceeded"
    PENDING = "PendingTimeout"
    OOM_KILLED = "OOMKilled"
    STOPPED = "Stopped"
    SERVE_DIED = "ServeDied"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """How a job's trainer process ended, as the back end saw it.

    `exit_code` None = killed by `signal` or never seen to end; `message`: the termination message;
    `reason`: a `Cause`, or empty where the exit code says it all.
    Units: seconds of device time held, and seconds waited before it. `waits`: what it waited for
    (queue, schedule, pull) -> seconds; `ended_at`: when the trainer ended, by its node's clock.
    """

    exit_code: int | None
    signal: int | None = None
    message: str = ""
    reason: str = ""
    device_seconds: float = 0.0
    queue_seconds: float = 0.0
    node: str = ""
    waits: Mapping[str, float] = field(default_factory=dict)
    ended_at: float | None = None


class Ending(StrEnum):
    """What an end means (30-kubernetes 5.3)."""

    RESULT = "result"
    PREPARED = "prepared"
    EVALUATED = "evaluated"
    FETCHED = "fetched"
    BAD_JOB = "bad_job"
    BAD_DATA = "bad_data"
    BUG = "bug"
    INFRA = "infra"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A classified end: kind, the trainer's state or the back end's reason, and the checked result.

    `scores`: (absolute epoch, score in [0, 1], seconds), converted from the metric's native value.
    """

    kind: Ending
    reason: str
    message: str = ""
    state: State | None = None
    result: StepResult | None = None
    scores: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedJob:
    """One job, by the decision it belongs to; `c` as in the ledger.

    A back end leaves `verdict` None; the gather stage fills it for ended jobs. `pending_since`:
    since when nothing but the cluster keeps a pending job from running (queues are not counted);
    None = no limit. `put_aside`: we suspended it ourselves, nobody else did. `opening`: the
    decision as the job carries it, for a ledger that lost it.
    """

    name: str
    kind: str
    c: str
    to: int
    attempt: int
    phase: JobPhase
    created_at: float
    started_at: float | None = None
    pending_since: float | None = None
    put_aside: bool = False
    opening: OpenStep | None = None
    end: JobEnd | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """All jobs of the run; `synced_at`: when the list was last known to be complete."""

    jobs: tuple[ObservedJob, ...] = ()
    synced_at: float = 0.0
    devices: int = 512
    """How many jobs the back end can run at once (locally: the device slots)."""
    volumes: frozenset[str] | None = None
    """Configurations that have a volume of their own; None where all share one."""


# --- the other inputs --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a run is, fixed at its start."""

    uid: str
    name: str
    seed: int
    space_id: str
    space_sha: str
    spec_hash: str
    version: str
    raw_spec: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    prior: str = ""
    """Both as in the event `Run`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerView:
    """Where the optimizer is: loaded, busy with a call, and its unconsumed answer.

    `told`: stream id of the last event it was fed. `answered`: an ask made after that event has
    come back; its `proposals` may be empty and `finished` says why nothing is left (`goal`, `gain`,
    `exhausted`, `budget`).
    """

    loaded: bool = False
    busy: bool = False
    told: str = "0-0"
    answered: bool = False
    proposals: tuple[Proposal, ...] = ()
    finished: str | None = None
    error: str = ""
    fault: str = ""
    """The kind of the error: a reason of the condition `OptimizerHealthy`."""
    retry_at: float = 0.0
    """When the failed call may be tried again, seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A configuration with a score, as a person's wish may choose it.

    `fidelity`: its newest epoch; `checkpoint`: a folder of its best one that is still kept, empty
    if none is. Units: score in [0, 1], seconds of one Job per epoch.
    """

    config_id: int
    config: Config
    fidelity: int
    score: float
    seconds_per_epoch: float
    closed: bool = False
    checkpoint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a person asked for beside the manifest, as written; each acts once.

    `retry`: a token. `finetune`: `<token> <k>`. `evaluate`: `<token> CLAIM[:path]`.
    """

    retry: str = ""
    finetune: str = ""
    evaluate: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """Where pretrained weights come from; on one machine, where steps fetch them, the default.

    `models`: those that one `weights` job looks for in `claim` and fetches if they are not there,
    before `prepare`; empty: nothing may or need be fetched. `hub`: as a person names it.
    """

    models: tuple[str, ...] = ()
    claim: str = ""
    hub: str = ""
    offline: bool = False
    """Steps have no network: a model without weights would fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerInput:
    """Everything a decision may depend on; `now` in seconds since 1970.

    `candidates`: best first, filled only while a wish needs them. `counted_steps`: how many steps a
    second witness, the status, has counted; more than the ledger has means that it lost some.
    """

    spec: RunSpec
    identity: Identity
    ledger: LedgerState
    observed: Observed
    optimizer: OptimizerView
    now: float
    wishes: Wishes = Wishes()
    candidates: tuple[Candidate, ...] = ()
    counted_steps: int = 0
    supply: Supply = Supply()


# --- actions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordNote:
    """Write run, prepared, note, close or reopen once per key."""

    event: Event
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Write an end exactly once."""

    event: Done | Fail | Retry | Cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """The job's end is recorded: the second witness may go (a cluster sets the Job's TTL)."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptimizer:
    """Build the optimizer in its worker and replay the ledger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Feed the optimizer what the ledger holds behind `told`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """A proposal that will not be opened."""

    config_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """End a job now."""

    job: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendJob:
    """Take a job's device away and keep the attempt; it goes on from its checkpoint."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeJob:
    """Let a job run that we put aside."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStep:
    """Record a decision."""

    event: Open
    config: Config | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation scores, and on what: `claim` "" = the run's own test split.

    `checkpoints`: folders below the run's; `path` lies in the claim.
    """

    checkpoints: tuple[str, ...]
    claim: str = ""
    path: str = ""

    def to_json(self) -> dict[str, Any]:
        """As the decision's `why` carries it."""
        return {
            "rule": EVALUATION, "claim": self.claim, "path": self.path,
            "checkpoints": list(self.checkpoints),
        }  # fmt: skip

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_json`."""
        return cls(
            checkpoints=tuple(raw["checkpoints"]), claim=str(raw["claim"]), path=str(raw["path"])
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateJob:
    """Start the present attempt of an open decision.

    `oom_kills`: how often the host killed it for memory: fewer loader workers.
    `memory_factor`: of the memory that the manifest gives it. `avoid_nodes`: nodes whose device
    failed lately. `evaluation`: of kind `evaluate` only.
    """

    kind: str
    c: str
    frm: int
    to: int
    attempt: int
    decision: str
    timeout_seconds: float
    allow_restart: bool = False
    oom_kills: int = 0
    memory_factor: float = 1.0
    avoid_nodes: tuple[str, ...] = ()
    evaluation: Evaluation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask the optimizer for at most n proposals; the answer is input of a later turn."""

    n: int
    budget: BudgetView


@dataclass(frozen=True, slots=True, kw_only=True)
class EmitEvent:
    """Tell people; `reason` as an Event of Kubernetes has it."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue:
    """Take another turn after so many seconds, whatever happens."""

    after: float


Action = (
    RecordNote
    | Commit
    | Forget
    | LoadOptimizer
    | Tell
    | Abandon
    | Kill
    | SuspendJob
    | ResumeJob
    | OpenStep
    | CreateJob
    | Ask
    | EmitEvent
    | Requeue
)


class Phase(StrEnum):
    """For people's eyes; no code branches on it."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    RUNNING = "Running"
    DRAINING = "Draining"
    SUSPENDED = "Suspended"
    FINISHING = "Finishing"
    COMPLETED = "Completed"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Actions in order, the phase, and why nothing moves (`held`: reason and message) if so."""

    actions: tuple[Action, ...]
    phase: Phase
    held: tuple[str, str] | None = None

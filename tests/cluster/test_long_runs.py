"""A run of 100,000 steps: its status stays small, and a turn costs what it cost at the start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from qtt_core import plan as p
from qtt_core.history import Histories
from qtt_core.ledger.events import Done, Event, Open, Prepared, Run
from qtt_core.ledger.fold import LedgerState, fold
from qtt_core.planner import decide
from qtt_core.spec import Budget, Dataset, Fidelity, RunSpec
from qtt_core.steps import Best, Recommendation
from qtt_operator.cluster_status import Truth, cluster_status, size_bytes
from qtt_operator.progress import progress
from qtt_operator.status import build_status

EPOCHS, STEPS_A_JOB = 50, 2
START = 1_700_000_000
SPEC = RunSpec(
    dataset=Dataset(claim_name="d"), budget=Budget(max_steps=10**6, max_gpu_seconds=1e7),
    fidelity=Fidelity(max=EPOCHS), parallelism=8,
)  # fmt: skip
IDENTITY = p.Identity(
    uid="u", name="long", seed=1, space_id="s", space_sha="s", spec_hash="h" * 64, version="0"
)
LONG_WORDS = "w" * 5000


def stream(steps: int) -> Iterator[Event]:
    """Configurations trained to the end one after the other, two steps a Job."""
    yield Run(
        id=f"{START}000-0", name="long", spec_hash="h", seed=1, algorithm="Random", version="0",
        space_hash="s", spec={"fidelity": {"max": EPOCHS, "step": 1}},
    )  # fmt: skip
    yield Open(id=f"{START}000-1", c="prepare", frm=0, to=1, h="", res=1.0)
    yield Prepared(id=f"{START}000-2", fingerprint="f", n_train=9, n_val=9, classes=2)
    for number in range(steps // STEPS_A_JOB):
        c, job = divmod(number, EPOCHS // STEPS_A_JOB)
        frm = job * STEPS_A_JOB
        at = START * 1000 + number * 10
        to = frm + STEPS_A_JOB
        yield Open(id=f"{at}-3", c=str(c), frm=frm, to=to, h=f"h{number}", res=5.0)
        score = 0.3 + 0.6 * ((c * 7919) % 1000) / 1000 * to / EPOCHS
        epochs = tuple((epoch, score, 1.5) for epoch in range(frm + 1, to + 1))
        yield Done(
            id=f"{at}-4", c=str(c), to=to, a=0, state="ok", epochs=epochs, dev=4.0, ov=1.0, ck="x",
            bytes=1000,
        )  # fmt: skip


@dataclass
class Past:
    """What a process keeps of a run between two turns."""

    events: list[Event]
    state: LedgerState
    histories: Histories
    configs: dict[str, dict[str, str]]

    @staticmethod
    def of(steps: int) -> Past:
        events = list(stream(steps))
        configs = {str(c): {"model": "m" * 60} for c in range(steps // EPOCHS + 9)}
        histories = Histories()
        histories.take(events, configs)
        return Past(events, fold(events), histories, configs)

    def turn(self, fresh: list[Event]) -> dict[str, object]:
        """What every turn does with new events, but for talking to others; the status."""
        self.events.extend(fresh)
        self.state = fold(fresh, self.state)
        self.histories.take(fresh, self.configs)
        now = self.state.last_end + 1
        left = progress(SPEC, self.state, self.events, now).seconds_left
        decide(
            p.PlannerInput(
                spec=SPEC, identity=IDENTITY, ledger=self.state,
                observed=p.Observed(synced_at=now),
                optimizer=p.OptimizerView(loaded=True, told=self.state.last_id), now=now,
            )
        )  # fmt: skip
        top = self.histories.best(1)[0]
        best = Best(config_id=top.config_id, fidelity=top.fidelity, score=top.best_score or 0.0)
        return build_status(
            spec=SPEC, identity=IDENTITY, ledger=self.state, histories=self.histories,
            observed=p.Observed(), phase=p.Phase.RUNNING, held=("NoProgress", LONG_WORDS),
            recommendation=Recommendation(
                config_id=top.config_id, fidelity=top.fidelity, score=0.5, best_observed=best,
                n_val=9,
            ),
            now=now, seconds_left=left,
        )  # fmt: skip


@pytest.fixture(scope="module")
def long() -> Past:
    return Past.of(100_000)


def test_the_status_of_100_000_steps_fits_into_8_kib(long: Past) -> None:
    assert long.state.steps == 100_000
    status = long.turn([])

    full = cluster_status(
        status,
        [
            Truth(type=kind, status=False, reason="NoProgress", message=LONG_WORDS)
            for kind in ("StoreAvailable", "OptimizerHealthy", "Accepted")
        ],
        previous=[], uid="u" * 36, generation=10**6, now=START, store="redis://" + "r" * 200,
    )  # fmt: skip
    full["lastError"] = {"time": "t" * 20, "reason": "r" * 60, "message": LONG_WORDS[:1024]}

    assert len(status["top"]) == 5  # type: ignore[arg-type]
    assert size_bytes(full) <= 8 * 1024


def test_a_turn_after_100_000_steps_costs_what_it_cost_after_2_000(long: Past) -> None:
    """CPU time of this thread, so that a busy machine does not matter; linear would be 50 times."""
    short = Past.of(2_000)

    costs = [_cost(past) for past in (short, long)]

    assert costs[1] < 8 * costs[0]


def _cost(past: Past) -> float:
    """CPU seconds of a hundred turns with a new decision or result each."""
    last = len(past.histories)
    fresh: list[list[Event]] = []
    for number, event in enumerate(stream(100)):
        if isinstance(event, Open | Done) and event.c != "prepare":
            at = (START + 10**6) * 1000 + number
            fresh.append([replace(event, id=f"{at}-0", c=str(last + int(event.c)))])
    began = time.thread_time()
    for events in fresh:
        past.turn(events)
    return time.thread_time() - began

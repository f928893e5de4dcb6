"""The live view: what it says, that it fits, and that it does not jump."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from qtt_core.history import histories
from qtt_core.ledger.events import Open
from qtt_core.ledger.fold import LedgerState, fold
from qtt_core.plan import Phase
from qtt_core.spec import Budget, Dataset, Fidelity, Objective, RunSpec
from qtt_operator.live import clock, eta_seconds, progress_share, render, sparkline
from qtt_operator.local_backend import RunningStep
from qtt_operator.snapshot import Snapshot

SPEC = RunSpec(
    dataset=Dataset(claim_name="images"),
    budget=Budget(max_steps=20, max_gpu_seconds=100.0),
    objective=Objective(goal=0.98),
    fidelity=Fidelity(max=4),
    parallelism=2,
)


def running(c="7", to=4, **progress):
    return RunningStep(
        name=f"r-c{c}", kind="step" if c.isdigit() else "prepare", c=c, to=to, device="cpu",
        started_at=8.0, progress=progress,
    )  # fmt: skip


@pytest.fixture
def snapshot(recorded):
    events = recorded.events()[:-3]  # before c9 and the end
    events.append(
        replace(Open(c="7", frm=3, to=4, h="h", res=3.0, why=events[-2].why), id="9500-0")
    )
    return Snapshot(
        name="birds",
        spec=SPEC,
        phase=Phase.RUNNING,
        state=fold(events),
        histories=histories(events, recorded.configs),
        running=(running(epoch=4, update=5, updates=10, value=0.91),),
        recommendation=None,
        now=10.0,
        slots=2,
        models=6,
    )


def drawn(snapshot, width=80, **console):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, **console).print(render(snapshot, width))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_the_frame_is_closed(snapshot, width):
    lines = drawn(snapshot, width).splitlines()

    assert {len(line) for line in lines} == {min(width, 140)}
    assert all(line[0] + line[-1] in {"╭╮", "││", "╰╯"} for line in lines)


def test_it_names_run_goal_budget_step_prediction_and_incumbent(snapshot):
    text = drawn(snapshot)

    for words in (
        "birds · top1 ≥ 0.98 · Running 9s",
        "4 of 20",
        "10 of 100 s",
        "c7       mini_vit",
        "50%",
        "0.900 ± 0.050",
        "0.9100",
        "best     0.9500",
        "c7 epoch 2 · mini_vit",
        "2 configurations",
        "QuickTune · 6 models · 2 slots",
    ):
        assert words in text, words


def test_the_height_is_the_same_at_every_moment_of_a_run(snapshot):
    empty = replace(snapshot, state=LedgerState(), histories={}, running=())
    moments = [
        empty,
        replace(empty, running=(running("prepare", 1),), phase=Phase.PREPARING),
        snapshot,
        replace(snapshot, running=(*snapshot.running, running("0", 2))),
        replace(snapshot, running=(), doing="asking the optimizer"),
        replace(snapshot, draining=True),
        replace(snapshot, trouble="DiskFull: no space left"),
    ]

    assert len({len(drawn(moment).splitlines()) for moment in moments}) == 1


def test_only_the_basic_colours_are_used_so_that_light_terminals_can_read_it(snapshot):
    text = drawn(snapshot, force_terminal=True, color_system="truecolor")

    codes = {code for part in text.split("\x1b[")[1:] for code in part.split("m")[0].split(";")}
    assert not codes & {"38", "48", "30", "37", "97"}, "no fixed colours, no black, no white"


def test_progress_counts_the_epochs_of_this_job_only():
    step = running(to=4, epoch=3, update=5, updates=10)

    assert progress_share(step, done_before=2) == 0.25
    assert progress_share(running(to=4), done_before=2) == 0.0
    assert progress_share(running(to=4, epoch=4, update=10, updates=10), done_before=2) == 1.0


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [
        (Budget(max_steps=20), (16 * 10.5 / 4 - 2) / 2),
        (Budget(max_gpu_seconds=100.0), (100 - 10.5 - 2) / 2),
        (Budget(max_wallclock=30.0), 21.0),
        (Budget(max_steps=20, max_wallclock=12.0), 3.0),
        (Budget(max_steps=4), 0.0),
    ],
)
def test_the_time_left_is_that_of_the_first_limit_reached(snapshot, budget, seconds):
    """4 steps in 10.5 device-seconds so far; one step runs since 2 s; 9 s since the start."""
    spec = replace(snapshot.spec, budget=budget)

    assert eta_seconds(replace(snapshot, spec=spec)) == pytest.approx(seconds)


def test_no_time_left_is_claimed_before_there_is_a_pace(snapshot):
    assert eta_seconds(replace(snapshot, state=LedgerState())) is None
    assert eta_seconds(replace(snapshot, draining=True)) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m 00s"), (65, "1m 05s"), (7380, "2h 03m"), (-3, "0s")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert clock(seconds) == text


def test_a_curve_is_scaled_to_its_own_range():
    assert sparkline([0.1, 0.2, 0.3]) == "▁▅█"
    assert sparkline([0.5]) == ""
    assert sparkline([0.5, 0.5]) == "▁▁"
    assert len(sparkline([n / 50 for n in range(50)])) == 12

"""The live view of `qtt run` in a terminal: budget bars, running steps, incumbent, last results.

`render` is a pure function from a `Snapshot` and a width to something rich can print; `LiveView`
puts it at the bottom of the terminal. Its height stays the same while a run goes on, and only the
sixteen basic colours are used, so that it neither jumps nor vanishes on a light background.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qtt_core.history import ConfigHistory, Standing
from qtt_core.plan import Phase
from qtt_core.steps import Metric
from qtt_operator.local_backend import RunningStep
from qtt_operator.report import number, predicted, settings, shown
from qtt_operator.snapshot import Snapshot

log = logging.getLogger(__name__)

LAST_RESULTS = 3
MOST_SLOTS = 16
"""Rows of running steps at most; a terminal has few lines."""

WIDE = 110
"""From this width on the settings of a running step are shown."""

BLOCKS = "▁▂▃▄▅▆▇█"

_PHASE_STYLE = {
    Phase.RUNNING: "green",
    Phase.COMPLETED: "bold green",
    Phase.FAILED: "bold red",
    Phase.DRAINING: "yellow",
    Phase.SUSPENDED: "yellow",
}

_STANDING_MARK = {
    Standing.DIVERGED: ("✗ diverged", "red"),
    Standing.OOM: ("✗ out of memory", "red"),
    Standing.INFEASIBLE: ("✗ infeasible", "red"),
    Standing.RETIRED: ("✗ given up", "yellow"),
}


def render(snapshot: Snapshot, width: int) -> RenderableType:
    """The whole view, `width` columns wide."""
    metric = snapshot.spec.metric
    inner = max(40, min(width, 140) - 4)
    parts: list[RenderableType] = [
        _budget(snapshot, inner),
        Text(),
        _running(snapshot, metric, inner),
        Text(),
        _incumbent(snapshot, metric, inner),
        _last_results(snapshot, metric, inner),
        _footer(snapshot),
    ]
    return Panel(
        Group(*parts),
        box=ROUNDED,
        title=_title(snapshot, metric),
        title_align="left",
        subtitle=_subtitle(snapshot),
        subtitle_align="right",
        border_style="dim",
        width=inner + 4,
    )


# --- frame ----------------------------------------------------------------------------------------


def _title(snapshot: Snapshot, metric: Metric) -> Text:
    """`digits · top1 ≥ 0.98 · Running 1m 43s`."""
    title = Text(f"{snapshot.name} ", style="bold not dim")
    goal = snapshot.spec.objective.goal
    aim = (
        metric.name if goal is None else f"{metric.name} {'≥' if metric.maximise else '≤'} {goal:g}"
    )
    title.append(f"· {aim} · ", style="not dim not bold")
    phase = "Draining" if snapshot.draining else snapshot.phase.value
    style = _PHASE_STYLE.get(snapshot.phase, "cyan")
    title.append(phase, style=f"{'yellow' if snapshot.draining else style} not dim")
    if snapshot.state.first_time:
        end = snapshot.state.closed.time if snapshot.state.closed else snapshot.now
        title.append(f" {clock(end - snapshot.state.first_time)}", style="dim not bold")
    return title


def _subtitle(snapshot: Snapshot) -> Text:
    """`QuickTune · 6 models · 2 slots`."""
    slots = f"{snapshot.slots} slot{'s' * (snapshot.slots > 1)}"
    models = f"{snapshot.models} model{'s' * (snapshot.models > 1)}"
    algorithm = snapshot.spec.optimizer.algorithm
    return Text(f"{algorithm} · {models} · {slots}", style="dim")


# --- budget ---------------------------------------------------------------------------------------


def _budget(snapshot: Snapshot, width: int) -> RenderableType:
    """One bar per limit, the whole row as wide as the view."""
    grid = Table.grid(padding=(0, 1), expand=False)
    grid.add_column(style="dim", no_wrap=True, min_width=10)
    bar = max(12, width - 46)
    grid.add_column(no_wrap=True, width=bar)
    grid.add_column(no_wrap=True, justify="right", min_width=18)
    grid.add_column(no_wrap=True, justify="right", style="dim", min_width=12)
    rows = list(_limits(snapshot))
    left = eta_seconds(snapshot)
    for position, (name, used, limit, text) in enumerate(rows):
        note = f"~{clock(left)} left" if position == 0 and left is not None else ""
        grid.add_row(
            name,
            ProgressBar(
                total=max(limit, 1e-9),
                completed=min(used, limit),
                width=bar,
                complete_style="cyan",
                finished_style="green",
                style="bright_black",
            ),
            text,
            note,
        )
    return grid


def _limits(snapshot: Snapshot) -> list[tuple[str, float, float, str]]:
    """(name, used, limit, words) of every limit that is set."""
    budget, state = snapshot.spec.budget, snapshot.state
    rows: list[tuple[str, float, float, str]] = []
    if budget.max_steps is not None:
        text = f"{state.steps} of {budget.max_steps}"
        rows.append(("steps", state.steps, budget.max_steps, text))
    if budget.max_gpu_seconds is not None:
        text = f"{state.charged_seconds:.0f} of {budget.max_gpu_seconds:.0f} s"
        rows.append(("device", state.charged_seconds, budget.max_gpu_seconds, text))
    if budget.max_wallclock is not None:
        used = snapshot.now - state.first_time if state.first_time else 0.0
        text = f"{clock(used)} of {clock(budget.max_wallclock)}"
        rows.append(("wall clock", used, budget.max_wallclock, text))
    return rows


def eta_seconds(snapshot: Snapshot) -> float | None:
    """Seconds until the first limit is reached at the pace so far; None while there is no pace."""
    budget, state = snapshot.spec.budget, snapshot.state
    if state.closed is not None or snapshot.draining:
        return None
    at_once = max(1, min(snapshot.slots, snapshot.spec.parallelism))
    in_flight = sum(snapshot.now - step.started_at for step in snapshot.running)
    waits: list[float] = []
    if budget.max_steps is not None and state.steps > 0:
        pace = state.charged_seconds / state.steps
        waits.append(((budget.max_steps - state.steps) * pace - in_flight) / at_once)
    if budget.max_gpu_seconds is not None and state.steps > 0:
        waits.append((budget.max_gpu_seconds - state.charged_seconds - in_flight) / at_once)
    if budget.max_wallclock is not None and state.first_time:
        waits.append(state.first_time + budget.max_wallclock - snapshot.now)
    return max(0.0, min(waits)) if waits else None


# --- running steps --------------------------------------------------------------------------------


def _running(snapshot: Snapshot, metric: Metric, width: int) -> RenderableType:
    """One row per slot, empty slots included: the height must not change."""
    wide = width + 4 >= WIDE
    table = Table(
        box=None, padding=(0, 2, 0, 0), show_header=True, header_style="dim", pad_edge=False
    )
    rest = width - 7 - 7 - 14 - 13 - 6 - 2 * (6 if wide else 5)
    model = 22 if wide else max(12, rest)
    table.add_column("running", style="cyan", no_wrap=True, width=7)
    table.add_column("model", no_wrap=True, width=model, overflow="ellipsis")
    if wide:
        table.add_column("settings", no_wrap=True, width=max(10, rest - model), style="dim")
    table.add_column("epochs", no_wrap=True, justify="right", width=7)
    table.add_column("progress", no_wrap=True, width=14)
    table.add_column("predicted", no_wrap=True, justify="right", width=13)
    table.add_column("so far", no_wrap=True, justify="right", width=6)
    steps = snapshot.running[: max(1, min(snapshot.slots, MOST_SLOTS))]
    for step in steps:
        table.add_row(*_running_row(snapshot, step, metric, wide=wide))
    for position in range(min(snapshot.slots, MOST_SLOTS) - len(steps)):
        words = snapshot.doing if position == 0 else ""
        table.add_row(Text("–", style="dim"), Text(words, style="dim italic"))
    return table


def _running_row(
    snapshot: Snapshot, step: RunningStep, metric: Metric, *, wide: bool
) -> list[RenderableType]:
    past = snapshot.histories.get(int(step.c)) if step.c.isdigit() else None
    if past is None:
        label = "reading the data" if step.kind == "prepare" else step.kind
        cells: list[RenderableType] = [Text(step.kind), Text(label, style="italic")]
        elapsed = Text(clock(snapshot.now - step.started_at), style="dim")
        return [*cells, *([Text()] if wide else []), Text(), elapsed]
    cells = [Text(f"c{step.c}"), Text(str(past.config.get("model", "?")))]
    if wide:
        cells.append(Text(settings(past.config, 2)))
    first, last = past.fidelity + 1, step.to
    span = str(last) if first >= last else f"{first}–{last}"
    prediction = predicted(past.why, metric) if past.why is not None else ""
    return [
        *cells,
        Text(span),
        _progress(step, past),
        Text(prediction),
        _so_far(step, past, metric),
    ]


def _progress(step: RunningStep, past: ConfigHistory) -> RenderableType:
    """Share of the step's updates that are done."""
    share = progress_share(step, past.fidelity)
    text = Text(no_wrap=True)
    full = round(9 * share)
    text.append("━" * full, style="cyan")
    text.append("━" * (9 - full), style="bright_black")
    text.append(f" {100 * share:3.0f}%")
    return text


def progress_share(step: RunningStep, done_before: int) -> float:
    """0..1: finished epochs of this job plus the running epoch's updates."""
    progress = step.progress
    epochs = max(1, step.to - done_before)
    epoch = float(progress.get("epoch") or 0)
    update, updates = float(progress.get("update") or 0), float(progress.get("updates") or 0)
    if not progress or epoch <= 0:
        return 0.0
    inside = update / updates if updates > 0 else 0.0
    return max(0.0, min(1.0, (epoch - 1 - done_before + inside) / epochs))


def _so_far(step: RunningStep, past: ConfigHistory, metric: Metric) -> Text:
    value = step.progress.get("value")
    if value is None and past.last_score is not None:
        value = metric.to_value(past.last_score)
    return Text("–" if value is None else f"{float(value):.4f}")


# --- results --------------------------------------------------------------------------------------


def _incumbent(snapshot: Snapshot, metric: Metric, width: int) -> Text:
    """`best  0.9812 ▂▅▇█ c12 epoch 5 · model · settings`."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("best     ", style="dim")
    chosen = snapshot.recommendation
    past = snapshot.histories.get(chosen.config_id) if chosen is not None else best_of(snapshot)
    if past is None or past.best_score is None:
        return text.append("no result yet", style="dim italic")
    score = past.best_score
    text.append(shown(metric.to_value(score), metric), style="bold green")
    text.append(f" {sparkline(past.scores)} ", style="green")
    text.append(f"c{past.config_id}", style="cyan")
    text.append(f" epoch {past.best_epoch} · {past.config.get('model', '?')}")
    text.append(f" · {settings(past.config, 2)}", style="dim")
    text.truncate(width, overflow="ellipsis")
    return text


def best_of(snapshot: Snapshot) -> ConfigHistory | None:
    """The configuration with the best single measurement."""
    scored = [past for past in snapshot.histories.values() if past.best_score is not None]
    return max(scored, key=lambda past: past.best_score or 0.0, default=None)


def sparkline(scores: Sequence[float], longest: int = 12) -> str:
    """A curve in a few characters, scaled to its own range."""
    tail = list(scores)[-longest:]
    if len(tail) < 2:
        return ""
    low, high = min(tail), max(tail)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((score - low) / span * (len(BLOCKS) - 1))] for score in tail)


def _last_results(snapshot: Snapshot, metric: Metric, width: int) -> RenderableType:
    """The newest results, one line each, padded to a constant height."""
    ended = [past for past in snapshot.histories.values() if past.ended_at]
    ended.sort(key=lambda past: past.ended_at, reverse=True)
    lines = []
    for position in range(LAST_RESULTS):
        line = Text("last     " if position == 0 else "         ", style="dim", no_wrap=True)
        if position < len(ended):
            line.append_text(_result(ended[position], metric))
            line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return Group(*lines)


def _result(past: ConfigHistory, metric: Metric) -> Text:
    text = Text(style="not dim")
    mark = _STANDING_MARK.get(past.standing)
    if past.last_score is None or mark is not None:
        words, style = mark or (past.reason or past.standing.value, "yellow")
        text.append(f"{words} ", style=style)
    else:
        text.append(shown(metric.to_value(past.last_score), metric))
    text.append(f" c{past.config_id}", style="cyan")
    seconds = f" in {number(past.seconds[-1], 2)} s" if past.seconds else ""
    text.append(f" epoch {past.fidelity}{seconds} · {past.config.get('model', '?')}")
    text.append(f" · {settings(past.config, 2)}", style="dim")
    return text


def _footer(snapshot: Snapshot) -> Text:
    """Trouble if there is any, else the counts."""
    if snapshot.trouble:
        return Text(f"held     {snapshot.trouble}", style="bold yellow", no_wrap=True)
    seen = len(snapshot.histories)
    failed = len(snapshot.state.failed)
    text = Text("tried    ", style="dim")
    text.append(f"{seen} configuration{'s' * (seen != 1)}", style="not dim")
    if failed:
        text.append(f", {failed} failed", style="not dim")
    if snapshot.state.infra_retries:
        text.append(f", {snapshot.state.infra_retries} attempts repeated", style="not dim")
    return text


def clock(seconds: float) -> str:
    """`42s`, `1m 05s`, `2h 03m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class LiveView:
    """Keeps `render` at the bottom of a terminal; notes and warnings scroll above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """A line above the view."""
        self.console.print(Text.assemble(("note  ", "yellow"), text))

    def line(self, text: str) -> None:
        """Decisions and results are in the view itself; `-v` shows the lines above it."""
        log.info("%s", text)

    def show(self, snapshot: Snapshot) -> None:
        """Draw the run as it is now."""
        self._live.update(render(snapshot, self.console.width), refresh=True)

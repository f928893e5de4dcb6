"""`qtt run` for a person: the view that fits, the run, and what is said at its end.

At the end: leaderboard, path of the best checkpoint, its score on the test split (which the search
never saw), and one sentence that says why that configuration won.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from qtt_core.errors import DataError, VolumeError
from qtt_operator.cli import Outcome
from qtt_operator.documents import evaluate_document
from qtt_operator.evaluation import EvaluationError, evaluate, read_kept
from qtt_operator.live import LiveView, clock
from qtt_operator.local import Finished, View, run_local
from qtt_operator.local_setup import LocalOptions
from qtt_operator.local_start import run_dir
from qtt_operator.output import render
from qtt_operator.report import Checkpoint, Row, leaderboard, shown, why_it_won, with_test
from qtt_operator.run_folder import parse_mounts, write_atomically
from qtt_operator.snapshot import Snapshot
from qtt_operator.tables import leaderboard_columns

log = logging.getLogger(__name__)

TOP = 10
LOG_BYTES = 8 << 20


class PlainView:
    """One line per decision and result, for logs, pipes and CI."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def note(self, text: str) -> None:
        """Marked, so that it can be found."""
        self.line(f"note: {text}")

    def line(self, text: str) -> None:
        """With the time of day."""
        self._stream.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
        self._stream.flush()

    def show(self, snapshot: Snapshot) -> None:
        """Nothing between the lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """What is said at the end."""

    rows: list[Row]
    winner: Row | None
    sentence: str
    checkpoint: Path | None
    test_note: str = ""


async def run_verb(arguments: argparse.Namespace) -> Outcome:
    """Run, then report. The exit code is the ending's."""
    options = LocalOptions(
        manifest=arguments.manifest,
        mounts=parse_mounts(arguments.mount),
        devices=arguments.devices,
        state_dir=arguments.state_dir,
        priors=arguments.priors,
        fresh=arguments.fresh,
        redis_url=arguments.redis_url,
        test=not arguments.no_test,
        trainer=arguments.trainer,
    )
    with _view(plain=arguments.plain) as view:
        async with run_local(options, view) as finished:
            report = await _report(finished, view, test=options.test)
    return Outcome(text=_text(finished, report, arguments.output), code=finished.ending.code)


@contextmanager
def _view(*, plain: bool) -> Iterator[View]:
    """The live table on a terminal, lines elsewhere; both on standard error."""
    console = Console(stderr=True, highlight=False)
    if plain or not console.is_terminal or console.width < 60:
        yield PlainView(sys.stderr)
        return
    with LiveView(console) as view, _logging_above(console):
        yield view


@contextmanager
def _logging_above(console: Console) -> Iterator[None]:
    """Log lines scroll above the live table instead of tearing it."""

    class Above(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(self.format(record), markup=False)

    root, above = logging.getLogger(), Above()
    above.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    before = root.handlers[:]
    root.handlers[:] = [above]
    try:
        yield
    finally:
        root.handlers[:] = before


# --- the end --------------------------------------------------------------------------------------


async def _report(finished: Finished, view: View, *, test: bool) -> _Report:
    """Rows, winner and sentence; the winner's test score where there is a test split."""
    context, setup = finished.context, finished.setup
    metric = setup.spec.metric
    folder = run_dir(setup.places, context.run.identity.uid)
    recommended = _recommended(finished)

    def kept(checkpoint: Checkpoint) -> bool:
        return (folder / checkpoint.folder / "manifest.json").is_file()

    rows = leaderboard(
        context.events, context.configs, metric=metric, recommended=recommended, kept=kept
    )
    winner = next((row for row in rows if row.best), rows[0] if rows else None)
    if winner is None:
        return _Report(rows=[], winner=None, sentence="", checkpoint=None)
    note = ""
    if test and finished.ending.complete:
        rows, note = await _tested(finished, rows, winner, view)
        winner = next(row for row in rows if row.config_id == winner.config_id)
    sentence = why_it_won(
        context.events,
        rows,
        winner=winner,
        metric=metric,
        spent_seconds=context.state.charged_seconds,
        n_val=context.state.prepared.n_val if context.state.prepared else 0,
    )
    return _Report(
        rows=rows,
        winner=winner,
        sentence=sentence,
        checkpoint=folder / winner.checkpoint,
        test_note=note,
    )


def _recommended(finished: Finished) -> int | None:
    """The optimizer's own word, also for a run that had ended before this process began."""
    if finished.context.recommendation is not None:
        return finished.context.recommendation.config_id
    from qtt_operator.record import read_status

    best = read_status(finished.setup.folder).get("best")
    return int(best["configID"]) if isinstance(best, Mapping) else None


async def _tested(
    finished: Finished, rows: list[Row], winner: Row, view: View
) -> tuple[list[Row], str]:
    """The winner's score on the test split, kept so that asking again costs nothing."""
    setup, context = finished.setup, finished.context
    split = setup.spec.dataset.test_split
    if not (Path(setup.places.data) / split).is_dir():
        return rows, f"no {split} split in {setup.places.data}"
    path = setup.folder.path / "evaluation.json"
    known = read_kept(path)
    key = f"{winner.checkpoint}:{split}"
    if key not in known:
        token = f"eval-{winner.config_id}-{winner.fidelity}"
        document = evaluate_document(
            context.run, context.state, checkpoints=(), split=split, token=token
        )
        try:
            found = await evaluate(finished.backend, document, [winner.checkpoint])
        except (EvaluationError, DataError, VolumeError) as error:
            return rows, f"not scored on {split}: {error}"
        known[key] = found[(winner.config_id, winner.fidelity)]
        write_atomically(path, json.dumps(known, indent=1))
    scores = {(winner.config_id, winner.fidelity): known[key]}
    return with_test(rows, scores, setup.spec.metric.name), ""


def _text(finished: Finished, report: _Report, form: str) -> str:
    """The report as text; with `-o json` and its like only the rows."""
    metric = finished.setup.spec.metric
    records = [row.to_json() for row in report.rows[:TOP]]
    if form != "table":
        return render([row.to_json() for row in report.rows], form)
    ending, state = finished.ending, finished.context.state
    lines = []
    if records:
        terminal: dict[str, Any] = {}
        if sys.stdout.isatty():
            terminal = {"width": Console().width, "colour": True}
        tested = any(row.test is not None for row in report.rows)
        columns = leaderboard_columns(metric, tested=tested)
        lines.append(render(records, "table", columns, **terminal).rstrip("\n"))
    used = (
        f"{state.steps} step{'s' * (state.steps != 1)}, {state.charged_seconds:.0f} device-seconds"
    )
    if state.first_time and state.last_end:
        used += f", {clock(state.last_end - state.first_time)}"
    lines.append(f"{ending.reason}: {ending.message or 'done'} ({used})")
    winner = report.winner
    if winner is None and ending.complete:
        lines.append("no checkpoint: it ended before the first result; raise the budget to go on")
    if winner is not None and report.checkpoint is not None:
        lines.append(f"best checkpoint: {_short(report.checkpoint)}")
        if winner.test is not None:
            split = finished.setup.spec.dataset.test_split
            value = shown(winner.test, metric)
            lines.append(f"{metric.name} on the {split} split, never used in the search: {value}")
        elif report.test_note:
            lines.append(f"test: {report.test_note}")
        lines.append(report.sentence)
    return "\n".join(lines) + "\n"


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

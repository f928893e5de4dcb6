"""The verbs of `qtt`, one function each: from parsed arguments to text and exit code.

Reading verbs share the ledger reader and never write; `run` is `local`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtt_core.errors import UnknownConfigurationError
from qtt_operator.cli import Outcome
from qtt_operator.exits import COMPLETE, USAGE
from qtt_operator.output import Column, render, render_one
from qtt_operator.record import RunRecord, read_record, read_status
from qtt_operator.report import Row, evaluated, with_test
from qtt_operator.run_folder import RunFolder, find_run, parse_mounts
from qtt_operator.tables import leaderboard_columns, statistics_columns, status_columns

LOG_TAIL_BYTES = 1 << 20


def run(arguments: argparse.Namespace) -> Outcome:
    """`qtt run FILE`."""
    from qtt_operator.run_verb import run_verb

    return asyncio.run(run_verb(arguments))


def lint(arguments: argparse.Namespace) -> Outcome:
    """`qtt lint FILE`: faults, advice, notes; exit 64 if there is a fault."""
    from qtt_operator.lint import lint_file

    report = lint_file(arguments.manifest, parse_mounts(arguments.mount), arguments.priors)
    code = COMPLETE if report.ok else USAGE
    if arguments.output != "table":
        return Outcome(text=render_one(report.to_json(), arguments.output), code=code)
    lines = [f"error   {fault}" for fault in report.faults]
    lines += [f"advice  {fault}" for fault in report.advice]
    lines += [f"note    {note}" for note in report.notes]
    count = len(report.faults)
    verdict = "ok" if report.ok else f"{count} fault{'s' * (count > 1)}"
    return Outcome(text="\n".join((*lines, f"{report.path}: {verdict}")) + "\n", code=code)


def leaderboard(arguments: argparse.Namespace) -> Outcome:
    """`qtt leaderboard RUN [--test DIR]`."""
    record = _record(arguments)
    rows = record.leaderboard(arguments.top)
    rows = with_test(rows, evaluated(record.events), record.metric.name)
    if arguments.test is not None and rows:
        from qtt_operator.held_out import score_on

        rows = asyncio.run(score_on(record, rows, arguments.test, arguments.devices))
    tested = any(row.test is not None for row in rows)
    columns = leaderboard_columns(record.metric, tested=tested)
    return _printed(rows, columns, arguments, empty="no checkpoint yet")


def statistics(arguments: argparse.Namespace) -> Outcome:
    """`qtt statistics RUN`."""
    record = _record(arguments)
    columns = statistics_columns(record.metric)
    return _printed(record.statistics(), columns, arguments, empty="no configuration yet")


def logs(arguments: argparse.Namespace) -> Outcome:
    """`qtt logs RUN CONFIG`: every attempt's log, oldest first."""
    folder = find_run(arguments.run, arguments.state_dir)
    run_dir = _run_dir(folder)
    attempts = _attempt_folders(run_dir, arguments.config)
    if arguments.last:
        attempts = attempts[-1:]
    entries = [_log_entry(path, run_dir) for path in attempts]
    if arguments.output != "table":
        return Outcome(text=render(entries, arguments.output))
    parts = [f"==> {entry['attempt']} ({entry['state']}) <==\n{entry['log']}" for entry in entries]
    return Outcome(text="\n".join(parts))


def get(arguments: argparse.Namespace) -> Outcome:
    """`qtt get RUN`: the status file, or its essence as a table."""
    folder = find_run(arguments.run, arguments.state_dir)
    status = read_status(folder)
    if arguments.output != "table":
        return Outcome(text=render_one(status, arguments.output))
    records = [{"name": name, "value": value} for name, value in _essence(folder, status)]
    return Outcome(text=render(records, "table", status_columns(), **_terminal()))


def watch(arguments: argparse.Namespace) -> Outcome:
    """`qtt watch RUN`: `get`, again and again until the run has ended."""
    folder = find_run(arguments.run, arguments.state_dir)
    previous: list[tuple[str, str]] = []
    while True:
        status = read_status(folder)
        essence = _essence(folder, status)
        if essence != previous:
            sys.stdout.write("  ".join(f"{name} {value}" for name, value in essence) + "\n")
            sys.stdout.flush()
            previous = essence
        if status.get("phase") in {"Completed", "Failed"} or _is_record(folder):
            return Outcome()
        time.sleep(max(0.1, arguments.interval))


# --- pieces ---------------------------------------------------------------------------------------


def _record(arguments: argparse.Namespace) -> RunRecord:
    folder = find_run(arguments.run, arguments.state_dir)
    return asyncio.run(read_record(folder, arguments.redis_url))


def _printed(
    rows: Sequence[Row], columns: Sequence[Column], arguments: argparse.Namespace, *, empty: str
) -> Outcome:
    records = [row.to_json() for row in rows]
    text = render(records, arguments.output, columns, empty=empty, **_terminal())
    return Outcome(text=text)


def _terminal() -> dict[str, Any]:
    """Width and colour of standard output, if it is a terminal."""
    if not sys.stdout.isatty():
        return {}
    return {"width": shutil.get_terminal_size().columns, "colour": True}


def _run_dir(folder: RunFolder) -> Path:
    """Where checkpoints and logs lie, known without the ledger."""
    facts = folder.read_facts()
    return Path(str(facts.get("root", folder.path))) / "runs" / str(folder.read_uid())


def _attempt_folders(run_dir: Path, config: str) -> list[Path]:
    """Folders of a configuration's attempts, oldest first.

    Raises: UnknownConfigurationError that lists the configurations with logs.
    """
    name = config.removeprefix("c")
    pattern = f"c{name}/attempts/*" if name.isdecimal() else f"attempts/{config}.a*"
    found = [path for path in run_dir.glob(pattern) if path.is_dir()]
    if not found:
        known = sorted((p.parent.name[1:] for p in run_dir.glob("c*/attempts")), key=int)
        there = f"logs of {', '.join(known)}" if known else "no logs yet"
        raise UnknownConfigurationError(f"no log of {config} in {run_dir}; it holds {there}")
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def _log_entry(path: Path, run_dir: Path) -> Mapping[str, Any]:
    """An attempt's log, its last MiB, and how it ended."""
    try:
        data = (path / "log.txt").read_bytes()[-LOG_TAIL_BYTES:]
    except OSError:
        data = b""
    try:
        result = json.loads((path / "result.json").read_text())
    except (OSError, ValueError):
        result = {}
    state = str(result.get("state", "no result"))
    if result.get("reason"):
        state = f"{state}: {result['reason']}"
    text = data.decode(errors="replace")
    return {"attempt": str(path.relative_to(run_dir)), "state": state, "log": text}


def _is_record(folder: RunFolder) -> bool:
    """Whether it was imported: nobody works on it, and its status stayed where it ran."""
    return bool(folder.read_facts().get("imported"))


def _essence(folder: RunFolder, status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a person asks first: where it stands, what it used, what is best."""
    consumed = status.get("consumed") or {}
    best = status.get("best") or {}
    told = [
        (str(condition["type"]), f"{condition['reason']} {condition.get('message', '')}".strip())
        for condition in status.get("conditions", ())
        if condition.get("status") == "True" and condition["type"] != "Accepted"
    ]
    lines = [
        ("run", folder.path.name),
        ("phase", str(status.get("phase", "imported" if _is_record(folder) else "not started"))),
        *told,
        ("steps", str(consumed.get("steps", 0))),
        ("device-seconds", str(consumed.get("gpuSeconds", 0))),
    ]
    if best:
        model = f"c{best['configID']} {best['model']} at epoch {best['fidelity']}"
        lines.append(("best", f"{best['score']}  {model}"))
    return lines

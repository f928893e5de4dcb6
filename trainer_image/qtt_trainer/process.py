"""One job from its document to its exit code: the contract of section 1 of 20-trainer.

The outermost layer of every command. It validates before anything heavy is imported, catches every
error once, and always leaves `attempts/<…>/result.json`, a log and a termination message.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtt_core.errors import Fault, SpecError
from qtt_core.jobs import JobDocument, parse_job
from qtt_core.results import EXIT_CODES, State, StepResult
from qtt_core.steps import METRICS
from qtt_trainer import layout, report, volume
from qtt_trainer.context import Context
from qtt_trainer.endings import EndedError, classify
from qtt_trainer.report import Header, Report

log = logging.getLogger(__name__)

COMMANDS = ("prepare", "step", "evaluate")
CHORES = ("garbage", "recovery", "weights")
"""Commands that leave neither log nor result on the volume: the message says everything."""
_RUN_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """As much of a job's document as is needed to answer it, even when the rest is wrong."""

    command: str
    header: Header
    folder: Path | None
    """Where log and result go; None when the document does not say."""
    fidelity_from: int = 0

    @property
    def log_path(self) -> Path | None:
        """The attempt's log."""
        return None if self.folder is None else self.folder / layout.LOG


def locate(command: str, raw: object) -> Attempt:
    """Read the attempt's address from a document that may be invalid; never raises."""
    fields: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    paths = fields.get("paths")
    root = paths.get("root") if isinstance(paths, Mapping) else None
    uid = fields.get("run_uid")
    config = fields.get("config")
    task = fields.get("task")
    metric = task.get("metric") if isinstance(task, Mapping) else None
    header = Header(
        run_uid=uid if isinstance(uid, str) else "",
        step=str(fields.get("step") or command)[:64],
        config_id=_integer(fields, "config_id", -1),
        config=dict(config) if isinstance(config, Mapping) and _is_json(config) else {},
        attempt=_integer(fields, "attempt", 0),
        nonce=str(fields.get("nonce") or "")[:64],
        metric=metric if isinstance(metric, str) and metric in METRICS else "top1",
    )
    folder = None
    usable = isinstance(root, str) and root and "\0" not in root
    named = isinstance(uid, str) and _RUN_UID.fullmatch(uid)
    lasting = command not in CHORES and (command != "step" or header.config_id >= 0)
    if usable and named and lasting:
        folder = layout.attempt_folder(
            layout.run_folder(str(root), str(uid)),
            command,
            config_id=header.config_id,
            fidelity_to=_integer(fields, "fidelity_to", 0),
            attempt=header.attempt,
        )
    return Attempt(
        command=command,
        header=header,
        folder=folder,
        fidelity_from=_integer(fields, "fidelity_from", 0),
    )


def _is_json(value: object) -> bool:
    """Whether a value can be written again: Python reads NaN and 1e999, JSON has neither."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _integer(fields: Mapping[str, Any], name: str, default: int) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def run_job(attempt: Attempt, raw: object, context: Context, deliver: Callable[[str], None]) -> int:
    """Run a job and leave its traces; returns the exit code.

    `raw`: the document, or the SpecError that came of reading it.
    `deliver` gets the termination message, after `result.json` was written.
    """

    def leave(state: State, reason: str) -> None:
        deliver(
            report.encode_message(_failure(attempt, EndedError(state, reason), context).message)
        )

    context.stop.on_leave = leave
    try:
        ended = _run(attempt.command, raw, context)
    except Exception as error:  # noqa: BLE001  # the one place that turns errors into exit codes
        context.stop.disarm()
        ended = _failed(attempt, error, context)
    _leave_result(attempt, ended)
    try:
        deliver(report.encode_message(ended.message))
    except OSError as error:
        log.error("termination message not written: %s", error)
    return ended.exit_code


def _run(command: str, raw: object, context: Context) -> Report:
    """Validate, then import and run the command: a bad job is answered before torch is loaded."""
    if isinstance(raw, SpecError):
        raise raw
    job = parse_job(raw, command=command)
    context.stop.limit(job.limits.wall_s, elapsed=context.age())
    if command == "step":
        return _step(job, context)
    if command == "prepare":
        context.stop.nothing_to_save = True
        from qtt_trainer import prepare

        return _from_message(job, prepare.run(job))
    if command in CHORES:
        context.stop.nothing_to_save = True
        from qtt_trainer import fetch, garbage, recovery

        chores = {"garbage": garbage.run, "recovery": recovery.run, "weights": fetch.run}
        return chores[command](job)
    if not job.task.split:
        raise SpecError([Fault("job.task.split", "", "name the split to score, such as test")])
    from qtt_trainer import evaluate

    return evaluate.run(job, context)


def _step(job: JobDocument, context: Context) -> Report:
    from qtt_core.space import check_values

    config = check_values(job.space_id, job.config)
    from qtt_trainer import step

    return step.run(job, config, context)


def _from_message(job: JobDocument, message: StepResult) -> Report:
    """A report of a command whose message says everything."""
    result = {"schema": report.SCHEMA, "run_uid": job.run_uid, **json.loads(message.encode())}
    return Report(message=message, result=result, exit_code=EXIT_CODES[message.state])


def _failed(attempt: Attempt, error: Exception, context: Context) -> Report:
    """The report of an error, and its line in the log; a traceback only for a bug of ours."""
    ended = classify(error)
    if ended.state is State.INTERNAL:
        log.error("internal error", exc_info=error)
    else:
        log.error("%s", ended)
    return _failure(attempt, ended, context)


def _failure(attempt: Attempt, ended: EndedError, context: Context) -> Report:
    facts = dict(ended.facts)
    # Whether a timed-out attempt got further decides if another one is worth while.
    facts["timing"] = {**facts.get("timing", {}), "progress": context.progress}
    result = report.step_result(
        attempt.header,
        state=ended.state,
        reason=ended.reason,
        curve=facts.pop("curve", ()),
        facts=facts,
    )
    # A failure tells no epochs: what it trained is not committed.
    message = report.step_message({**result, "curve": ()}, fidelity_from=attempt.fidelity_from)
    return Report(message=message, result=result, exit_code=ended.exit_code)


def _leave_result(attempt: Attempt, ended: Report) -> None:
    """Write the attempt's `result.json`; a full disk must not hide how the job ended."""
    if attempt.folder is None:
        return
    with contextlib.suppress(OSError):
        attempt.folder.mkdir(parents=True, exist_ok=True)
        written = {**ended.result, "exit_code": ended.exit_code, "ended_at": round(time.time(), 3)}
        volume.replace_json(attempt.folder / layout.RESULT, written, durable=True)

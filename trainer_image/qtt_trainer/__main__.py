"""`python -m qtt_trainer COMMAND`: signal handlers first, then the job, then everything else.

Heavy libraries are imported by the commands themselves, after their job was validated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qtt_core.errors import ABSENT, Fault, SpecError
from qtt_trainer.context import Context, process_birth
from qtt_trainer.stopping import Stop

JOB_VARIABLE = "QTT_STEP"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (20-trainer 5.4)."""
    stop = Stop()
    stop.install()
    options = _parser().parse_args(arguments)
    if options.command == "serve":
        from qtt_trainer.serve import serve

        return serve(die_with_parent=options.die_with_parent)
    if options.command == "weights" and options.hub:
        from qtt_trainer.fetch_command import fetch_hub

        stop.nothing_to_save = True
        return fetch_hub(options)
    return _one_job(options.command, options.job, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qtt_trainer",
        description="The trainer: runs one job and reports by files, message and exit code.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (
        ("prepare", "read a data set once: class map, fingerprint, metafeatures"),
        ("step", "train one configuration up to an epoch and commit the checkpoint"),
        ("evaluate", "score checkpoints on a split that the search never saw"),
        ("garbage", "delete the listed folders of a run"),
        ("recovery", "tell the results on a volume that the ledger has lost"),
        ("weights", "fetch a hub's pretrained weights into a folder: a job, or --hub and --to"),
    ):
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.add_argument(
            "--job",
            metavar="FILE",
            help=f"the job document as JSON; - is stdin; without it, ${JOB_VARIABLE}",
        )
        if name == "weights":
            _weights_options(command)
    meaning = "stay warm: one JSON job per stdin line, one forked process per job"
    serve = commands.add_parser("serve", help=meaning, description=meaning)
    serve.add_argument(
        "--die-with-parent", action="store_true", help="end when the starting process ends"
    )
    return parser


def _weights_options(parser: argparse.ArgumentParser) -> None:
    """What `qtt weights fetch` hands on."""
    parser.add_argument("--hub", metavar="HUB", help="timm24, tiny, or a file of model cards")
    parser.add_argument("--to", metavar="DIR", type=Path, help="folder to fill")
    parser.add_argument("--model", metavar="NAME", action="append", default=[], help="of the hub")
    parser.add_argument("--endpoint", metavar="URL", default="", help="in the public hub's place")
    parser.add_argument("--token-file", metavar="FILE", default="", help="holds an access token")
    parser.add_argument("--verify", action="store_true", help="digest what is there, too")


def _one_job(command: str, source: str | None, stop: Stop) -> int:
    from qtt_trainer.logs import teed_log
    from qtt_trainer.process import locate, run_job
    from qtt_trainer.report import message_path, write_message

    context = Context(stop=stop, born=process_birth())
    raw: object = {}
    fault: SpecError | None = None
    try:
        raw = read_job(source)
    except SpecError as error:
        fault = error
    attempt = locate(command, raw)
    path = message_path()
    with teed_log(attempt.log_path) as cap:
        context.housekeep = cap
        return run_job(attempt, fault or raw, context, lambda text: write_message(path, text))


def read_job(source: str | None) -> object:
    """The job document from a file, stdin (`-`) or the environment.

    Raises: SpecError naming the source when there is none or it is no JSON.
    """
    if source is None:
        text, name = os.environ.get(JOB_VARIABLE, ""), f"${JOB_VARIABLE}"
        if not text:
            raise SpecError([Fault("job", ABSENT, f"use --job FILE or set {name}")])
    elif source == "-":
        text, name = sys.stdin.read(), "stdin"
    else:
        name = source
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError([Fault("job", source, f"cannot be read ({error})")]) from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise SpecError([Fault("job", name, f"is not JSON ({error})")]) from error


if __name__ == "__main__":
    sys.exit(main())

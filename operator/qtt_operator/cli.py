"""The command line `qtt`: parses arguments, calls one verb, turns errors into exit codes.

Imports nothing heavy: `qtt --help` answers at once, a verb loads what it needs. A user's mistake
ends in one clear message; a traceback is shown only with `--debug` and otherwise kept in a file.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import qtt_core
from qtt_core.errors import QuickTuneError, SpecError
from qtt_operator.exits import BUG, COMPLETE, INTERRUPTED, MEANINGS, USAGE, exit_code

FORMATS = ("table", "json", "yaml", "csv")

EXAMPLES = """\
examples:
  qtt run examples/digits/tuningrun.yaml       tune here; again = go on
  qtt run birds.yaml --mount datasets=/data    say where a claim lies
  qtt run birds.yaml --devices cuda:0,cuda:1   two steps at a time
  qtt leaderboard birds                        checkpoints, best first
  qtt leaderboard birds --test ~/more-birds    scored on images never seen
  qtt statistics birds -o json | jq '.[].score'
                                               every configuration
  qtt logs birds 17                            what configuration 17 printed
  qtt weights fetch --hub timm24 --to DIR      for machines without a way out
  qtt data push ~/flowers datasets:flowers     onto a claim of a cluster
"""

Handler = Callable[[argparse.Namespace], "Outcome"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a verb hands back: text for standard output, and the exit code."""

    text: str = ""
    code: int = COMPLETE


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the epilog's lines and gives verbs and options one column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24)
        self._action_max_length = 15  # argparse forgets the indent of verbs when it measures


class _Parser(argparse.ArgumentParser):
    """argparse, but a usage error exits 64 like every other user's mistake."""

    def error(self, message: str) -> NoReturn:
        """Print usage and the mistake, exit 64."""
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (see `exits`)."""
    arguments = build_parser().parse_args(argv)
    _configure_logging(arguments.verbose)
    try:
        outcome = _handler(arguments.handler)(arguments)
        sys.stdout.write(outcome.text)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # head has closed the pipe
        return COMPLETE
    except Exception as error:  # noqa: BLE001  # the outermost place: message and exit code
        return _report(error, debug=arguments.debug)
    return outcome.code


def _handler(path: str) -> Handler:
    module, _, name = path.partition(":")
    handler: Handler = getattr(importlib.import_module(module), name)
    return handler


def _report(error: Exception, *, debug: bool) -> int:
    """Say what went wrong, once; returns the exit code."""
    code = exit_code(error)
    if debug:
        traceback.print_exception(error)
    elif code == BUG and not isinstance(error, QuickTuneError):
        kept = _keep_traceback(error)
        print(f"qtt: bug: {type(error).__name__}: {error} (traceback: {kept})", file=sys.stderr)
    elif isinstance(error, SpecError) and len(error.faults) > 1:
        print(f"qtt: {len(error.faults)} faults", file=sys.stderr)
        print("\n".join(f"  {fault}" for fault in error.faults), file=sys.stderr)
    else:
        print(f"qtt: {error}", file=sys.stderr)
    return code


def _keep_traceback(error: Exception) -> Path | str:
    """A file with the traceback: what happened once in hours cannot be asked for again."""
    try:
        handle, name = tempfile.mkstemp(prefix="qtt-traceback-", suffix=".txt")
        with os.fdopen(handle, "w") as file:
            traceback.print_exception(error, file=file)
    except OSError as failure:
        return f"not kept, {failure}; run with --debug"
    return Path(name)


def _configure_logging(verbose: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


# --- arguments ------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Every verb with its options."""
    parser = _Parser(
        prog="qtt",
        description="Quick-Tune: choose a pretrained model and its finetuning, one short step\n"
        "at a time, by predicted improvement per predicted cost.",
        epilog=f"{EXAMPLES}\nexit codes:\n{_exit_table()}\n\n`qtt VERB --help` explains a verb.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"qtt {qtt_core.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    _add_run(verbs)
    _add_lint(verbs)
    _add_readers(verbs)
    _add_ledger(verbs)
    _add_metatrain(verbs)
    _add_weights(verbs)
    _add_data(verbs)
    _add_controller(verbs)
    return parser


Verbs = argparse._SubParsersAction  # argparse has no public name for it


def _exit_table() -> str:
    return "\n".join(f"  {code:>2}  {meaning}" for code, meaning in MEANINGS.items())


def _verb(verbs: Verbs[_Parser], name: str, handler: str, text: str) -> argparse.ArgumentParser:
    """A verb with the options that all of them take."""
    parser = verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=_Help,
    )
    parser.set_defaults(handler=handler)
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more; -vv: all")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _format_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", dest="output", choices=FORMATS, default="table", help="how to print (default: table)"
    )


def _state_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir", type=Path, default=Path(".quicktune"), metavar="DIR",
        help="where runs keep their state (default: ./.quicktune)",
    )  # fmt: skip


def _mount_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mount", action="append", default=[], metavar="CLAIM=PATH",
        help="where a claim lies (default: the folder CLAIM beside the manifest); repeatable",
    )  # fmt: skip


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="name of a run, or the path of its folder")
    _state_option(parser)
    parser.add_argument("--redis-url", metavar="URL", help="the Redis that the run was given")


def _add_run(verbs: Verbs[_Parser]) -> None:
    parser = _verb(verbs, "run", "qtt_operator.verbs:run", "tune on this machine, or go on tuning")
    parser.epilog = (
        "Ctrl-C lets running steps end and stops; a second one stops at once. The same\n"
        "command resumes: nothing is trained, told or charged twice. A changed manifest\n"
        "is refused where the change would make a different run; a raised budget goes on."
    )
    parser.add_argument("manifest", type=Path, metavar="FILE", help="a TuningRun manifest (YAML)")
    _mount_option(parser)
    parser.add_argument(
        "--devices", metavar="LIST",
        help="cuda:0,cuda:1 or cpu:2; sets parallelism (default: CUDA devices, else CPU slots,"
        " as many as spec.parallelism)",
    )  # fmt: skip
    _state_option(parser)
    parser.add_argument(
        "--priors", type=Path, metavar="DIR",
        help="folder of own priors that spec.search.portfolio may name (default: STATE_DIR/priors)",
    )  # fmt: skip
    parser.add_argument(
        "--trainer", type=shlex.split, default=(), metavar="COMMAND",
        help="how a trainer of your own is started (spec.trainer.custom): COMMAND step, … prepare",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start over; the old state is kept")
    parser.add_argument("--redis-url", metavar="URL", help="use this Redis, not an embedded one")
    parser.add_argument("--plain", action="store_true", help="log lines, no live table")
    parser.add_argument("--no-test", action="store_true", help="do not score the test split at end")
    _format_option(parser)


def _add_lint(verbs: Verbs[_Parser]) -> None:
    parser = _verb(
        verbs, "lint", "qtt_operator.verbs:lint", "check a manifest: every fault at once"
    )
    parser.add_argument("manifest", type=Path, metavar="FILE", help="a TuningRun manifest (YAML)")
    _mount_option(parser)
    parser.add_argument(
        "--priors", type=Path, metavar="DIR",
        help="folder of own priors; a prior that is neither shipped nor there is then a fault"
        " (default: .quicktune/priors, and advice: a cluster's claim may hold it)",
    )  # fmt: skip
    _format_option(parser)


def _add_readers(verbs: Verbs[_Parser]) -> None:
    parser = _verb(
        verbs, "leaderboard", "qtt_operator.verbs:leaderboard", "kept checkpoints, best first"
    )
    _run_argument(parser)
    parser.add_argument("--top", type=_positive, default=10, metavar="N", help="rows (default: 10)")
    parser.add_argument(
        "--test", type=Path, metavar="DIR",
        help="score them on the images in DIR, one folder per class; neither search nor ledger"
        " sees it",
    )  # fmt: skip
    parser.add_argument("--devices", metavar="DEVICE", help="device for --test, such as cuda:0")
    _format_option(parser)

    parser = _verb(
        verbs, "statistics", "qtt_operator.verbs:statistics", "every configuration tried"
    )
    _run_argument(parser)
    _format_option(parser)

    parser = _verb(
        verbs, "logs", "qtt_operator.verbs:logs", "what a configuration's trainer printed"
    )
    _run_argument(parser)
    parser.add_argument(
        "config", metavar="CONFIG", help="configuration, such as 17 or c17; or `prepare`"
    )
    parser.add_argument("--last", action="store_true", help="the newest attempt only")
    _format_option(parser)

    parser = _verb(verbs, "get", "qtt_operator.verbs:get", "status of a run")
    _run_argument(parser)
    _format_option(parser)

    parser = _verb(verbs, "watch", "qtt_operator.verbs:watch", "status of a run, until it ends")
    _run_argument(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds")


def _add_ledger(verbs: Verbs[_Parser]) -> None:
    ledger = verbs.add_parser(
        "ledger", help="a run's whole ledger as a file, and back", formatter_class=_Help,
        description="A run's whole ledger as JSON lines, and back.",
    )  # fmt: skip
    actions = ledger.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    export = _verb(
        actions, "export", "qtt_operator.ledger_verb:export_verb", "write a run's ledger to a file"
    )
    export.epilog = (
        "With --redis-url RUN may be any run of that Redis, one of a cluster, too:\n"
        "its name, NAMESPACE/NAME or its uid."
    )
    _run_argument(export)
    export.add_argument("file", metavar="FILE", help="where to; - for standard output")
    parser = _verb(
        actions, "import", "qtt_operator.ledger_verb:import_verb", "put an exported ledger back"
    )
    parser.epilog = (
        "All of it or nothing, and never over anything else: a run that is there and\n"
        "differs is left alone. It is a record, to read and to learn from; `qtt run` does\n"
        "not go on with it, for its checkpoints are elsewhere."
    )
    parser.add_argument("file", metavar="FILE", help="of `qtt ledger export`; - for standard input")
    parser.add_argument("--name", metavar="NAME", help="what to call it here (default: as it was)")
    _state_option(parser)
    parser.add_argument(
        "--redis-url", metavar="URL", help="import into this Redis, not into the state folder"
    )


def _add_metatrain(verbs: Verbs[_Parser]) -> None:
    parser = _verb(
        verbs, "metatrain", "qtt_operator.metatrain_verb:metatrain_verb",
        "learn a prior from runs that have ended",
    )  # fmt: skip
    parser.epilog = (
        "SOURCE is a run, a file of `qtt ledger export` or a folder of them; or one table\n"
        "(CSV, Parquet; docs/optimizer.md); or one folder: of MetaDataset.save, or as the\n"
        "Quick-Tune paper and its tool publish their meta-data. At least two data sets, one\n"
        "search space. `spec.search.portfolio: NAME` then uses it."
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="what to learn from")
    parser.add_argument("--name", required=True, metavar="NAME", help="what manifests call it")
    _state_option(parser)
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="folder to fill (default: STATE_DIR/priors/NAME)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--replace", action="store_true", help="replace a prior of that name")
    parser.add_argument("--redis-url", metavar="URL", help="the Redis that the runs were given")


def _add_weights(verbs: Verbs[_Parser]) -> None:
    parser = _verb(
        verbs, "weights", "qtt_operator.weights_verb:fetch", "fetch a hub's pretrained weights"
    )
    parser.epilog = (
        "The folder is what `spec.weights.claimName` means: mount it with --mount here, or copy\n"
        "it onto a claim. What is there is not fetched again, what broke off goes on; its\n"
        "weights.json holds digests and licences."
    )
    parser.add_argument("action", choices=("fetch",), help="what to do")
    parser.add_argument(
        "--hub", required=True, metavar="HUB", help="timm24, or a file of model cards"
    )
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to fill")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument(
        "--endpoint", metavar="URL",
        help="a mirror or file server in the public hub's place (default: $HF_ENDPOINT)",
    )  # fmt: skip
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds an access token")
    parser.add_argument("--verify", action="store_true", help="digest what is there, too")
    _format_option(parser)


def _add_data(verbs: Verbs[_Parser]) -> None:
    parser = _verb(
        verbs, "data", "qtt_operator.push:push_verb", "copy a local folder onto a cluster's claim"
    )
    parser.epilog = (
        "A short-lived pod mounts the claim. Every file is compared by its digest; the folder\n"
        "appears under its name when all are there. The same command goes on after a break\n"
        "and sends nothing twice."
    )
    parser.add_argument("action", choices=("push",), help="what to do")
    parser.add_argument("folder", type=Path, metavar="DIR", help="its contents are copied")
    parser.add_argument("target", metavar="CLAIM[:path]", help="where to, path: a folder to make")
    parser.add_argument("-n", "--namespace", metavar="NAME", help="default: the context's")
    parser.add_argument("--context", metavar="NAME", help="of your kubeconfig")
    parser.add_argument("--replace", action="store_true", help="replace what has the same name")
    parser.add_argument(
        "--image", default="docker.io/library/busybox:1.37", metavar="IMAGE",
        help="of the pod: any with sh, tar, find and sha256sum (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--wait", type=float, default=300.0, metavar="S",
        help="seconds until the pod must run (default: 300)",
    )  # fmt: skip
    _format_option(parser)


def _add_controller(verbs: Verbs[_Parser]) -> None:
    parser = _verb(
        verbs, "controller", "qtt_operator.controller:controller_verb", "the operator on a cluster"
    )
    parser.add_argument(
        "--settings", type=Path, metavar="FILE",
        help="the install's settings (YAML); the Redis address may come as $QTT_REDIS_URL",
    )  # fmt: skip


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return value

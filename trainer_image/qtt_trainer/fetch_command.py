"""`python -m qtt_trainer weights --hub H --to DIR`: `fetch` for a person, not for a Job.

Says on stderr what it does and on stdout, as one line of JSON, what became of each model;
`qtt weights fetch` makes a table of that.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from qtt_core.errors import ABSENT, Fault, SpecError
from qtt_core.hub import HUBS, Hub, load_hub, read_hub, select
from qtt_trainer.endings import EndedError, classify
from qtt_trainer.fetch import Conclusion, Source, conclude, fetch


def fetch_hub(options: argparse.Namespace) -> int:
    """Returns the exit code of 20-trainer 5.4: 0, 64 for what no repetition helps, 75."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    models: list[dict[str, Any]] = []
    try:
        if options.to is None:
            raise SpecError([Fault("--to", ABSENT, "name the folder to fill")])
        hub = find_hub(options.hub)
        cards = select(hub, models=options.model).cards
        source = Source(endpoint=options.endpoint, token_file=options.token_file)
        outcomes = fetch(cards, options.to, source, verify=options.verify)
        models = [outcome.to_json() for outcome in outcomes]
        ended = conclude(outcomes)
    except (EndedError, SpecError, OSError) as error:
        end = classify(error)
        ended = Conclusion(state=end.state, reason=end.reason, exit_code=end.exit_code)
    facts = {"state": ended.state.value, "reason": ended.reason, "models": models}
    print(json.dumps(facts), flush=True)  # noqa: T201  # the command's answer
    return ended.exit_code


def find_hub(name: str) -> Hub:
    """A shipped hub by name, else a file of cards. Raises: SpecError."""
    if name in HUBS:
        return load_hub(name)
    path = Path(name)
    try:
        return read_hub(path.stem, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        remedy = f"use {', '.join(HUBS)} or a readable file of model cards ({error})"
        raise SpecError([Fault("--hub", name, remedy)]) from error

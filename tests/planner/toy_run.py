"""`qtt run` with the toy trainer, as a process of its own that tests can kill.

python toy_run.py MANIFEST STATE_DIR [REDIS_URL]
"""

import argparse
import asyncio
import sys
from pathlib import Path

from qtt_operator import run_verb
from qtt_operator.exits import exit_code
from qtt_operator.local_setup import LocalOptions

TOY = (sys.executable, str(Path(__file__).with_name("toy_trainer.py")))


def main():
    manifest, state_dir, *rest = sys.argv[1:]
    run_verb.LocalOptions = lambda **options: LocalOptions(**options, serve=TOY)
    arguments = argparse.Namespace(
        manifest=Path(manifest), state_dir=Path(state_dir), mount=[], devices=None, output="table",
        fresh="--fresh" in rest, plain=True, no_test=False,
        priors=next((Path(word[9:]) for word in rest if word.startswith("--priors=")), None),
        trainer=(),
        redis_url=next((word for word in rest if "://" in word), None),
    )  # fmt: skip
    try:
        outcome = asyncio.run(run_verb.run_verb(arguments))
    except Exception as error:  # noqa: BLE001
        sys.stderr.write(f"qtt: {type(error).__name__}: {error}\n")
        sys.exit(exit_code(error))
    sys.stdout.write(outcome.text)
    sys.exit(outcome.code)


main()

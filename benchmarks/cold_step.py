"""A cold `step` process, start to first batch, against what no process can avoid.

    python benchmarks/cold_step.py --repeat 7

The baseline is a process that imports torch and timm, builds the same model and loads the same
weights. The step does that too, and besides validates its job, checks the data set, places the
strategy and builds the loaders. Both are timed from the start of the process, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import DIGITS, OUT, PREPARE, must_succeed, watch

from qtt_core.hub import ModelCard, load_hub
from qtt_core.jobs import JobDocument, Paths, Task
from qtt_core.space import build_space

BOUND = 1.3
FOLDER = OUT / "cold_step"

BASELINE = """
import os, time
import timm, torch
from safetensors.torch import load_file
model = timm.create_model(os.environ["ARCH"], num_classes=10)
fits = {name: value.shape for name, value in model.state_dict().items()}
file = load_file(os.environ["WEIGHTS"])
weights = {name: value for name, value in file.items() if fits.get(name) == value.shape}
model.load_state_dict(weights, strict=False)                     # all but the head
assert len(weights) >= len(fits) - 2
print(time.monotonic() - float(os.environ["BEGUN"]))
"""


def weights_of(card: ModelCard) -> Path:
    """The package file of a card of the tiny hub."""
    import qtt_trainer

    return Path(qtt_trainer.__file__).parent / "weights" / card.weights.removeprefix("package:")


def bare(card: ModelCard) -> float:
    """Seconds from the start of a process to a loaded model."""
    facts = {"ARCH": card.tag, "WEIGHTS": str(weights_of(card)), "BEGUN": str(time.monotonic())}
    command = [sys.executable, "-W", "ignore", "-c", BASELINE]
    ended = subprocess.run(command, env={**os.environ, **facts}, check=True, capture_output=True)
    return float(ended.stdout)


def trainer(command: str, job: JobDocument) -> None:
    """Run one command of the trainer to its end."""
    path = FOLDER / f"{command}.json"
    path.write_text(json.dumps(job.to_json()))
    words = [sys.executable, "-m", "qtt_trainer", command, "--job", str(path)]
    must_succeed(watch(words), f"qtt_trainer {command}")


def cold(job: JobDocument) -> float:
    """Seconds from the start of a step's process to its first batch, as its result tells."""
    trainer("step", job)
    result = FOLDER / "runs" / job.run_uid / f"c{job.config_id}" / "f1" / "result.json"
    timing: dict[str, Any] = json.loads(result.read_text())["timing"]
    return float(timing["startup"])


def main() -> int:
    """Print both medians and their ratio; 1 past the bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    repeat = parser.parse_args().repeat
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    must_succeed(watch([sys.executable, str(PREPARE)]), "examples/digits/prepare.py")
    hub = load_hub("tiny")
    space = build_space("native", hub, max_fidelity=8, overrides={"amp": "false"})
    config = space.default()
    card = hub.card(str(config["model"]))
    base = JobDocument(
        run_uid="cold",
        attempt=0,
        nonce="cold",
        task=Task(data=str(DIGITS)),
        paths=Paths(root=str(FOLDER)),
        cards=tuple(one.to_json() for one in hub.cards),
    )
    trainer("prepare", base)
    step = replace(
        base,
        cards=(),
        config=config,
        card=card.to_json(),
        space_id=space.space_id,
        space_sha=space.sha,
        fidelity_to=1,
        max_fidelity=8,
        device="cpu",
    )
    floor, ours = [], []
    for turn in range(repeat + 1):
        floor.append(bare(card))
        ours.append(cold(replace(step, config_id=turn, step=f"c{turn}-f1")))
    least, most = statistics.median(floor[1:]), statistics.median(ours[1:])  # the first warms files
    kept = most <= BOUND * least
    print(f"start to loaded model, bare: {least:.2f} s; start to first batch, step: {most:.2f} s")
    print(f"ratio {most / least:.2f} ≤ {BOUND} {'kept' if kept else 'MISSED'} ({repeat} of each)")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

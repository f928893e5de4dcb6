"""Learning curves of our own trainer on made-up pictures, or on the demo's digits.

    nice -n 10 python benchmarks/tiny_curves.py            # what the prior `tiny` learns from
    python benchmarks/tiny_curves.py --digits 160          # the table of benchmarks/tiny_prior.py
    python benchmarks/tiny_curves.py --digits 160 --images 250   # of fewer images, in less time

Trains random configurations of the demo's space with the trainer's own commands, in one process on
one thread. A data set (`pictures`) becomes one shard in benchmarks/curves: gzip'd JSON lines, a
header and one record a run. A run that ended is kept in benchmarks/out until its shard is whole,
and a second call goes on where the first was stopped. Seconds are CPU-seconds of this process, so
that a busy machine does not look like a slow configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import json
import logging
import math
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from measure import DIGITS, MANIFEST, OUT, PREPARE, ROOT, must_succeed, watch
from pictures import PictureSet, picture_set, write_pictures

from qtt_core.hub import Hub, load_hub
from qtt_core.jobs import Flags, JobDocument, Limits, Paths, Task
from qtt_core.space import SearchSpace, build_space
from qtt_core.steps import Config
from qtt_trainer import layout
from qtt_trainer.context import Context
from qtt_trainer.process import locate, run_job
from qtt_trainer.stopping import Stop
from qtt_trainer.versions import installed_versions

SHARDS = ROOT / "benchmarks" / "curves"
WORK = OUT / "tiny_curves"
EPOCHS = 6
"""Of a full training on made-up pictures."""

ENDS = ("ok", "diverged", "oom")
"""Of a run that says something about its configuration."""

Record = dict[str, Any]


def demo_space(max_fidelity: int | None = None) -> tuple[SearchSpace, Hub]:
    """The space and hub of examples/digits, with that or another number of epochs."""
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]
    search, hub = spec["search"], load_hub(spec["search"]["hub"])
    space = build_space(
        search["space"], hub, max_fidelity=max_fidelity or spec["fidelity"]["max"],
        overrides=search["overrides"],
    )  # fmt: skip
    return space, hub


# --- one run -------------------------------------------------------------------------------------


def run_command(
    command: str, job: JobDocument, folder: Path, ended: list[float] | None = None
) -> Record:
    """The result of a trainer command, run here. `ended` gets the CPU clock after each epoch."""

    def progress(facts: Mapping[str, Any]) -> None:
        if ended is not None and "seconds" in facts:  # told at the end of an epoch only
            ended.append(time.process_time())

    raw = job.to_json()
    attempt = locate(command, raw)
    context = Context(stop=Stop(), born=time.monotonic(), channel=progress)
    told: list[str] = []
    with (folder / "log").open("a") as log, contextlib.redirect_stdout(log):
        run_job(attempt, raw, context, told.append)
    if command == "prepare":
        return json.loads(told[-1])
    assert attempt.folder is not None, "a step always has one"
    return json.loads((attempt.folder / layout.RESULT).read_text())


def train(job: JobDocument, folder: Path) -> Record:
    """One configuration from its first epoch to its last: scores, CPU-seconds, how it ended."""
    ended: list[float] = []
    result = run_command("step", job, folder, ended)
    if result["state"] not in ENDS:
        sys.exit(f"the trainer failed: {result['state']}, {result['reason']}; {dict(job.config)}")
    run = layout.run_folder(job.paths.root, job.run_uid)
    shutil.rmtree(layout.config_folder(run, job.config_id).path)
    later = np.diff(ended)  # the first epoch holds the start as well
    pace = float(np.median(later)) if len(later) else None
    seconds = [] if pace is None else [pace, *later.tolist()]
    return {
        "config": dict(job.config),
        "state": result["state"],
        "scores": [round(row["top1"], 5) for row in result.get("curve", ())],
        "seconds": [round(value, 4) for value in seconds],
    }


def job_of(data: Path, root: Path, space: SearchSpace, hub: Hub, seed: int) -> JobDocument:
    """What all runs on a data set share."""
    return JobDocument(
        run_uid="curves", attempt=0, nonce="0", task=Task(data=str(data)),
        paths=Paths(root=str(root)), limits=Limits(threads=1), flags=Flags(offline=True),
        space_id=space.space_id, space_sha=space.sha, max_fidelity=space.max_fidelity,
        fidelity_to=space.max_fidelity, seed=seed, device="cpu",
        cards=tuple(card.to_json() for card in hub.cards),
    )  # fmt: skip


# --- one data set ----------------------------------------------------------------------------


def draw(space: SearchSpace, count: int, seed: int, *, keen: bool) -> list[Config]:
    """The default, then random ones. `keen`: of two, the one with the higher learning rate.

    A low one ends at chance after the few updates that small data sets allow: of 30 runs a uniform
    draw lets a dozen learn anything.
    """
    pairs = [space.sample(2, np.random.default_rng([seed, 3, i])) for i in range(1, count)]
    chosen = [max(pair, key=lambda c: float(c["lr"] or 0)) if keen else pair[0] for pair in pairs]
    return [space.default(), *chosen]


def whole_lines(part: Path) -> list[str]:
    """The lines of a part; one that was being written when all ended is cut off."""
    text = part.read_text() if part.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        part.write_text(whole)
    return whole.splitlines()


def train_all(
    data: Path, part: Path, space: SearchSpace, hub: Hub, *, configs: int, seed: int, keen: bool
) -> None:
    """Append what is missing to a part: the header first, then one line a run."""
    drawn = draw(space, configs, seed, keen=keen)
    have = whole_lines(part)
    with tempfile.TemporaryDirectory() as name, part.open("a") as out:
        folder = Path(name)
        shared = job_of(data, folder, space, hub, seed)
        prepared = run_command("prepare", shared, folder)["prepared"]
        shared = dataclasses.replace(
            shared, cards=(), task=Task(data=str(data), fingerprint=prepared["fingerprint"])
        )
        if not have:
            header = {"metafeatures": prepared["metafeatures"], "versions": installed_versions()}
            out.write(json.dumps(header) + "\n")
        for i in range(max(0, len(have) - 1), configs):
            card = hub.card(str(drawn[i]["model"])).to_json()
            job = dataclasses.replace(shared, config_id=i, config=drawn[i], card=card)
            out.write(json.dumps(train(job, folder)) + "\n")
            out.flush()


def make_shard(what: PictureSet, configs: int) -> Path:
    """Draw, train, compress; nothing if the shard is there."""
    shard = SHARDS / f"{what.name}.jsonl.gz"
    if shard.exists():
        return shard
    space, hub = demo_space(EPOCHS)
    part = WORK / f"{what.name}.jsonl"
    with tempfile.TemporaryDirectory() as name:
        write_pictures(what, Path(name))
        train_all(Path(name), part, space, hub, configs=configs, seed=what.number, keen=True)
    lines = part.read_text().splitlines()
    header = {"pictures": dataclasses.asdict(what), **json.loads(lines[0])}
    text = "\n".join([json.dumps(header), *lines[1:]]) + "\n"
    draft = shard.with_suffix(".part")
    draft.write_bytes(gzip.compress(text.encode(), mtime=0))
    draft.rename(shard)
    return shard


def read_shard(path: Path) -> tuple[Record, list[Record]]:
    """Header and records of a shard, or of a part."""
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    header, *records = (json.loads(line) for line in text.splitlines())
    return header, records


def digits_part(images: int) -> Path:
    """Where the table of the digits grows; 0 images: all."""
    return WORK / f"digits-{images or 'all'}.jsonl"


def make_digits(configs: int, images: int) -> None:
    """The table on the first so many training images of the demo, and 60 % as many to validate."""
    must_succeed(watch([sys.executable, str(PREPARE)]), "examples/digits/prepare.py")
    space, hub = demo_space()
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        for split, count in (("train", images), ("val", images * 3 // 5)):
            for label in sorted((DIGITS / split).iterdir()):
                few = sorted(label.iterdir())[: math.ceil(count / 10) if images else None]
                (data / split / label.name).mkdir(parents=True)
                for picture in few:
                    shutil.copy(picture, data / split / label.name)
        part = digits_part(images)
        train_all(data, part, space, hub, configs=configs, seed=10_000, keen=False)


def main() -> None:
    """Make what is missing, one data set after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sets", type=int, default=20, metavar="N", help="data sets 0 … N-1")
    parser.add_argument("--configs", type=int, default=30, metavar="N", help="of each")
    parser.add_argument(
        "--digits", type=int, default=0, metavar="N", help="runs on the digits, no others"
    )
    parser.add_argument("--images", type=int, default=0, metavar="N", help="of the digits (all)")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.INFO)
    for folder in (SHARDS, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    if asked.digits:
        make_digits(asked.digits, asked.images)
        return
    for number in range(asked.sets):
        began = time.process_time()
        shard = make_shard(picture_set(number), asked.configs)
        print(f"{shard.name}: {time.process_time() - began:.0f} CPU-seconds", flush=True)


if __name__ == "__main__":
    main()

"""The trainer against what it stands beside: timm's own loop, its own epochs, a process per step.

    python examples/digits/prepare.py
    python benchmarks/trainer_speed.py [--model mini_resnet] [--epochs 6] [--repeat 5]

1. Images per second of a step against a loop of timm's parts (its loader, transforms, optimizer and
   scheduler) on the same model, images, batch, augmentation and threads, epoch by epoch in turns.
2. What an epoch costs beyond its training and evaluation: one job of many epochs less one of one.
3. A step of 500 small images in a warm `serve` against a new process, from order to answer.

Exits 1 past a bound. Writes below benchmarks/out only.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from measure import DIGITS, OUT
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from qtt_core.hub import ModelCard, load_hub
from qtt_core.jobs import JobDocument, Limits, Paths, Task
from qtt_core.results import StepResult
from qtt_trainer import prepare
from qtt_trainer.context import Context
from qtt_trainer.model import NORMALISATIONS
from qtt_trainer.process import locate, run_job
from qtt_trainer.stopping import Stop

FOLDER = OUT / "trainer_speed"
LOOP_BOUND, EPOCH_BOUND, SERVE_BOUND = 0.95, 0.050, 5.0
SETTINGS = {
    "opt": "adamw", "lr": 1e-3, "weight_decay": 0.01, "sched": "cosine", "batch_size": 32,
    "data_augmentation": "none",
}  # fmt: skip


def few_images(count: int) -> Path:
    """Digits with `count` training images and a tenth of it to validate on."""
    target = FOLDER / f"digits-{count}"
    for split, wanted in (("train", count), ("val", count // 10)):
        for label in range(10):
            folder = target / split / str(label)
            folder.mkdir(parents=True)
            for path in sorted((DIGITS / split / str(label)).iterdir())[: wanted // 10]:
                shutil.copy(path, folder)
    return target


def document(data: Path, card: ModelCard, *, config_id: int, horizon: int) -> JobDocument:
    """A step's job up to its epochs."""
    return JobDocument(
        run_uid=data.name, attempt=0, nonce="n", task=Task(data=str(data)),
        paths=Paths(root=str(FOLDER)), limits=Limits(threads=1), config_id=config_id,
        config={"model": card.name, **SETTINGS}, space_id="native", card=card.to_json(),
        max_fidelity=horizon, device="cpu", seed=0,
    )  # fmt: skip


def step(job: JobDocument) -> tuple[float, dict[str, Any]]:
    """(wall seconds, committed result) of a step in this process."""
    raw = job.to_json()
    told: list[str] = []
    mark = time.perf_counter()
    context = Context(stop=Stop(), born=time.monotonic())
    with redirect_stdout(io.StringIO()):  # its progress lines
        code = run_job(locate("step", raw), raw, context, told.append)
    wall = time.perf_counter() - mark
    if code:
        sys.exit(f"step ended with {code}: {told[-1]}")
    folder = FOLDER / "runs" / job.run_uid / f"c{job.config_id}" / f"f{job.fidelity_to}"
    return wall, json.loads((folder / "result.json").read_text())


def timms_epochs(data: Path, card: ModelCard) -> Iterator[float]:
    """Images per second of each epoch, trained by timm's own parts."""
    mean, std = NORMALISATIONS[card.normalisation]
    side = card.input_size
    dataset = create_dataset("", root=str(data / "train"))
    loader = create_loader(
        dataset, input_size=(3, side, side), batch_size=SETTINGS["batch_size"], is_training=True,
        use_prefetcher=False, num_workers=0, persistent_workers=False, mean=mean, std=std,
        interpolation=card.interpolation, color_jitter=0.4,
    )  # fmt: skip
    model = timm.create_model(card.tag, num_classes=10).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.01)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=50, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    criterion = torch.nn.CrossEntropyLoss()
    update = 0
    while True:
        seen, mark = 0, time.perf_counter()
        for images, labels in loader:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update += 1
            scheduler.step_update(update)
            seen += len(labels)
        yield seen / (time.perf_counter() - mark)


def loops(data: Path, card: ModelCard, epochs: int) -> bool:
    theirs, ours = timms_epochs(data, card), []
    base = document(data, card, config_id=1, horizon=epochs)
    baseline = []
    for epoch in range(1, epochs + 1):
        baseline.append(next(theirs))
        job = replace(base, fidelity_from=epoch - 1, fidelity_to=epoch, step=f"c1-f{epoch}")
        ours.append(float(step(job)[1]["images_per_second"]))
    ratio = statistics.median(ours[1:]) / statistics.median(baseline[1:])
    return verdict("images/s, trainer / timm's loop", ratio, LOOP_BOUND, ratio >= LOOP_BOUND)


def epochs_beyond(data: Path, card: ModelCard, epochs: int, repeat: int) -> bool:
    extra = []
    for turn in range(repeat):
        base = document(data, card, config_id=100 + turn, horizon=epochs)
        one, _ = step(replace(base, fidelity_to=1, step="f1"))
        base = replace(base, config_id=200 + turn)
        many, result = step(replace(base, fidelity_to=epochs, step=f"f{epochs}"))
        work = [row["train_seconds"] + row["eval_seconds"] for row in result["curve"]]
        extra.append((many - one - sum(work[1:])) / (epochs - 1))
    cost = statistics.median(extra)
    return verdict("seconds an epoch beyond its work", cost, EPOCH_BOUND, cost <= EPOCH_BOUND)


@contextmanager
def warm() -> Iterator[Callable[[JobDocument], float]]:
    """A running `serve`; give it a job, get the seconds until its answer."""
    command = [sys.executable, "-m", "qtt_trainer", "serve", "--die-with-parent"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    orders, events = process.stdin, process.stdout

    def until(name: str) -> dict[str, Any]:
        while (event := json.loads(events.readline()))["event"] != name:
            pass
        return event

    def run(job: JobDocument) -> float:
        mark = time.perf_counter()
        orders.write(json.dumps({"id": 1, "command": "step", "job": job.to_json()}) + "\n")
        orders.flush()
        ended = until("ended")
        if ended["exit"]:
            sys.exit(f"serve: {ended['message']}")
        return time.perf_counter() - mark

    until("ready")
    try:
        yield run
    finally:
        orders.close()
        process.wait(timeout=60)


def cold(job: JobDocument) -> float:
    """Seconds of a process of its own."""
    path = FOLDER / "job.json"
    path.write_text(json.dumps(job.to_json()))
    mark = time.perf_counter()
    command = [sys.executable, "-m", "qtt_trainer", "step", "--job", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - mark


def served(card: ModelCard, repeat: int) -> bool:
    data = few_images(500)
    prepared(data)
    base = replace(document(data, card, config_id=0, horizon=1), fidelity_to=1, step="f1")
    quick, slow = [], []
    with warm() as run:
        for turn in range(repeat + 1):  # the first of each warms the files
            quick.append(run(replace(base, config_id=300 + turn)))
            slow.append(cold(replace(base, config_id=400 + turn)))
    ratio = statistics.median(slow[1:]) / statistics.median(quick[1:])
    return verdict("step of 500 images, process / serve", ratio, SERVE_BOUND, ratio >= SERVE_BOUND)


def prepared(data: Path) -> StepResult:
    """The data set's manifest, which every step wants."""
    job = JobDocument(
        run_uid=data.name, attempt=0, nonce="n", task=Task(data=str(data)),
        paths=Paths(root=str(FOLDER)),
    )  # fmt: skip
    return prepare.run(job)


def verdict(what: str, value: float, bound: float, kept: bool) -> bool:
    print(f"{what}: {value:.3f} (bound {bound}) {'kept' if kept else 'MISSED'}", flush=True)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="mini_resnet", help="of the hub tiny (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    if not DIGITS.is_dir():
        sys.exit(f"{DIGITS} is not there; run examples/digits/prepare.py first")
    card = load_hub("tiny").card(arguments.model)
    prepared(DIGITS)
    kept = [
        loops(DIGITS, card, max(2, arguments.epochs)),
        epochs_beyond(DIGITS, card, max(2, arguments.epochs), arguments.repeat),
        served(card, arguments.repeat),
    ]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())

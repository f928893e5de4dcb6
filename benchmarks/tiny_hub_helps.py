"""Do the shipped weights of the `tiny` hub help? Finetuned against from scratch, on real images.

For each model and seed the same images, order, augmentation and optimizer; only the starting
weights differ, and each start takes the better of two learning rates. Prints the validation error
of both and the ratio scratch / finetuned. Three minutes on one core.

    python examples/digits/prepare.py
    python benchmarks/tiny_hub_helps.py [--images 500] [--epochs 3] [--seeds 3]
    python benchmarks/tiny_hub_helps.py --photos [--images 200]

`--photos`: patches of the two photographs that scikit-learn ships, of a temple and a flower. Which
one is a patch from? The left halves train, the right halves validate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader

from qtt_core.hub import ModelCard, load_hub
from qtt_core.jobs import JobDocument, Paths, Task
from qtt_trainer import data, prepare
from qtt_trainer.keys import key
from qtt_trainer.metafeatures import spread
from qtt_trainer.model import BuildRequest, BuiltModel, build_model, rebuild_model

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"data_augmentation": "trivial_augment"}
RATES, BATCH = (1e-3, 5e-3), 32


def photo_patches(target: Path, side: int = 32, stride: int = 24) -> Path:
    """Patches of `side` pixels as an ImageFolder; none of train touches one of val."""
    for photo, name in zip(load_sample_images().images, ("temple", "flower"), strict=True):
        height, width = photo.shape[:2]
        halves = {"train": (0, width // 2), "val": (width // 2, width)}
        for split, (left, right) in halves.items():
            folder = target / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for top in range(0, height - side + 1, stride):
                for x in range(left, right - side + 1, stride):
                    patch = Image.fromarray(photo[top : top + side, x : x + side])
                    patch.save(folder / f"{top:03d}-{x:03d}.png")
    return target


def manifest_of(folder: Path, images: int) -> data.DatasetManifest:
    """The data set with `images` training images, evenly over the classes."""
    with tempfile.TemporaryDirectory() as state:
        task = Task(data=str(folder))
        job = JobDocument(run_uid="b", attempt=0, nonce="", task=task, paths=Paths(root=state))
        manifest, _ = prepare.prepare(job)
    train = manifest.splits["train"]
    few = tuple(train.samples[i] for i in spread(len(train.samples), images))
    return replace(manifest, splits={**manifest.splits, "train": replace(train, samples=few)})


def built(card: ModelCard, classes: int, *, pretrained: bool, seed: int) -> BuiltModel:
    torch.manual_seed(key(seed, "init"))
    request = BuildRequest(card=card, num_classes=classes, offline=True)
    return build_model(request) if pretrained else rebuild_model(request)


def error_of(
    start: BuiltModel,
    manifest: data.DatasetManifest,
    folder: Path,
    *,
    rate: float,
    epochs: int,
    seed: int,
) -> float:
    """Validation error after training all layers with AdamW and a cosine schedule."""
    model, config = start.model, start.data_config
    sampler = data.KeyedSampler(manifest.n_train, seed=seed, config_id=0)
    train = data.TrainSet(
        manifest,
        "train",
        folder,
        data.build_transforms(config, CONFIG, None, train=True),
        seed=seed,
        config_id=0,
    )
    loader = DataLoader(train, batch_size=BATCH, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        sampler.epoch = epoch
        for update, (images, labels) in enumerate(loader):
            torch.manual_seed(key(seed, "step", epoch, update))
            loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    val = data.EvalSet(
        manifest, "val", folder, data.build_transforms(config, {}, None, train=False)
    )
    with torch.no_grad():
        wrong = sum(
            int((model(images).argmax(1) != labels).sum())
            for images, labels in DataLoader(val, batch_size=256)
        )
    return wrong / len(val)


def mean_errors(
    card: ModelCard, manifest: data.DatasetManifest, args: argparse.Namespace, *, pretrained: bool
) -> list[float]:
    """Validation error of each seed at the learning rate whose mean is lowest."""
    found = []
    for rate in RATES:
        errors = []
        for seed in range(args.seeds):
            start = built(card, manifest.num_classes, pretrained=pretrained, seed=seed)
            options = {"rate": rate, "epochs": args.epochs, "seed": seed}
            errors.append(error_of(start, manifest, args.data, **options))
        found.append(errors)
    return min(found, key=statistics.mean)


def rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row a model."""
    manifest = manifest_of(args.data, args.images)
    for card in load_hub("tiny").cards:
        started = time.process_time()
        finetuned = mean_errors(card, manifest, args, pretrained=True)
        scratch = mean_errors(card, manifest, args, pretrained=False)
        trained = 2 * len(RATES) * args.seeds * args.epochs
        yield {
            "model": card.name,
            "finetuned": statistics.mean(finetuned),
            "scratch": statistics.mean(scratch),
            "wins": sum(a < b for a, b in zip(finetuned, scratch, strict=True)),
            "seconds_per_epoch": (time.process_time() - started) / trained,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "examples/digits/digits")
    parser.add_argument("--photos", action="store_true", help="patches of photographs, no digits")
    parser.add_argument("--images", type=int, default=500, help="training images (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.photos:
            args.data = photo_patches(Path(scratch))
        report(args)


def report(args: argparse.Namespace) -> None:
    """Print a row a model, then both ratios."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    print(f"validation error, {args.images} images, {args.epochs} epochs, {args.seeds} seeds")
    head = ("finetuned", "scratch", "ratio", "wins", "CPU s/epoch")
    print(f"{'model':20s} {head[0]:>9s} {head[1]:>9s} {head[2]:>7s} {head[3]:>5s} {head[4]:>12s}")
    found = []
    for row in rows(args):
        found.append(row)
        ratio = row["scratch"] / max(row["finetuned"], 1e-4)
        wins = f"{row['wins']}/{args.seeds}"
        print(
            f"{row['model']:20s} {row['finetuned']:9.4f} {row['scratch']:9.4f} {ratio:7.2f} "
            f"{wins:>5s} {row['seconds_per_epoch']:12.2f}",
            flush=True,
        )
    best = {kind: min(row[kind] for row in found) for kind in ("finetuned", "scratch")}
    mean = {kind: statistics.mean(row[kind] for row in found) for kind in best}
    summary = {
        "benchmark": "tiny_hub_helps",
        "images": "photos" if args.photos else "digits",
        "ratio_mean_error": round(mean["scratch"] / max(mean["finetuned"], 1e-4), 3),
        "ratio_best_model": round(best["scratch"] / max(best["finetuned"], 1e-4), 3),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""Makes the `tiny` hub: pretrains small timm models on letters drawn with Pillow's own font.

Writes `trainer_image/qtt_trainer/weights/<model>.safetensors` and `qtt_core/data/hubs/tiny.json`.
No downloads, no digits: the classes are A-Z and the small letters whose shape differs from their
capital's, so that a digit is as new to these models as a bird is to an ImageNet model.

    nice -n 10 python benchmarks/make_tiny_hub.py            # about ten CPU-minutes on one thread
    python benchmarks/make_tiny_hub.py --models test_vit     # one model again; the others are kept

A model that is already in `--work` is not trained again. Same versions and one thread: same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import save_file
from timm.utils import ModelEmaV3

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghnqrt"  # EMNIST's merge of equal shapes
PIXELS = 32
TRAIN, TEST = 24_000, 2_000
NORMALISATIONS = {"half": (0.5, 0.5), "imagenet": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One member of the hub: timm architecture, family, and how it is pretrained."""

    arch: str
    family: str
    epochs: int = 5
    lr: float = 2e-3
    batch: int = 64
    weight_decay: float = 0.02
    default: bool = False


RECIPES = (
    Recipe(arch="test_vit", family="vit", epochs=8, lr=1e-3),
    Recipe(arch="test_efficientnet", family="efficientnet", lr=3e-3),
    Recipe(arch="test_byobnet", family="byobnet"),
    Recipe(arch="test_convnext", family="convnext"),
    Recipe(arch="test_resnet", family="resnet", default=True),
    Recipe(arch="edgenext_xx_small", family="edgenext", lr=3e-3),
)


def draw_letter(text: str, rng: np.random.Generator) -> Image.Image:
    """One letter as a grey image: jittered size, place, slant, stroke, sharpness and background."""
    scale = 3  # drawn large, shrunk at the end: smooth edges at every angle
    side = PIXELS * scale
    font = ImageFont.load_default(size=float(rng.uniform(0.7, 1.3)) * side)
    mask = Image.new("L", (2 * side, 2 * side), 0)
    ImageDraw.Draw(mask).text(
        (side, side), text, fill=255, font=font, anchor="mm", stroke_width=int(rng.integers(0, 7))
    )
    mask = mask.transform(mask.size, Image.Transform.AFFINE, _affine(side, rng), Image.BILINEAR)
    mask = mask.crop((side // 2, side // 2, side // 2 + side, side // 2 + side))
    coarse = int(rng.choice([8, 8, 12, 16, PIXELS, PIXELS]))  # scans are coarse, prints are sharp
    mask = mask.resize((coarse, coarse), Image.BOX).resize((PIXELS, PIXELS), Image.BICUBIC)
    if rng.random() < 0.3:
        mask = mask.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.0))))
    alpha = np.asarray(mask, np.float32) / 255
    paper, ink = _background(rng), rng.uniform(0.75, 1.0)
    picture = paper * (1 - alpha) + ink * alpha + rng.normal(0, 0.02, alpha.shape)
    if rng.random() < 0.25:
        picture = 1 - picture
    return Image.fromarray(np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8))


def _affine(side: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Rotation up to 18 degrees, shear, unequal axes and a shift, about the centre."""
    angle, shear = math.radians(rng.uniform(-18, 18)), rng.uniform(-0.25, 0.25)
    wide, high = rng.uniform(0.8, 1.35), rng.uniform(0.8, 1.25)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, sin], [-sin, cos]]) @ np.array([[wide, shear], [0, high]])
    shift = rng.uniform(-0.1, 0.1, 2) * side
    offset = np.array([side, side]) + shift - matrix @ np.array([side, side])
    return (*matrix[0], offset[0], *matrix[1], offset[1])


def _background(rng: np.random.Generator) -> np.ndarray:
    """A smooth dark paper: a plane of grey, or plain black as in most scans."""
    if rng.random() < 0.4:
        return np.zeros((PIXELS, PIXELS), np.float32)
    y, x = np.mgrid[0 : 1 : PIXELS * 1j, 0 : 1 : PIXELS * 1j]
    low, slope = rng.uniform(0, 0.25), rng.uniform(-0.2, 0.2, 2)
    return np.clip(low + slope[0] * (x - 0.5) + slope[1] * (y - 0.5), 0, 0.5).astype(np.float32)


def draw_set(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes (n, 32, 32), labels (n,)): every letter equally often."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(LETTERS))
    pictures = np.stack([np.asarray(draw_letter(LETTERS[label], rng)) for label in labels])
    return torch.from_numpy(pictures), torch.from_numpy(labels)


def normalised(pictures: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(n, 32, 32) bytes -> (n, 3, 32, 32) floats as the model expects them."""
    rgb = (pictures.float() / 255)[:, None].expand(-1, 3, -1, -1)
    return (rgb - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def build(arch: str) -> torch.nn.Module:
    """The architecture with one output a letter, for 32 pixels."""
    fixed = {"img_size": PIXELS} if timm.get_pretrained_cfg(arch).fixed_input_size else {}
    return timm.create_model(arch, num_classes=len(LETTERS), **fixed)


def train(
    recipe: Recipe, train_set: tuple[torch.Tensor, torch.Tensor], seed: int
) -> tuple[torch.nn.Module, float]:
    """Pretrain one model; returns its averaged weights and the CPU-seconds."""
    torch.manual_seed(seed)
    model = build(recipe.arch)
    mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    pictures, labels = train_set
    updates = recipe.epochs * (len(labels) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=updates, pct_start=0.15
    )
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    average, started, update = ModelEmaV3(model, decay=0.995, use_warmup=True), _cpu(), 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(labels))
        for batch in order.split(recipe.batch):
            if len(batch) < recipe.batch:
                continue
            loss = loss_of(model(normalised(pictures[batch], mean, std)), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update += 1
            average.update(model, step=update)
    return average.module, _cpu() - started


@torch.no_grad()
def accuracy(model: torch.nn.Module, test_set: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share of held-out letters that are named right."""
    model.eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
    pictures, labels = test_set
    right = sum(
        int((model(normalised(x, mean, std)).argmax(1) == y).sum())
        for x, y in zip(pictures.split(250), labels.split(250), strict=True)
    )
    return right / len(labels)


def gmacs(model: torch.nn.Module) -> float:
    """Multiply-adds of one 32-pixel image, counted by torch, in billions."""
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, PIXELS, PIXELS))
    return counter.get_total_flops() / 2 / 1e9


def save(model: torch.nn.Module, path: Path) -> None:
    """Matrices and kernels in half precision, vectors and statistics as they are."""
    state = {
        name: (value.half() if value.is_floating_point() and value.ndim > 1 else value).contiguous()
        for name, value in model.state_dict().items()
    }
    # one entry only: safetensors writes its metadata in random order
    save_file(state, path, metadata={"num_classes": str(len(LETTERS))})


def card(recipe: Recipe, model: torch.nn.Module, score: float) -> dict[str, object]:
    """The hub's entry."""
    config = model.pretrained_cfg
    return {
        "name": recipe.arch.replace("test_", "mini_"),  # timm made these for tests; here they work
        "tag": recipe.arch,
        "family": recipe.family,
        "params": sum(p.numel() for p in model.parameters()),
        "gmacs": round(gmacs(model), 6),
        "input_size": PIXELS,
        "fixed_size": bool(config["fixed_input_size"]),
        "resizable_weights": True,
        "batchnorm": any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()),
        "pretraining": "drawn letters",
        "accuracy": round(score, 4),
        "accuracy_kind": "glyphs",
        "normalisation": "half" if config["mean"][0] == 0.5 else "imagenet",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": config["interpolation"],
        "licence": "apache-2.0",
        "weights": f"package:{recipe.arch}.safetensors",
        "default": recipe.default,
    }


def make(
    recipe: Recipe, sets: object, *, work: Path, weights: Path, seed: int
) -> dict[str, object]:
    """Train, save and describe one model, or read what an earlier call left."""
    note = work / f"{recipe.arch}.json"
    target = weights / f"{recipe.arch}.safetensors"
    if note.exists() and target.exists():
        return json.loads(note.read_text())
    train_set, test_set = sets()
    model, seconds = train(recipe, train_set, seed)
    save(model, target)
    entry = card(recipe, model, accuracy(model, test_set))
    print(
        f"{recipe.arch:20s} {entry['accuracy']:.4f} of held-out letters, {seconds:.0f} CPU-seconds"
    )
    note.write_text(json.dumps(entry))
    return entry


def write_hub(entries: list[dict[str, object]], path: Path) -> None:
    """One card a line, smallest first."""
    lines = [json.dumps(entry) for entry in sorted(entries, key=lambda e: e["gmacs"])]
    path.write_text('{"cards": [\n  ' + ",\n  ".join(lines) + "\n]}\n")


def _cpu() -> float:
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", help="make these again (default: what is missing)")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/out/tiny_hub")
    parser.add_argument("--weights", type=Path, default=ROOT / "trainer_image/qtt_trainer/weights")
    parser.add_argument("--hub", type=Path, default=ROOT / "qtt_core/data/hubs/tiny.json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    for folder in (args.work, args.weights, args.hub.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for arch in args.models or ():
        (args.work / f"{arch}.json").unlink(missing_ok=True)
    drawn: list[object] = []

    def sets() -> object:
        if not drawn:
            drawn.extend((draw_set(TRAIN, args.seed + 1), draw_set(TEST, args.seed + 2)))
        return drawn

    entries = [
        make(recipe, sets, work=args.work, weights=args.weights, seed=args.seed)
        for recipe in RECIPES
    ]
    write_hub(entries, args.hub)
    size = sum(path.stat().st_size for path in args.weights.glob("*.safetensors"))
    print(f"{len(entries)} models, {size / 1e6:.2f} MB in {args.weights}")


if __name__ == "__main__":
    main()

"""Augmentation and evaluation transforms from a configuration (20-trainer 3.10, 4.6).

`plan_transforms` decides, as plain data that a result can record; `build_transforms` turns the plan
into a callable PIL image -> float tensor. Random choices are drawn from the global generators of
`random`, `numpy` and `torch`, which `data.TrainSet` seeds per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qtt_core.steps import Config

if TYPE_CHECKING:
    import torch
    from PIL import Image

JITTER = 0.4
UPSTREAM_SPACES = frozenset({"qtt-compat", "quicktune-v1"})
"""Spaces whose published curves also jitter colours under trivial and random augmentation."""

Transform = Callable[["Image.Image"], "torch.Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformPlan:
    """Every choice of a transform. `augmentation`: none, trivial, random, or a timm policy name."""

    train: bool
    size: int
    channels: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str = "none"
    color_jitter: float = 0.0
    num_ops: int = 0
    magnitude: int = 0
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def to_json(self) -> dict[str, Any]:
        """For `result.json`: what was done to the pixels."""
        return asdict(self)


def plan_transforms(
    data_config: Mapping[str, Any],
    config: Config,
    img_size: int | None,
    train: bool,
    *,
    space_id: str = "native",
) -> TransformPlan:
    """Decide the transform of a configuration.

    `data_config` is timm's (`resolve_model_data_config`); `img_size` None is its own size.
    `crop_pct` is clamped to 1: VOLO's 1.15 would pad 13 % of the picture with black.
    Source: QTT's loader for none, and its jitter beside trivial and random in the upstream
    spaces; `native` leaves those two alone, they bring colour operations of their own. timm
    itself drops the jitter where an AutoAugment policy is given.
    """
    channels, height, _ = data_config["input_size"]
    common = TransformPlan(
        train=train,
        size=int(img_size or height),
        channels=int(channels),
        interpolation=str(data_config["interpolation"]),
        mean=_per_channel(data_config["mean"], channels),
        std=_per_channel(data_config["std"], channels),
    )
    if not train:
        return replace(
            common,
            crop_pct=min(1.0, float(data_config["crop_pct"])),
            crop_mode=str(data_config.get("crop_mode") or "center"),
        )
    return replace(common, **_augmentation(config, upstream=space_id in UPSTREAM_SPACES))


def build_transforms(
    data_config: Mapping[str, Any],
    config: Config,
    img_size: int | None,
    train: bool,
    *,
    space_id: str = "native",
) -> Transform:
    """The planned transform as a callable: PIL image -> float32 tensor (C, H, W), normalised."""
    plan = plan_transforms(data_config, config, img_size, train, space_id=space_id)
    return realise(plan)


def realise(plan: TransformPlan) -> Transform:
    """Compose the steps of a plan: timm's recipe, torchvision's augmentation in its middle."""
    from torchvision import transforms as tv  # type: ignore[import-untyped]  # ships no types

    steps = _train_steps(plan) if plan.train else _eval_steps(plan)
    if plan.channels == 1:
        steps.append(_one_channel)  # colour operations turn grey into RGB
    return tv.Compose([*steps, _Normalise(plan.mean, plan.std)])  # type: ignore[no-any-return]


def _one_channel(pixels: torch.Tensor) -> torch.Tensor:
    return pixels[:1]


class _Normalise:
    """Bytes (C, H, W) to normalised floats; a class, so that workers can be spawned."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        import torch

        shape = (len(mean), 1, 1)
        self.shift = torch.tensor([255.0 * m for m in mean]).view(shape)
        self.scale = torch.tensor([1.0 / (255.0 * s) for s in std]).view(shape)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().sub_(self.shift).mul_(self.scale)


def _augmentation(config: Config, *, upstream: bool) -> dict[str, Any]:
    name = config.get("data_augmentation", "none")
    extra = JITTER if upstream else 0.0
    if name == "trivial_augment":
        return {"augmentation": "trivial", "color_jitter": extra}
    if name == "random_augment":
        ops, magnitude = config.get("ra_num_ops", 2), config.get("ra_magnitude", 9)
        assert isinstance(ops, int)
        assert isinstance(magnitude, int)
        return {
            "augmentation": "random",
            "color_jitter": extra,
            "num_ops": ops,
            "magnitude": magnitude,
        }
    if name == "auto_augment":
        return {"augmentation": str(config.get("auto_augment") or "v0")}
    return {"augmentation": "none", "color_jitter": JITTER}


def _train_steps(plan: TransformPlan) -> list[Any]:
    """Crop and flip, then the augmentation, then jitter, then bytes (C, H, W)."""
    from timm.data.transforms_factory import create_transform

    policy = None if plan.augmentation in {"none", "trivial", "random"} else plan.augmentation
    crop, colour, last = create_transform(
        input_size=(plan.channels, plan.size, plan.size),
        is_training=True,
        color_jitter=plan.color_jitter or None,  # type: ignore[arg-type]  # None: no jitter
        auto_augment=policy,
        interpolation=plan.interpolation,
        mean=plan.mean,
        std=plan.std,
        normalize=False,
        separate=True,
    )
    return [crop, *_torchvision_augmentation(plan), colour, last]


def _torchvision_augmentation(plan: TransformPlan) -> list[Any]:
    from torchvision import transforms as tv

    if plan.augmentation == "trivial":
        return [tv.TrivialAugmentWide()]
    if plan.augmentation == "random":
        return [tv.RandAugment(plan.num_ops, plan.magnitude)]
    return []


def _eval_steps(plan: TransformPlan) -> list[Any]:
    from timm.data.transforms_factory import create_transform

    return [
        create_transform(
            input_size=(plan.channels, plan.size, plan.size),
            is_training=False,
            interpolation=plan.interpolation,
            mean=plan.mean,
            std=plan.std,
            crop_pct=plan.crop_pct,
            crop_mode=plan.crop_mode,
            normalize=False,
        )
    ]


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) == channels:
        return numbers
    return (sum(numbers) / len(numbers),) * channels

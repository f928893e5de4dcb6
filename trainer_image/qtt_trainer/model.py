"""Builds a timm model from its card, weights from a file or a cache (20-trainer 1, 2).

Second part of a step, after the data set was checked. It opens a connection only when the job is
not offline and the weights are timm's; it never moves a model to a device and never trains.
"""

from __future__ import annotations

import copy
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from qtt_core.hub import ModelCard
from qtt_core.results import EXIT_BAD_JOB, State
from qtt_trainer import volume
from qtt_trainer.endings import FULL_ERRNOS, VOLUME_ERRNOS, EndedError, classify

NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_GONE = frozenset({401, 403, 404})
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What to build; `drop` is the dropout before the classifier."""

    card: ModelCard
    num_classes: int
    in_chans: int = 3
    img_size: int | None = None
    drop: float = 0.0
    weights_cache: str = ""
    offline: bool = False
    keep_source_head: bool = False

    @property
    def image_size(self) -> int:
        """The side of the square input in pixels."""
        return self.img_size or self.card.input_size


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A pretrained model with a fresh head; `source_head` is the pretrained one, if asked for.

    `data_config` has the keys of timm's `resolve_model_data_config`; `weights_sha256` is empty when
    the digest is not known without reading gigabytes.
    """

    model: nn.Module
    data_config: Mapping[str, Any]
    pretrained: nn.Module | None
    source_head: nn.Module | None
    weights_sha256: str


def build_model(request: BuildRequest, *, keep_pretrained: bool = False) -> BuiltModel:
    """Build, load the pretrained weights, then give the model a head of `num_classes`.

    The head is drawn from torch's global generator: seed it first. `keep_pretrained` also returns a
    frozen copy in eval mode (the teacher of DELTA, the source of the relationship).
    Raises: EndedError `invalid_config`, `infeasible`, `weights_unavailable`, `weights_corrupt`.
    """
    card = request.card
    _require_possible(request)
    source = _package_file(card)
    model = _create(request, source)
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if keep_pretrained else None
    head = copy.deepcopy(source_head_of(model)) if request.keep_source_head else None
    model.reset_classifier(request.num_classes)  # type: ignore[operator]  # a timm model
    return BuiltModel(
        model=model,
        data_config=_data_config(request, model),
        pretrained=teacher,
        source_head=head,
        weights_sha256=_weights_sha256(request, model, source),
    )


def rebuild_model(request: BuildRequest) -> BuiltModel:
    """The same architecture without weights; a checkpoint will bring them."""
    _require_possible(request)
    model = _construct(request, pretrained=False, num_classes=request.num_classes, overlay=None)
    return BuiltModel(
        model=model,
        data_config=_data_config(request, model),
        pretrained=None,
        source_head=None,
        weights_sha256="",
    )


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the head's parameters, each ending in a dot (VOLO has two heads)."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def is_head(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to the classifier."""
    return name.startswith(prefixes)


def source_head_of(model: nn.Module) -> nn.Module:
    """The pretrained classifier alone: pre-logits in, source logits out.

    Raises: EndedError `infeasible` for a model whose classifier is not one module.
    """
    head = model.get_classifier()  # type: ignore[operator]  # a timm model
    if not isinstance(head, nn.Module):
        raise EndedError(State.INFEASIBLE, "co-tuning needs one pretrained classifier module")
    return head


def backbone_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters outside the classifier."""
    prefixes = classifier_prefixes(model)
    return ((n, p) for n, p in model.named_parameters() if not is_head(n, prefixes))


def has_batchnorm(model: nn.Module) -> bool:
    """Whether any layer normalises by batch statistics."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def count_parameters(model: nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _require_possible(request: BuildRequest) -> None:
    card = request.card
    if not timm.is_model(card.tag.split(".")[0]):
        raise EndedError(
            State.INVALID_CONFIG, f"model {card.name}: timm {timm.__version__} has no {card.tag}"
        )
    if not card.fits(request.img_size):
        raise EndedError(
            State.INFEASIBLE,
            f"model {card.name}: its pretrained weights only fit {card.input_size} px images, "
            f"not {request.img_size}",
        )


def _package_file(card: ModelCard) -> Path | None:
    """The shipped weights of a `package:<file>` card; None for timm's own."""
    kind, _, name = card.weights.partition(":")
    if kind != "package":
        return None
    path = Path(str(importlib.resources.files("qtt_trainer"))) / "weights" / name
    if not path.is_file():
        raise EndedError(State.WEIGHTS_UNAVAILABLE, f"model {card.name}: {name} was not installed")
    return path


def _create(request: BuildRequest, source: Path | None) -> nn.Module:
    overlay: dict[str, Any] | None = None
    if source is not None:
        overlay = {
            "file": str(source),
            "num_classes": _source_classes(request.card, source),
            "input_size": (3, request.card.input_size, request.card.input_size),
            "custom_load": False,
        }
    classes = request.num_classes
    if request.keep_source_head:
        classes = overlay["num_classes"] if overlay else _published_classes(request.card)
    try:
        return _construct(request, pretrained=True, num_classes=classes, overlay=overlay)
    except safetensors.SafetensorError as error:
        raise EndedError(
            State.WEIGHTS_CORRUPT, f"model {request.card.name}: weights unreadable ({error})"
        ) from error
    except OSError as error:
        raise _weights_error(request.card, error) from error


def _construct(
    request: BuildRequest, *, pretrained: bool, num_classes: int, overlay: dict[str, Any] | None
) -> nn.Module:
    card, side = request.card, request.image_size
    if request.offline:
        _go_offline()
    sized: dict[str, Any] = {"img_size": side} if card.fixed_size else {}
    try:
        return timm.create_model(
            card.tag,
            pretrained=pretrained,
            num_classes=num_classes,
            in_chans=request.in_chans,
            drop_rate=request.drop,
            pretrained_cfg_overlay=overlay,
            cache_dir=request.weights_cache or None,
            **sized,
        )
    except (AssertionError, RuntimeError, ValueError) as error:
        if side == card.input_size:
            raise
        raise EndedError(
            State.INFEASIBLE, f"model {card.name} cannot take {side} px images: {error}"
        ) from error


def _source_classes(card: ModelCard, source: Path) -> int:
    """Classes of the shipped head, from the file's header."""
    names = _published_cfg(card).get("classifier")
    name = names if isinstance(names, str) else next(iter(names or ()), "")
    try:
        with safetensors.safe_open(str(source), framework="pt") as file:
            return int(file.get_slice(f"{name}.weight").get_shape()[0])
    except safetensors.SafetensorError as error:
        raise EndedError(
            State.WEIGHTS_CORRUPT, f"model {card.name}: {source.name} is unreadable ({error})"
        ) from error


def _published_classes(card: ModelCard) -> int:
    return int(_published_cfg(card).get("num_classes", 1000))


def _published_cfg(card: ModelCard) -> dict[str, Any]:
    config = timm.get_pretrained_cfg(card.tag, allow_unregistered=True)
    return dict(config.to_dict()) if config is not None else {}  # type: ignore[no-untyped-call]


def _weights_error(card: ModelCard, error: OSError) -> EndedError:
    """The volume's faults stay what they are; what a hub answered decides whether a retry helps."""
    if error.errno in FULL_ERRNOS | VOLUME_ERRNOS:
        return classify(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return EndedError(
        State.WEIGHTS_UNAVAILABLE,
        f"model {card.name}: no weights for {card.tag} ({type(error).__name__}: {error})",
        exit_code=EXIT_BAD_JOB if status in _GONE else None,
    )


def _go_offline() -> None:
    """huggingface_hub reads its variable at import, which a warm parent has long done."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def _data_config(request: BuildRequest, model: nn.Module) -> dict[str, Any]:
    """Give timm's data configuration at the training size; from the card for shipped weights."""
    card, side = request.card, request.image_size
    size = (request.in_chans, side, side)
    if card.weights == "hub":
        return {**resolve_model_data_config(model), "input_size": size}  # type: ignore[no-untyped-call]
    mean, std = NORMALISATIONS[card.normalisation]
    return {
        "input_size": size,
        "interpolation": card.interpolation,
        "mean": mean,
        "std": std,
        "crop_pct": card.crop_pct,
        "crop_mode": card.crop_mode,
    }


def _weights_sha256(request: BuildRequest, model: nn.Module, source: Path | None) -> str:
    """Digest of the weights file; a hub cache names its blobs by it, so that nothing is read."""
    if source is not None:
        return volume.file_sha256(source)
    from huggingface_hub import try_to_load_from_cache

    repository = getattr(model, "pretrained_cfg", {}).get("hf_hub_id")
    if not repository:
        return ""
    path = try_to_load_from_cache(
        repository, "model.safetensors", cache_dir=request.weights_cache or None
    )
    name = Path(path).resolve().name if isinstance(path, str) else ""
    return name if _SHA256.fullmatch(name) else ""


class HeadInput:
    """What the classifier was fed in the last forward pass: the pre-logits, dropout included.

    A forward hook gives them for every architecture in one pass; a convolutional classifier's
    (B, D, 1, 1) input is kept as `raw` and flattened to (B, D) as `features`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.raw: torch.Tensor | None = None
        self._handle = source_head_of(model).register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.raw = args[0]

    @property
    def features(self) -> torch.Tensor:
        """(B, D) pre-logits of the last forward pass."""
        assert self.raw is not None
        return self.raw.flatten(1)

    def remove(self) -> None:
        """Take the hook off and drop the tensor."""
        self._handle.remove()
        self.raw = None

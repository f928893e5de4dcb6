"""Everything a step trains with, assembled in the order that resume depends on (20-trainer 1).

Build, load weights, keep references, new head, StochNorm, freeze plan, device, optimizer, EMA, then
the checkpoint, and the schedule last. The loop uses it; nothing here iterates over data but the
co-tuning relationship.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from qtt_core.results import State
from qtt_core.steps import Config
from qtt_trainer.checkpoint import CorruptCheckpointError
from qtt_trainer.endings import EndedError
from qtt_trainer.freezing import FreezePlan, plan_freezing
from qtt_trainer.inert import Facts, inert_settings, is_on
from qtt_trainer.mixing import Targets
from qtt_trainer.model import (
    BuildRequest,
    BuiltModel,
    HeadInput,
    backbone_parameters,
    build_model,
    has_batchnorm,
)
from qtt_trainer.optim import (
    DECOUPLED,
    build_optimizer,
    group_names,
    parameter_groups,
    smallest_scale,
)
from qtt_trainer.penalties import evenly_spaced
from qtt_trainer.precision import CHANNELS_LAST_FAMILIES, Precision
from qtt_trainer.schedule import Horizon, LearningRate
from qtt_trainer.stoch_norm import convert_stoch_norm

EMA_DECAY = 0.9998


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """References and strengths of the regularisers; 0 = off.

    `origins`: (w, w0) of the trained backbone; `decoupled_sp`: applied beside the loss; `stages`:
    indices of the feature maps that DELTA compares, empty = pooled pre-logits.
    """

    sp: float = 0.0
    decoupled_sp: float = 0.0
    delta: float = 0.0
    bss: float = 0.0
    cotuning: float = 0.0
    origins: tuple[tuple[nn.Parameter, torch.Tensor], ...] = ()
    teacher: nn.Module | None = None
    stages: tuple[int, ...] = ()
    head_input: HeadInput | None = None
    source_head: nn.Module | None = None
    relation: torch.Tensor | None = None


@dataclass(slots=True, kw_only=True)
class Session:
    """A model under training: `epoch` whole epochs, `batch` updates beyond."""

    config: Config
    native: bool
    model: nn.Module
    data_config: Mapping[str, Any]
    plan: FreezePlan
    precision: Precision
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    penalties: Penalties
    targets: Targets
    batch_size: int
    micro_batch: int
    horizon: Horizon
    weights_sha256: str
    inert: tuple[str, ...]
    channels_last: bool
    schedule: LearningRate | None = None
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    batch: int = 0
    partial: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def start_schedule(self) -> None:
        """Build the scheduler; only after the optimizer's state was loaded."""
        self.schedule = LearningRate(self.optimizer, self.config, self.horizon, native=self.native)

    def scored_model(self) -> nn.Module:
        """What is evaluated: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def to_state(self) -> dict[str, Any]:
        """The archive's dict: tensors, numbers, strings, lists and dicts; timm's key names."""
        source = self.penalties.source_head
        return {
            "version": 2,
            "epoch": self.epoch,
            "batch": self.batch,
            "micro_batch": self.micro_batch,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_names": group_names(self.optimizer),
            "amp_scaler": self.scaler.state_dict(),
            "state_dict_ema": None if self.ema is None else self.ema.module.state_dict(),
            "source_head": None if source is None else source.state_dict(),
            "partial": dict(self.partial),
            "history": copy.deepcopy(self.history),
            "weights_sha256": self.weights_sha256,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from an archive.

        Raises: CorruptCheckpointError if it does not fit this model; EndedError `weights_corrupt`
        if the pretrained weights are no longer those that the run began with.
        """
        if state["optimizer_names"] != group_names(self.optimizer):
            raise CorruptCheckpointError("its optimizer belongs to other parameters")
        theirs = str(state["weights_sha256"])
        if theirs and self.weights_sha256 and theirs != self.weights_sha256:
            raise EndedError(
                State.WEIGHTS_CORRUPT,
                f"pretrained weights have SHA-256 {self.weights_sha256[:12]}…, "
                f"this configuration began with {theirs[:12]}…",
            )
        try:
            self._load_tensors(state)
        except (RuntimeError, KeyError, ValueError) as error:
            raise CorruptCheckpointError(f"its tensors do not fit ({error})") from error
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self.micro_batch = int(state["micro_batch"])
        self.partial = dict(state["partial"])
        self.history = copy.deepcopy(state["history"])

    def _load_tensors(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["state_dict"])
        # The archive is mapped, not read: a copy keeps the optimizer independent of the file.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.scaler.load_state_dict(state["amp_scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"])
        if self.penalties.source_head is not None:
            self.penalties.source_head.load_state_dict(state["source_head"])

    @property
    def update(self) -> int:
        """Updates done since the beginning of the curve."""
        return self.epoch * self.horizon.updates_per_epoch + self.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """What to assemble; `make_relation` gets P of co-tuning once a model exists."""

    config: Config
    native: bool
    build: BuildRequest
    precision: Precision
    targets: Targets
    n_train: int
    max_fidelity: int
    micro_batch: int | None
    ema: bool
    make_relation: Callable[[BuiltModel], torch.Tensor]


def assemble(request: SessionRequest) -> Session:
    """A session before its first update. Seed torch's global generator first: the head is drawn.

    Raises: EndedError, as `build_model`.
    """
    config, native = request.config, request.native
    needs_teacher = is_on(config, "delta_reg") or is_on(config, "cotuning_reg")
    built = build_model(request.build, keep_pretrained=needs_teacher)
    plan = plan_freezing(built.model, config, max_fidelity=request.max_fidelity, native=native)
    origins = _origins(built.model, plan) if is_on(config, "sp_reg") else ()
    stoch = (
        convert_stoch_norm(built.model, plan.trainable - plan.head)
        if is_on(config, "stoch_norm")
        else 0
    )
    batch, updates = batching(int(config["batch_size"]), request.n_train, native=native)  # type: ignore[arg-type]
    facts = Facts(
        native=native,
        max_fidelity=request.max_fidelity,
        backbone_trains=plan.backbone_trains,
        stoch_layers=stoch,
        batch=batch,
        dtype=request.precision.dtype,
    )
    inert = inert_settings(config, facts)
    session = _place(request, built, plan, inert, (batch, updates), origins)
    session.warnings.extend(_warnings(session))
    return session


def _place(
    request: SessionRequest,
    built: BuiltModel,
    plan: FreezePlan,
    inert: tuple[str, ...],
    batching: tuple[int, int],
    origins: tuple[tuple[nn.Parameter, str, torch.Tensor], ...],
) -> Session:
    """Move to the device, then groups, optimizer and EMA."""
    config, device = request.config, request.precision.device
    last = device.type == "cuda" and request.build.card.family in CHANNELS_LAST_FAMILIES
    model = built.model.to(device, memory_format=torch.channels_last if last else None)  # type: ignore[call-overload]
    penalties = _penalties(request, built, inert, origins)
    extra = {}
    if penalties.source_head is not None:
        extra = {f"source_head.{n}": p for n, p in penalties.source_head.named_parameters()}
    groups = parameter_groups(
        model, plan.trainable, config, native=request.native, extra_head=extra
    )
    batch, updates = batching
    return Session(
        config=config,
        native=request.native,
        model=model,
        data_config=built.data_config,
        plan=plan,
        precision=request.precision,
        optimizer=build_optimizer(
            groups, config, native=request.native, fused=device.type == "cuda"
        ),
        scaler=request.precision.scaler(),
        penalties=penalties,
        targets=_on_device(request.targets, device),
        batch_size=batch,
        micro_batch=min(batch, request.micro_batch or batch),
        horizon=Horizon(epochs=request.max_fidelity, updates_per_epoch=updates),
        weights_sha256=built.weights_sha256,
        inert=inert,
        channels_last=last,
        ema=ModelEmaV3(model, decay=EMA_DECAY, use_warmup=True) if request.ema else None,
    )


def batching(wanted: int, n_train: int, *, native: bool) -> tuple[int, int]:
    """(B, updates per epoch): B = min(wanted, N); the last partial batch stays unless it has < 2.

    Compat drops it, as the public tool; a batch of one image breaks BatchNorm.
    """
    batch = min(wanted, n_train)
    whole, rest = divmod(n_train, batch)
    return batch, whole + (1 if native and rest >= 2 else 0)


def _origins(
    model: nn.Module, plan: FreezePlan
) -> tuple[tuple[nn.Parameter, str, torch.Tensor], ...]:
    """(w, its name, w0) of every backbone parameter that ever trains."""
    return tuple(
        (parameter, name, parameter.detach().float().clone())
        for name, parameter in backbone_parameters(model)
        if name in plan.trainable
    )


def _penalties(
    request: SessionRequest,
    built: BuiltModel,
    inert: tuple[str, ...],
    origins: tuple[tuple[nn.Parameter, str, torch.Tensor], ...],
) -> Penalties:
    config, device = request.config, request.precision.device

    def strength(name: str) -> float:
        return 0.0 if name in inert or not is_on(config, name) else float(config[name])  # type: ignore[arg-type]

    sp, delta, cotuning = strength("sp_reg"), strength("delta_reg"), strength("cotuning_reg")
    decoupled = sp if request.native and config["opt"] in DECOUPLED else 0.0
    teacher = built.pretrained.to(device) if built.pretrained is not None and delta else None
    source = built.source_head.to(device) if built.source_head is not None and cotuning else None
    stages = delta_stages(built, request, device) if delta and request.native else ()
    needs_input = bool(strength("bss_reg") or cotuning or (delta and not stages))
    return Penalties(
        # compat: alpha * sum of squares; native: alpha / 2
        sp=0.0 if decoupled else (sp / 2 if request.native else sp),
        decoupled_sp=decoupled,
        delta=delta,
        bss=strength("bss_reg"),
        cotuning=cotuning,
        origins=tuple((w, w0.to(device)) for w, _, w0 in origins) if sp else (),
        teacher=teacher,
        stages=stages,
        head_input=HeadInput(built.model) if needs_input else None,
        source_head=source,
        relation=request.make_relation(built).to(device) if cotuning else None,
    )


@torch.no_grad()
def delta_stages(
    built: BuiltModel, request: SessionRequest, device: torch.device
) -> tuple[int, ...]:
    """At most four evenly spaced feature maps, where one pass can give both maps and logits.

    Empty, hence pooled pre-logits, for an architecture whose head applied to the intermediates'
    last output does not reproduce its forward pass (probed on one random image).
    """
    teacher = built.pretrained
    if teacher is None or not hasattr(teacher, "forward_intermediates"):
        return ()
    size = built.data_config["input_size"]
    image = torch.randn((1, *size), generator=torch.Generator().manual_seed(0)).to(device)
    last, maps = teacher.forward_intermediates(image)  # type: ignore[operator]  # a timm model
    if not torch.allclose(teacher.forward_head(last), teacher(image), atol=1e-4):  # type: ignore[operator]
        return ()
    return tuple(evenly_spaced(len(maps)))


def _on_device(targets: Targets, device: torch.device) -> Targets:
    if targets.class_weights is None:
        return targets
    return Targets(
        num_classes=targets.num_classes,
        smoothing=targets.smoothing,
        mixer=targets.mixer,
        class_weights=targets.class_weights.to(device),
    )


def _warnings(session: Session) -> list[str]:
    found = []
    wanted = int(session.config["batch_size"])  # type: ignore[arg-type]
    if session.batch_size < wanted:
        found.append(f"batch_size {wanted} exceeds the training images: {session.batch_size} used")
    scale = smallest_scale(session.optimizer)
    if scale < 1e-6:
        found.append(f"layer_decay leaves the first layers {scale:.1e} of the learning rate")
    warmup = int(session.config.get("warmup_epochs") or 0)
    if warmup >= session.horizon.epochs > 1 and session.config.get("sched") != "plateau":
        found.append(f"warmup_epochs {warmup} cut to {session.horizon.epochs - 1}: below T")
    if session.micro_batch < 4 and has_batchnorm(session.model):
        found.append(f"BatchNorm sees {session.micro_batch} images at a time")
    return found

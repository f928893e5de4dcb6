"""The published micro runs as a table, and what all published layouts share (10-optimizer 9, 10).

Each reader (`paper_layout`, `tool_layout`, this one) applies the layout's own rules, so that a
fault of the old harness, a filler or a dry run never becomes something learned.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qtt_core.errors import Fault, SpecError
from qtt_core.hub import load_hub
from qtt_core.metadataset import CENSORED, DIVERGED, FAILED, OK, MetaDataset
from qtt_core.space import build_space
from qtt_core.steps import Config, Scalar

EPOCHS = 50
FUSED_BATCHNORM = ("mobilevit", "tf_efficientnet")
"""Their activation was lost when the old harness replaced the normalisation (stoch_norm)."""
MICRO_TRAIN, MICRO_VAL = 478, 160
"""Images of a micro data set, mean over the published ones."""
PLAIN = (
    "model", "batch_size", "bss_reg", "cotuning_reg", "cutmix", "delta_reg", "drop", "lr", "mixup",
    "mixup_prob", "opt", "pct_to_freeze", "sched", "smoothing", "sp_reg", "warmup_epochs",
    "warmup_lr", "weight_decay",
)  # fmt: skip
"""Columns whose values are the hyperparameter's."""
ARGUMENTS = (
    *PLAIN, "amp", "auto_augment", "clip_grad", "decay_epochs", "decay_rate", "layer_decay",
    "linear_probing", "momentum", "opt_betas", "patience_epochs", "ra_magnitude", "ra_num_ops",
    "random_augment", "stoch_norm", "trivial_augment",
)  # fmt: skip
"""What `config_of_arguments` reads of a training script's arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a row says of its run before it began."""

    run: str
    dataset: str
    config: Config
    metafeatures: Mapping[str, float]


def read_runs(path: Path) -> list[Run]:
    """Every row of a table of micro runs. Raises: as `from_runs_csv`."""
    space = build_space("quicktune-v1", load_hub("timm24"), max_fidelity=EPOCHS)
    return [
        Run(
            run=row["run"], dataset=row["dataset"],
            config=space.canonical(config_of_arguments(row)),
            metafeatures=_metafeatures(row),
        )
        for row in _rows(path)
    ]  # fmt: skip


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"run", "dataset", "epochs_done", "top1", *PLAIN} <= rows[0].keys():
        raise SpecError([Fault(str(path), "header", "is not the table of micro runs")])
    return rows


def _metafeatures(row: Mapping[str, str]) -> dict[str, float]:
    return {
        "n_train": float(MICRO_TRAIN), "n_val": float(MICRO_VAL),
        "num_classes": float(row["num_classes"]),
    }  # fmt: skip


def from_runs_csv(path: Path) -> MetaDataset:
    """The 1,308 published micro runs: one run a row, only the last epoch's score is known.

    Left out: dry runs, runs that never trained, and what three faults of the old harness spoiled.
    Seconds of nodes without an accelerator are left out too. Raises: OSError; SpecError for a
    file of another layout.
    """
    hub = load_hub("timm24")
    space = build_space("quicktune-v1", hub, max_fidelity=EPOCHS)
    kept = [(row, state) for row in _rows(path) if (state := _state(row)) is not None]
    curves = np.full((len(kept), EPOCHS), np.nan, dtype=np.float32)
    seconds = np.full((len(kept), EPOCHS), np.nan, dtype=np.float32)
    for i, (row, state) in enumerate(kept):
        if state == OK:
            curves[i, -1] = float(row["top1"]) / 100
        if row["device"] != "cpu" and row["train_seconds_per_epoch"]:
            spent = float(row["train_seconds_per_epoch"]) + float(
                row["eval_seconds_per_epoch"] or 0
            )
            seconds[i, -1] = spent if math.isfinite(spent) else np.nan
    return MetaDataset(
        space=space,
        configs=tuple(space.canonical(config_of_arguments(row)) for row, _ in kept),
        curves=curves,
        seconds=seconds,
        states=tuple(state for _, state in kept),
        datasets=tuple(row["dataset"] for row, _ in kept),
        metafeatures={row["dataset"]: _metafeatures(row) for row, _ in kept},
        hub=hub,
        source="Quick-Tune meta-data set, micro (Pineda Arango et al., ICLR 2024)",
    )  # fmt: skip


def _state(row: Mapping[str, str]) -> str | None:
    """How a run ended, as a trainer without the old faults would say; None: says nothing."""
    epochs, top1 = int(row["epochs_done"] or 0), row["top1"]
    losses = [row["train_loss"], row["eval_loss"]]
    broken = any(text.lower() == "nan" for text in losses)
    fused = lost_activations(row["model"], stoch_norm=row["stoch_norm"] == "true")
    half_time = row["linear_probing"] == "true" and epochs < EPOCHS
    if fused or half_time or (epochs == 1 and not broken):
        return None
    if epochs == EPOCHS and top1 and not broken:
        return OK
    if row["outcome"] == "OOM":
        return FAILED
    if row["outcome"] == "diverged" or (broken and epochs >= 1):
        return DIVERGED
    return CENSORED if epochs > 1 and row["train_seconds_per_epoch"] else None


def lost_activations(model: str, *, stoch_norm: bool) -> bool:
    """Whether the old harness trained a model without its activations: says nothing of ours."""
    return stoch_norm and model.startswith(FUSED_BATCHNORM)


def trained_epochs(known: int, total: int, *, linear_probing: bool) -> int:
    """Epochs of a finite curve that say something, 0 for a run that says nothing.

    A run with linear probing began by a dry run of one epoch, and its losses were NaN from the
    unfreezing at half time on wherever it did not come to the end.
    """
    if not linear_probing or known >= total:
        return min(known, total)
    return 0 if known == 1 else min(known, total // 2)


def config_of_arguments(row: Mapping[str, str]) -> dict[str, Scalar]:
    """Arguments as text, by the space's names; fillers of inactive ones are dropped."""
    config: dict[str, Scalar] = {name: row[name] for name in PLAIN}
    for name in ("amp", "stoch_norm"):
        config[name] = row[name] == "true"
    config["linear_probing"] = row["linear_probing"] == "true"
    for name in ("clip_grad", "layer_decay"):
        config[name] = row[name] or "none"
    if row["final_batch_size"]:
        config["batch_size"] = _nearest(float(row["final_batch_size"]))
    config |= _augmentation(row) | _optimizer(row) | _schedule(row)
    return config


def _augmentation(row: Mapping[str, str]) -> dict[str, Scalar]:
    if row["auto_augment"]:
        return {"data_augmentation": "auto_augment", "auto_augment": row["auto_augment"]}
    if row["random_augment"] == "true":
        return {
            "data_augmentation": "random_augment",
            "ra_num_ops": row["ra_num_ops"], "ra_magnitude": row["ra_magnitude"],
        }  # fmt: skip
    trivial = row["trivial_augment"] == "true"
    return {"data_augmentation": "trivial_augment" if trivial else "none"}


def _optimizer(row: Mapping[str, str]) -> dict[str, Scalar]:
    if row["opt"] == "momentum":
        return {"momentum": row["momentum"]}
    if row["opt_betas"]:
        first, second = json.loads(row["opt_betas"])
        return {"opt_betas": f"({first:g}, {second:g})"}
    return {}


def _schedule(row: Mapping[str, str]) -> dict[str, Scalar]:
    if row["sched"] in {"step", "multistep"}:
        return {"decay_rate": row["decay_rate"], "decay_epochs": row["decay_epochs"]}
    return {"patience_epochs": row["patience_epochs"]} if row["sched"] == "plateau" else {}


def _nearest(batch: float) -> int:
    """The batch of the space next to one that was halved until it fitted."""
    return int(2 ** min(9, max(1, round(math.log2(max(batch, 1.0))))))

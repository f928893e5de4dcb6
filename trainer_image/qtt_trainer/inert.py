"""Settings that change nothing, so that equal configurations can be merged (20-trainer 3.14).

Pure: judged from the configuration and a few facts about the model and the data.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtt_core.steps import Config
from qtt_trainer.penalties import BSS_MIN_BATCH
from qtt_trainer.schedule import UPSTREAM_MILESTONES


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What decides whether a setting acts.

    `stoch_layers`: layers that StochNorm converted; `batch`: effective logical batch size.
    """

    native: bool
    max_fidelity: int
    backbone_trains: bool
    stoch_layers: int
    batch: int
    dtype: str


def is_on(config: Config, name: str) -> bool:
    """Whether a setting is present and not off."""
    return config.get(name) not in (None, "none", 0, False)


def inert_settings(config: Config, facts: Facts) -> tuple[str, ...]:
    """Names of settings that are on and have no effect, sorted."""
    found = {name for name in _of_freezing(config, facts) if is_on(config, name)}
    if is_on(config, "stoch_norm") and facts.stoch_layers == 0:
        found.add("stoch_norm")
    if is_on(config, "bss_reg") and facts.native and facts.batch < BSS_MIN_BATCH:
        found.add("bss_reg")
    if is_on(config, "amp") and facts.dtype == "fp32":
        found.add("amp")
    return tuple(sorted(found | _of_mixing(config) | _of_schedule(config, facts)))


def _of_freezing(config: Config, facts: Facts) -> set[str]:
    names: set[str] = set()
    if not facts.backbone_trains:
        names |= {"sp_reg", "delta_reg", "bss_reg", "layer_decay", "stoch_norm"}
    if is_on(config, "linear_probing"):
        if not facts.native:
            names.add("pct_to_freeze")
        elif facts.max_fidelity // 2 == 0:
            names.add("linear_probing")
    return names


def _of_mixing(config: Config) -> set[str]:
    strengths = {name for name in ("mixup", "cutmix") if is_on(config, name)}
    if not strengths:
        return {"mixup_prob"} if "mixup_prob" in config else set()
    never = "mixup_prob" in config and not is_on(config, "mixup_prob")
    return strengths if never else set()


def _of_schedule(config: Config, facts: Facts) -> set[str]:
    sched, names = config.get("sched"), set()
    if sched == "plateau" or facts.max_fidelity == 1:
        names |= {name for name in ("warmup_epochs", "warmup_lr") if is_on(config, name)}
    elif not is_on(config, "warmup_epochs") and "warmup_lr" in config:
        names.add("warmup_lr")
    if sched == "multistep":
        names |= {"decay_epochs"} & config.keys()
        if not facts.native and facts.max_fidelity <= UPSTREAM_MILESTONES[0]:
            names |= {"decay_rate"} & config.keys()
    if sched == "step" and int(config.get("decay_epochs") or 0) >= facts.max_fidelity:
        names |= {"decay_epochs", "decay_rate"} & config.keys()
    return names

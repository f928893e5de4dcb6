"""A seeded world of related finetuning tasks: what meta-learning can be measured on.

A world has one search space (13 hyperparameters of mixed kinds, 24 models), and any number of data
sets whose latent properties (difficulty, distance from pretraining, size, domain) decide which
models, learning rates and regularisers work. Metafeatures show those properties with noise. Data
sets of one world are therefore alike enough to learn from and different enough to mislead. Shapes
and shares follow the facts of 10-optimizer 10: the median configuration is near chance, the best
near perfect, seconds span far more than 24 x, a tenth fails. Nothing is fitted to data.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
from ConfigSpace import (
    Categorical,
    ConfigurationSpace,
    EqualsCondition,
    Float,
    InCondition,
    OrdinalHyperparameter,
)
from numpy.typing import NDArray

from qtt_core.space import SearchSpace
from qtt_core.steps import Config, canonical_json
from qtt_core.testing.curves import Curve, measured

MODELS, FAMILIES, LATENT = 24, 8, 4
ADAPTIVE = ("adam", "adamw", "adamp")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What all data sets of one seed share; arrays over models (24, ...)."""

    seed: int
    max_fidelity: int = 50
    steepness: float = 1.0
    """How much choices matter; below 1 more of them are fair."""
    space: SearchSpace = field(init=False)
    quality: NDArray[np.float64] = field(init=False)
    gmacs: NDArray[np.float64] = field(init=False)
    taste: NDArray[np.float64] = field(init=False)
    """(24, LATENT): which data a model is good at."""
    lr_shift: NDArray[np.float64] = field(init=False)
    domains: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 1])
        size = np.sort(rng.uniform(-1, 1, MODELS))
        family = rng.integers(FAMILIES, size=MODELS)
        tastes = rng.normal(0, 0.6, (FAMILIES, LATENT))
        put = object.__setattr__
        put(self, "quality", 0.8 * size + rng.normal(0, 0.45, MODELS))
        put(self, "gmacs", 10 ** (0.75 + 0.95 * size + rng.normal(0, 0.2, MODELS)))
        put(self, "taste", tastes[family] + rng.normal(0, 0.3, (MODELS, LATENT)))
        put(self, "lr_shift", rng.normal(0, 0.35, FAMILIES)[family] - 0.2 * size)
        put(self, "domains", rng.normal(0, 1, (12, LATENT)))
        space = SearchSpace.from_configspace(configspace(), self.max_fidelity, 1)
        put(self, "space", space)

    def task(self, index: int) -> WorldTask:
        """Data set number `index`; any integer, always the same one."""
        return WorldTask(world=self, index=index)


def configspace() -> ConfigurationSpace:
    """13 hyperparameters: floats on a log scale, ordinals with an off, choices, conditions."""
    cs = ConfigurationSpace()
    model = Categorical("model", [f"net_{i:02d}" for i in range(MODELS)], default="net_08")
    opt = Categorical("opt", ["adamw", "sgd", "momentum", "adam", "adamp"], default="adamw")
    momentum = OrdinalHyperparameter("momentum", [0.8, 0.9, 0.95, 0.99], default_value=0.9)
    augmentation = Categorical(
        "data_augmentation", ["none", "trivial_augment", "random_augment", "auto_augment"]
    )
    magnitude = OrdinalHyperparameter("ra_magnitude", [5, 9, 17], default_value=9)
    cs.add(
        model,
        opt,
        momentum,
        augmentation,
        magnitude,
        Float("lr", (1e-5, 1e-1), default=1e-3, log=True),
        OrdinalHyperparameter("batch_size", [4, 8, 16, 32, 64, 128, 256, 512], default_value=32),
        OrdinalHyperparameter("weight_decay", [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        OrdinalHyperparameter("pct_to_freeze", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        OrdinalHyperparameter("drop", [0.0, 0.1, 0.2, 0.3, 0.4]),
        OrdinalHyperparameter("mixup", [0.0, 0.2, 0.4, 1.0, 2.0, 4.0, 8.0]),
        OrdinalHyperparameter("warmup_epochs", [0, 5, 10]),
        Categorical("sched", ["cosine", "step", "plateau", "none"]),
    )
    cs.add(
        EqualsCondition(momentum, opt, "momentum"),
        InCondition(magnitude, augmentation, ["random_augment"]),
    )
    return cs


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldTask:
    """One data set of a world: its curves are a function of (world, index, configuration)."""

    world: World
    index: int
    latent: NDArray[np.float64] = field(init=False)
    n_train: int = field(init=False)
    n_val: int = field(init=False)
    num_classes: int = field(init=False)
    difficulty: float = field(init=False)
    own: NDArray[np.float64] = field(init=False)
    """(16,) how this data set differs from what its latent properties say."""
    _memory: dict[str, Curve] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.world.seed, 2, self.index & 0xFFFFFFFF])
        put = object.__setattr__
        domain = self.world.domains[int(rng.integers(len(self.world.domains)))]
        put(self, "latent", 0.8 * domain + rng.normal(0, 0.5, LATENT))
        put(self, "n_train", round(10 ** rng.uniform(2.6, 4.3)))
        put(self, "n_val", round(10 ** rng.uniform(2.2, 3.3)))
        put(self, "num_classes", round(10 ** rng.uniform(0.7, 2.2)))
        put(self, "difficulty", rng.normal(0, 0.9))
        put(self, "own", rng.normal(0, 1, 16))

    @property
    def name(self) -> str:
        """The data set's key in meta-data."""
        return f"world{self.world.seed}/data{self.index}"

    @property
    def max_fidelity(self) -> int:
        """T."""
        return self.world.max_fidelity

    @property
    def metafeatures(self) -> dict[str, float]:
        """Eight numbers: four exact ones, and four noisy views of what really matters."""
        rng = np.random.default_rng([self.world.seed, 3, self.index & 0xFFFFFFFF])
        noise = rng.normal(0, 0.3, LATENT)
        views = self.latent + noise
        probe = 1 / (1 + math.exp(-(self._ease() - 0.5 + 0.4 * noise[0])))
        return {
            "n_train": float(self.n_train), "n_val": float(self.n_val),
            "num_classes": float(self.num_classes), "landmark_linear": probe,
            "channel_mean": float(views[0]), "channel_sd": float(views[1]),
            "aspect": float(views[2]), "bytes_per_pixel": float(views[3]),
        }  # fmt: skip

    def curve(self, config: Config) -> Curve:
        """The curve of a configuration, always the same one."""
        text = canonical_json(dict(config))
        if text not in self._memory:
            identity = zlib.crc32(text.encode())
            rng = np.random.default_rng([self.world.seed, 4, self.index & 0xFFFFFFFF, identity])
            self._memory[text] = self._draw(config, rng)
        return self._memory[text]

    def seconds(self, config: Config) -> float:
        """Mean seconds of an epoch."""
        compute = 0.4 + self.world.gmacs[self._model(config)] ** 0.75
        share = 0.35 + 0.65 * (1 - float(config["pct_to_freeze"] or 0.0))
        batch = 1 + 6 / float(config["batch_size"] or 1)
        return float(1e-3 * self.n_train * compute * share * batch)

    # --- the landscape -----------------------------------------------------------------------

    def _model(self, config: Config) -> int:
        return int(str(config["model"]).removeprefix("net_"))

    def _ease(self) -> float:
        """Logit that a good model reaches: data, classes, nearness to pretraining."""
        return float(
            1.6
            + 0.5 * math.log10(self.n_train / 2000)
            - 0.7 * math.log10(self.num_classes / 20)
            - 0.5 * self.latent[0]
            - self.difficulty
        )

    def _mismatch(self, config: Config) -> float:
        """Decades between the learning rate and the best one here."""
        best = -3.1 + self.world.lr_shift[self._model(config)] + 0.25 * self.own[0]
        best += 0.15 * self.latent[1] + 0.35 * math.log10(float(config["batch_size"] or 1) / 32)
        if config["opt"] == "sgd":
            best += 1.4
        elif config["opt"] == "momentum":
            best += 0.8 - 0.6 * max(0.0, (float(config.get("momentum") or 0.9) - 0.9) / 0.09)
        best += 0.5 * float(config["pct_to_freeze"] or 0.0)
        return float(math.log10(float(config["lr"] or 1e-5)) - best)

    def _asymptote(self, config: Config, luck: float) -> float:
        model, far = self._model(config), self.latent[0]
        world, own = self.world, self.own
        frozen = float(config["pct_to_freeze"] or 0.0)
        drop, mixup = float(config["drop"] or 0.0), float(config["mixup"] or 0.0)
        decay = float(config["weight_decay"] or 0.0)
        small = 1 - math.log10(self.n_train / 400) / 1.7
        level = 1.1 * world.quality[model] * (1 + 0.3 * own[1])
        level += float(world.taste[model] @ self.latent)
        level -= min(1.3 * self._mismatch(config) ** 2, 8.0 * world.steepness)
        level += frozen * (0.6 * small - 0.9 * far - 0.5 + 0.3 * own[2])
        level -= drop * (3.0 - 2.5 * small + own[3])
        level += math.log2(1 + mixup) * (0.25 * small - 0.25 + 0.1 * own[4])
        level += {"none": -0.3, "trivial_augment": 0.25, "auto_augment": 0.1}.get(
            str(config["data_augmentation"]), 0.05
        ) * (1 + 0.5 * own[5])
        level -= 0.3 * abs(math.log10(max(decay, 1e-6)) + 3 + own[6]) * 0.5
        level += {"sgd": -0.5, "adam": -0.1}.get(str(config["opt"]), 0.1 * own[7])
        level += {"none": -0.4, "plateau": -0.2}.get(str(config["sched"]), 0.0)
        return float(self._ease() + world.steepness * (level + 0.35 * luck))

    def _draw(self, config: Config, rng: np.random.Generator) -> Curve:
        truth = self._truth(config, rng)
        curve = measured(truth, self.n_val, 0.008, self.seconds(config), rng)
        return replace(curve, diverges_at=self._divergence(config, rng))

    def _truth(self, config: Config, rng: np.random.Generator) -> NDArray[np.float64]:
        """Noise-free scores of the epochs 1..T."""
        horizon, chance = self.max_fidelity, 1 / self.num_classes
        epochs = np.arange(1, horizon + 1, dtype=np.float64)
        top = 1 / (1 + math.exp(-self._asymptote(config, float(rng.normal()))))
        updates = math.log10(self.n_train / min(float(config["batch_size"] or 1), self.n_train))
        slowness = (
            0.1
            * horizon
            * math.exp(0.4 * rng.normal() - 0.8 * self._mismatch(config) - 0.9 * (updates - 1.8))
        )
        warm = float(config["warmup_epochs"] or 0) * horizon / 50
        effective = np.maximum(epochs - 0.7 * warm, 0.05)
        rise = 1 - np.exp(-((effective / min(slowness, 6 * horizon)) ** 0.8))
        if config["sched"] in ("cosine", "step"):  # a part of the score comes with the decay
            late = 0.12 if config["sched"] == "cosine" else 0.08
            when = (
                (epochs / horizon) ** 3 if config["sched"] == "cosine" else epochs > 0.6 * horizon
            )
            rise = rise * (1 - late + late * when)
        overfit = max(0.0, 0.08 * rng.normal()) * np.maximum(epochs / horizon - 0.3, 0)
        return np.asarray(np.clip(chance + (1 - chance) * (top * rise - overfit), 0.0, 1.0))

    def _divergence(self, config: Config, rng: np.random.Generator) -> int | None:
        excess = self._mismatch(config) - 1.5
        if rng.random() >= 0.02 + 0.9 / (1 + math.exp(-5 * excess)):
            return None
        return 1 + int(rng.integers(max(1, self.max_fidelity // 3)))

"""Learning rates against closed forms; the same whatever the step boundaries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from qtt_trainer.schedule import (
    Horizon,
    LearningRate,
    effective_warmup,
    native_milestones,
    plateau_factor,
)

T, U, LR = 20, 3, 0.01


def optimizer_of(*scales: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": s} for s in scales]
    return torch.optim.SGD(groups, lr=LR)


def trace(settings: dict[str, Any], *, step: int, native: bool = True) -> list[float]:
    """The rate of every update when the scheduler is rebuilt after each `step` epochs."""
    rates = []
    history = [0.5] * T
    for begin in range(0, T, step):
        optimizer = optimizer_of(1.0, 0.25)
        schedule = LearningRate(
            optimizer, {"lr": LR, **settings}, Horizon(epochs=T, updates_per_epoch=U), native=native
        )
        for epoch in range(begin, min(T, begin + step)):
            schedule.set_epoch(epoch, history[:epoch])
            for batch in range(U):
                schedule.set_update(epoch * U + batch)
                low, high = schedule.span()
                assert low == pytest.approx(0.25 * high)
                rates.append(high)
    return rates


def warm(update: int, warmup: int, start: float) -> float | None:
    if update >= warmup * U:
        return None
    return start + update * (LR - start) / (warmup * U)


def cosine(update: int) -> float:
    return 0.5 * LR * (1 + math.cos(math.pi * update / (T * U)))


CLOSED_FORMS = {
    "cosine": ({"sched": "cosine"}, cosine),
    "none-ran-as-cosine": ({"sched": None}, cosine),
    "cosine-warm": (
        {"sched": "cosine", "warmup_epochs": 5, "warmup_lr": 1e-5},
        lambda u: w if (w := warm(u, 5, 1e-5)) is not None else cosine(u),
    ),
    "step": (
        {"sched": "step", "decay_epochs": 10, "decay_rate": 0.5},
        lambda u: LR * 0.5 ** (u // (10 * U)),
    ),
    "multistep-warm": (
        {"sched": "multistep", "decay_rate": 0.1, "warmup_epochs": 5},
        lambda u: (
            w
            if (w := warm(u, 5, 0.0)) is not None
            else LR * 0.1 ** sum(u >= m * U for m in (12, 17))
        ),
    ),
    "multistep": (
        {"sched": "multistep", "decay_rate": 0.1},
        lambda u: LR * 0.1 ** sum(u >= m * U for m in (12, 17)),
    ),
}


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("name", list(CLOSED_FORMS))
def test_rates_equal_the_closed_form_for_every_step_size(name: str, step: int) -> None:
    settings, expected = CLOSED_FORMS[name]

    assert trace(settings, step=step) == pytest.approx([expected(u) for u in range(T * U)])


@pytest.mark.parametrize("step", [1, 5])
def test_upstream_spaces_change_the_rate_per_epoch_and_start_at_the_warm_up_rate(
    step: int,
) -> None:
    settings = {"sched": "cosine", "warmup_epochs": 5, "warmup_lr": 0}

    rates = trace(settings, step=step, native=False)

    assert rates[:U] == [0.0] * U
    assert rates[U : 2 * U] == pytest.approx([LR / 5] * U)
    expected = [0.5 * LR * (1 + math.cos(math.pi * e / T)) for e in range(5, T) for _ in range(U)]
    assert rates[5 * U :] == pytest.approx(expected)


def test_upstream_milestones_lie_beyond_short_curves() -> None:
    assert set(trace({"sched": "multistep"}, step=5, native=False)) == {LR}


@pytest.mark.parametrize(("epochs", "expected"), [(50, (30, 42)), (10, (6, 8)), (1, (1, 1))])
def test_milestones_are_sixty_and_eightyfive_percent(epochs: int, expected: Any) -> None:
    assert native_milestones(epochs) == expected


def torchs_factor(history: list[float], patience: int, rate: float) -> float:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=rate, patience=patience, threshold=1e-4, eps=0
    )
    for score in history:
        rule.step(score)
    return float(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_torchs_rule_replayed(patience: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    history = torch.rand(25, generator=generator).cummax(0).values.tolist()
    history = [round(score, 2) for score in history]

    for cut in range(26):
        got = plateau_factor(history[:cut], patience=patience, rate=0.1)
        assert got == pytest.approx(torchs_factor(history[:cut], patience, 0.1))


def test_plateau_on_a_curve_that_never_improves_decays_every_patience_plus_one() -> None:
    assert trace({"sched": "plateau", "patience_epochs": 5, "decay_rate": 0.5}, step=1)[
        :: U * 6
    ] == pytest.approx([LR, LR, LR / 2, LR / 4])


@pytest.mark.parametrize(
    ("warmup", "epochs", "sched", "expected"),
    [(5, 20, "cosine", 5), (10, 8, "cosine", 7), (5, 1, "cosine", 0), (5, 20, "plateau", 0)],
)
def test_warm_up_ends_before_the_curve(warmup: int, epochs: int, sched: str, expected: int) -> None:
    assert effective_warmup({"warmup_epochs": warmup, "sched": sched}, epochs) == expected

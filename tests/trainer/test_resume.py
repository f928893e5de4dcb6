"""A curve must not depend on where its jobs were cut: T epochs straight = T jobs of one epoch =
stops at any update = a killed process that runs again. Bit for bit on a CPU."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EPOCHS = 3

COMBINATIONS: dict[str, tuple[str, dict[str, Any], dict[str, bool]]] = {
    "batchnorm-adamw-mixup": (
        "mini_resnet",
        {
            "opt": "adamw", "lr": 1e-3, "batch_size": 8, "weight_decay": 0.01, "sched": "cosine",
            "warmup_epochs": 5, "mixup": 0.4, "mixup_prob": 0.5, "drop": 0.2, "stoch_norm": True,
            "sp_reg": 0.01, "smoothing": 0.1, "clip_grad": 1, "data_augmentation": "none",
        },
        {},
    ),
    "layernorm-momentum-plateau": (
        "mini_convnext",
        {
            "opt": "momentum", "momentum": 0.9, "lr": 5e-3, "batch_size": 16, "sp_reg": 0.1,
            "weight_decay": 1e-3, "sched": "plateau", "patience_epochs": 2, "layer_decay": 0.75,
            "cutmix": 1, "mixup_prob": 0.75, "bss_reg": 1e-3, "pct_to_freeze": 0.2,
            "data_augmentation": "trivial_augment",
        },
        {},
    ),
    "vit-adamp-probe-then-finetune": (
        "mini_vit",
        {
            "opt": "adamp", "opt_betas": "(0.9, 0.99)", "lr": 5e-4, "batch_size": 8,
            "weight_decay": 1e-2, "sched": "step", "decay_epochs": 10, "linear_probing": True,
            "delta_reg": 0.01, "cutmix": 0.5, "mixup": 0.2, "data_augmentation": "random_augment",
        },
        {"ema": True},
    ),
}  # fmt: skip


@pytest.fixture(params=list(COMBINATIONS), ids=list(COMBINATIONS))
def combination(request: pytest.FixtureRequest) -> dict[str, Any]:
    model, settings, flags = COMBINATIONS[request.param]
    return {"model": model, "settings": settings, "flags": flags, "horizon": EPOCHS}


def read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return state


def assert_same(left: Any, right: Any, place: str = "state") -> None:
    """Equal to the last bit, whatever the nesting."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for name in left:
            assert_same(left[name], right[name], f"{place}.{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for number, (mine, theirs) in enumerate(zip(left, right, strict=True)):
            assert_same(mine, theirs, f"{place}[{number}]")
    else:
        assert left == right, place


def assert_same_training(left: dict[str, Any], right: dict[str, Any]) -> None:
    for name in ("state_dict", "state_dict_ema", "optimizer", "epoch", "batch"):
        assert_same(left[name], right[name], name)
    clocks = ("seconds", "train_seconds", "eval_seconds")
    for mine, theirs in zip(left["history"], right["history"], strict=True):
        assert {k: v for k, v in mine.items() if k not in clocks} == {
            k: v for k, v in theirs.items() if k not in clocks
        }


def test_straight_stepwise_stopped_and_killed_curves_are_equal(
    jobs: Any, run_inline: Any, served: Any, combination: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.setenv("QTT_MIN_UNSAVED_SECONDS", "0")
    straight = run_inline(jobs.step(EPOCHS, config_id=1, **combination))
    assert straight.code == 0, straight.message.reason
    reference = read_state(jobs.run / "c1" / f"f{EPOCHS}")
    # Same keys of randomness need the same config_id: the other ways go to other run folders.

    stepwise = other_run(jobs, "stepwise")
    for to in range(1, EPOCHS + 1):
        assert run_inline(stepwise.step(to, start=to - 1, **combination)).code == 0
    assert_same_training(reference, read_state(stepwise.run / "c1" / f"f{EPOCHS}"))

    stopped = other_run(jobs, "stopped")
    rng = np.random.default_rng(len(combination["model"]))
    ends = []
    for attempt in range(12):
        job = stopped.step(EPOCHS, attempt=attempt, **combination)
        ends.append(run_inline(job, stop_after=int(rng.integers(3, 12))).code)
        if ends[-1] == 0:
            break
    assert ends[-1] == 0
    assert 75 in ends, "never stopped: the test shows nothing"
    assert_same_training(reference, read_state(stopped.run / "c1" / f"f{EPOCHS}"))

    killed = other_run(jobs, "killed")
    served.send("step", killed.step(EPOCHS, **combination))
    pid = served.until("started")["pid"]
    served.until("progress")
    os.kill(pid, signal.SIGKILL)
    assert served.until("ended")["signal"] == signal.SIGKILL
    assert served.run("step", killed.step(EPOCHS, **combination))["exit"] == 0
    assert_same_training(reference, read_state(killed.run / "c1" / f"f{EPOCHS}"))


def other_run(jobs: Any, name: str) -> Any:
    """The same data and run uid under another root, prepared alike."""
    maker = type(jobs)(root=jobs.root.with_name(name), data=jobs.data)
    maker.run.mkdir(parents=True)
    (maker.run / "dataset.json").write_bytes((jobs.run / "dataset.json").read_bytes())
    return maker


def test_a_real_sigterm_saves_the_epoch_in_the_middle_and_the_retry_continues(
    jobs: Any, served: Any, run_inline: Any
) -> None:
    straight = run_inline(jobs.step(25, horizon=25))
    reference = read_state(jobs.run / "c1" / "f25")
    again = other_run(jobs, "again")
    served.send("step", again.step(25, horizon=25))
    pid = served.until("started")["pid"]
    while served.until("progress")["epoch"] < 3:
        pass

    os.kill(pid, signal.SIGTERM)
    ended = served.until("ended")

    assert ended["exit"] == 75
    assert '"state":"preempted"' in ended["message"]
    assert len(list((again.run / "c1" / "f25.part").iterdir())) == 1
    assert served.run("step", again.step(25, horizon=25, attempt=1))["exit"] == 0
    assert not (again.run / "c1" / "f25.part").exists()
    assert_same_training(reference, read_state(again.run / "c1" / "f25"))
    assert len(straight.message.epochs) == 25


def test_the_worker_count_may_change_between_two_steps(jobs: Any, served: Any) -> None:
    settings = {
        "opt": "adamw", "lr": 1e-3, "batch_size": 8, "drop": 0.4, "mixup": 0.4, "stoch_norm": True,
    }  # fmt: skip
    assert served.run("step", jobs.step(2, settings=settings))["exit"] == 0
    again = other_run(jobs, "workers")
    first = again.step(1, settings=settings, limits={"workers": 2})
    second = again.step(2, start=1, settings=settings, limits={"workers": 0})
    assert served.run("step", first)["exit"] == 0
    assert served.run("step", second)["exit"] == 0
    assert_same_training(read_state(jobs.run / "c1" / "f2"), read_state(again.run / "c1" / "f2"))


def test_every_epoch_sees_other_permutations_whatever_the_cuts(jobs: Any, run_inline: Any) -> None:
    """A tool that reseeds at each process start trains every epoch on the same batches."""
    losses = []
    for to in (1, 2, 3):
        job = jobs.step(to, start=to - 1, settings={"opt": "sgd", "lr": 1e-5, "batch_size": 8})
        losses.append(run_inline(job).result["curve"][-1]["train_loss"])

    assert len(set(losses)) == 3

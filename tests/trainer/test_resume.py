"""A curve must not depend on where its jobs were cut: T epochs straight = T jobs of one epoch =
stops at any update = a killed process that runs again. Bit for bit on a CPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtt_core.hub import load_hub
from qtt_core.space import check_values

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
    seed = len(combination["model"])

    assert_every_way_ends_alike(jobs, run_inline, served, combination, seed)


def assert_every_way_ends_alike(
    jobs: Any, run_inline: Any, serve: Any, combination: dict[str, Any], seed: int
) -> None:
    """T epochs in one job are the reference for all other ways to the same epoch."""
    rng = np.random.default_rng(seed)
    straight = run_inline(jobs.step(EPOCHS, config_id=1, **combination))
    assert straight.code == 0, straight.message.reason
    reference = read_state(jobs.run / "c1" / f"f{EPOCHS}")
    # Same keys of randomness need the same config_id: the other ways go to other run folders.

    stepwise = other_run(jobs, "stepwise")
    for to in range(1, EPOCHS + 1):
        assert run_inline(stepwise.step(to, start=to - 1, **combination)).code == 0
    assert_same_training(reference, read_state(stepwise.run / "c1" / f"f{EPOCHS}"))

    stopped = other_run(jobs, "stopped")
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
    kill_after_progress(serve, killed.step(EPOCHS, **combination), 1)
    assert serve.run("step", killed.step(EPOCHS, **combination))["exit"] == 0
    assert_same_training(reference, read_state(killed.run / "c1" / f"f{EPOCHS}"))


def kill_after_progress(serve: Any, job: Any, count: int, number: int = signal.SIGKILL) -> Any:
    """Signal the job's process when it has told its progress so often; returns how it ended."""
    serve.send("step", job)
    pid = serve.until("started")["pid"]
    for _ in range(count):
        if (event := serve.event())["event"] != "progress":
            return event
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    ended = serve.until("ended")
    assert number != signal.SIGKILL or ended["signal"] == number or ended["exit"] == 0
    return ended


# --- many combinations ----------------------------------------------------------------------------

FACTORS: dict[str, list[dict[str, Any]]] = {
    "model": [{"model": name} for name in load_hub("tiny").names],
    "opt": [
        {"opt": "sgd", "lr": 1e-2},
        {"opt": "momentum", "momentum": 0.95, "lr": 5e-3},
        {"opt": "adam", "opt_betas": "(0.9, 0.99)", "lr": 1e-3},
        {"opt": "adamw", "weight_decay": 1e-2, "lr": 1e-3},
        {"opt": "adamp", "weight_decay": 1e-3, "lr": 1e-3},
    ],
    "sched": [
        {"sched": "cosine", "warmup_epochs": 5, "warmup_lr": 1e-5},
        {"sched": "step", "decay_epochs": 10, "decay_rate": 0.5},
        {"sched": "multistep", "decay_rate": 0.1},
        {"sched": "plateau", "patience_epochs": 2, "decay_rate": 0.5},
    ],
    "augmentation": [
        {"data_augmentation": "none"},
        {"data_augmentation": "trivial_augment"},
        {"data_augmentation": "random_augment", "ra_num_ops": 3, "ra_magnitude": 17},
        {"data_augmentation": "auto_augment", "auto_augment": "original"},
    ],
    "mixing": [
        {},
        {"mixup": 0.4, "mixup_prob": 0.5, "smoothing": 0.1},
        {"cutmix": 1, "mixup_prob": 0.75},
        {"mixup": 0.2, "cutmix": 0.5},
    ],
    "regulariser": [
        {},
        {"sp_reg": 0.1, "layer_decay": 0.75},
        {"delta_reg": 0.01},
        {"bss_reg": 1e-3, "pct_to_freeze": 0.4},
        {"cotuning_reg": 1, "clip_grad": 1},
        {"linear_probing": True, "sp_reg": 0.01},
    ],
    "drop": [{"drop": 0.0}, {"drop": 0.3}],
    "stoch_norm": [{"stoch_norm": False}, {"stoch_norm": True}],
    "batch": [{"batch_size": 8}, {"batch_size": 2}, {"batch_size": 16}],
    "workers": [{"workers": 0}, {"workers": 2}],
    "ema": [{"ema": False}, {"ema": True}],
}
COUNT = 48


def combinations(count: int = COUNT) -> list[dict[str, Any]]:
    """`count` combinations; each level of a factor comes equally often, paired at random."""
    rng = np.random.default_rng(42)
    columns = [
        rng.permutation([levels[i % len(levels)] for i in range(count)])
        for levels in FACTORS.values()
    ]
    return [
        {name: value for part in row for name, value in part.items()}
        for row in zip(*columns, strict=True)
    ]


def test_the_combinations_differ_and_hold_every_level() -> None:
    found = combinations()

    assert len({json.dumps(one, sort_keys=True) for one in found}) == COUNT >= 40
    for levels in FACTORS.values():
        assert all(any(one.items() >= level.items() for one in found) for level in levels)
    for one in found:
        settings = {name: value for name, value in one.items() if name not in {"workers", "ema"}}
        check_values("native", settings)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(COUNT))
def test_every_combination_ends_alike_whatever_its_cuts(
    jobs: Any, run_inline: Any, saving: Any, number: int, monkeypatch: Any
) -> None:
    """Besides the four ways of above: kills and signals at random places, over parts of an epoch
    that are saved after each update, so that a kill also hits the writing."""
    monkeypatch.setenv("QTT_MIN_UNSAVED_SECONDS", "0")
    settings = combinations()[number]
    model, workers, ema = (settings.pop(name) for name in ("model", "workers", "ema"))
    combination = {
        "model": model, "settings": settings, "horizon": EPOCHS, "flags": {"ema": ema},
        "limits": {"workers": workers},
    }  # fmt: skip
    rng = np.random.default_rng(number)
    assert_every_way_ends_alike(jobs, run_inline, saving, combination, number)

    reference = read_state(jobs.run / "c1" / f"f{EPOCHS}")
    battered = other_run(jobs, "battered")
    for attempt in range(4):
        job = battered.step(EPOCHS, attempt=attempt, nonce=f"n{attempt}", **combination)
        how = signal.SIGKILL if attempt % 2 else signal.SIGTERM
        if kill_after_progress(saving, job, int(rng.integers(0, 3)), how).get("exit") == 0:
            break
    last = battered.step(EPOCHS, attempt=9, nonce="n9", **combination)
    assert saving.run("step", last)["exit"] == 0
    assert_same_training(reference, read_state(battered.run / "c1" / f"f{EPOCHS}"))


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


def test_an_epoch_that_only_lacked_its_evaluation_tells_the_rate_it_was_trained_with(
    jobs: Any, run_inline: Any, monkeypatch: Any
) -> None:
    """No update follows there, so nothing but the resume itself can set the rate."""
    monkeypatch.setenv("QTT_MIN_UNSAVED_SECONDS", "0")
    settings = {"opt": "adamw", "lr": 1e-3, "batch_size": 8, "sched": "cosine"}
    straight = run_inline(jobs.step(3, settings=settings, horizon=3))
    reference = read_state(jobs.run / "c1" / "f3")
    stopped = other_run(jobs, "stopped")
    positions = []
    for attempt in range(40):  # one look further each time, until the last one is in time
        job = stopped.step(3, settings=settings, horizon=3, attempt=attempt)
        if run_inline(job, stop_after=attempt).code == 0:
            break
        parts = (stopped.run / "c1" / "f3.part").glob("*/manifest.json")
        positions += [(m["epoch"], m["batch"]) for m in map(json.loads, map(Path.read_text, parts))]

    again = json.loads((stopped.run / "c1" / "f3" / "result.json").read_text())
    assert any(batch == 3 for _, batch in positions), "never stopped before an evaluation"
    rates = [row["lr"] for row in straight.result["curve"]]
    assert [row["lr"] for row in again["curve"]] == rates
    assert len(set(rates)) == 3
    assert_same_training(reference, read_state(stopped.run / "c1" / "f3"))


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

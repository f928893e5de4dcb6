"""Whole steps in this process: what trains, what is accumulated, what diverges, what is inert."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qtt_core.results import State
from qtt_trainer import loop, report
from qtt_trainer.session import batching


def weights(jobs: Any, config_id: int, to: int) -> dict[str, torch.Tensor]:
    folder = jobs.run / f"c{config_id}" / f"f{to}"
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    tensors: dict[str, torch.Tensor] = state["state_dict"]
    return tensors


@pytest.mark.parametrize(
    ("wanted", "n", "native", "expected"),
    [
        (8, 24, True, (8, 3)),
        (8, 26, True, (8, 4)),
        (8, 25, True, (8, 3)),
        (8, 26, False, (8, 3)),
        (512, 24, True, (24, 1)),
        (512, 25, False, (25, 1)),
        (2, 3, True, (2, 1)),
    ],
)
def test_no_batch_is_larger_than_the_data_or_has_one_image(
    wanted: int, n: int, native: bool, expected: tuple[int, int]
) -> None:
    assert batching(wanted, n, native=native) == expected


@pytest.mark.parametrize(("batch", "largest"), [(24, 23), (9, 4), (9, 2), (8, 8), (5, 3), (2, 1)])
def test_a_micro_batch_has_two_images_at_least(batch: int, largest: int) -> None:
    parts = torch.zeros(batch).tensor_split(loop.micro_batches(batch, largest))

    sizes = [len(part) for part in parts]

    assert min(sizes) >= 2
    assert max(sizes) <= max(largest, 3)
    assert loop.micro_batches(1, 1) == 1


def test_batchnorm_never_sees_a_single_image(jobs: Any, run_inline: Any) -> None:
    """24 images in micro-batches of 23: the last feature map of a 32-pixel image is one pixel."""
    settings = {"opt": "sgd", "lr": 1e-2, "batch_size": 32}

    ended = run_inline(jobs.step(1, settings=settings, limits={"micro_batch": 23}))

    assert ended.code == 0, ended.message.reason
    assert ended.message.micro_batch == 23


def test_images_per_second_count_the_images_there_are(jobs: Any, run_inline: Any) -> None:
    ended = run_inline(jobs.step(1, settings={"opt": "sgd", "lr": 1e-2, "batch_size": 16}))

    seconds = ended.result["curve"][0]["train_seconds"]
    assert ended.result["images_per_second"] == pytest.approx(24 / seconds)


@pytest.mark.parametrize("micro", [8, 4, 2])
def test_micro_batches_give_the_update_of_the_whole_batch(
    jobs: Any, run_inline: Any, micro: int
) -> None:
    settings = {
        "opt": "momentum", "lr": 0.01, "batch_size": 8, "mixup": 0.4, "clip_grad": 1,
        "sp_reg": 0.1, "delta_reg": 0.1, "weight_decay": 0.01,
    }  # fmt: skip
    whole = run_inline(jobs.step(1, model="mini_convnext", settings=settings))
    reference = weights(jobs, 1, 1)
    torch.testing.assert_close(reference, reference)
    (jobs.run / "c1").rename(jobs.run / "whole")

    job = jobs.step(1, model="mini_convnext", settings=settings, limits={"micro_batch": micro})
    split = run_inline(job)

    assert split.message.micro_batch == micro
    assert split.message.effective_batch == 8
    got = weights(jobs, 1, 1)
    for name, value in reference.items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=1e-4, msg=name)
    assert split.message.epochs[0].value == whole.message.epochs[0].value


STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sp": ("mini_resnet", {"sp_reg": 0.1}),
    "sp-coupled": ("mini_resnet", {"sp_reg": 0.1, "opt": "momentum"}),
    "delta": ("mini_resnet", {"delta_reg": 0.1}),
    "delta-vit": ("mini_vit", {"delta_reg": 0.1}),
    "delta-efficientnet": ("mini_efficientnet", {"delta_reg": 0.1}),
    "bss": ("mini_convnext", {"bss_reg": 0.1}),
    "cotuning": ("mini_resnet", {"cotuning_reg": 1}),
    "cotuning-mixup": ("mini_byobnet", {"cotuning_reg": 1, "mixup": 0.4}),
    "stoch_norm": ("mini_efficientnet", {"stoch_norm": True}),
    "layer_decay": ("mini_vit", {"layer_decay": 0.65}),
    "freeze": ("mini_convnext", {"pct_to_freeze": 0.6}),
    "probe": ("mini_resnet", {"linear_probing": True}),
    "mixup": ("mini_resnet", {"mixup": 1}),
    "cutmix": ("mini_resnet", {"cutmix": 1}),
    "drop": ("mini_resnet", {"drop": 0.4}),
    "smoothing": ("mini_resnet", {"smoothing": 0.1}),
    "clip": ("mini_resnet", {"clip_grad": 1}),
    "randaugment": ("mini_resnet", {"data_augmentation": "random_augment", "ra_num_ops": 3}),
    "autoaugment": ("mini_resnet", {"data_augmentation": "auto_augment", "auto_augment": "v0"}),
}


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_changes_the_training_it_is_switched_on_for(
    jobs: Any, run_inline: Any, name: str
) -> None:
    """A switch that is read and then dropped would give the plain run's weights."""
    model, extra = STRATEGIES[name]
    plain = {"opt": "adamw", "lr": 1e-3, "batch_size": 8, "data_augmentation": "none"}
    if "opt" in extra:
        plain["opt"] = extra["opt"]
    assert run_inline(jobs.step(1, model=model, settings=plain)).code == 0
    reference = weights(jobs, 1, 1)
    (jobs.run / "c1").rename(jobs.run / "plain")

    ended = run_inline(jobs.step(1, model=model, settings=plain | extra))

    assert ended.code == 0, ended.message.reason
    assert ended.message.inert == ()
    got = weights(jobs, 1, 1)
    assert got.keys() == reference.keys()
    assert any(not torch.equal(got[key], reference[key]) for key in got)


def test_off_is_off_whatever_its_spelling(jobs: Any, run_inline: Any) -> None:
    """A tool that passed 0 on scaled every gradient, or the backbone's rate, to nothing."""
    plain = {"opt": "adamw", "lr": 1e-3, "batch_size": 8}
    off = {
        "clip_grad": "none", "layer_decay": "none", "mixup": 0, "cutmix": 0, "drop": 0,
        "smoothing": 0, "sp_reg": 0, "delta_reg": 0, "bss_reg": 0, "cotuning_reg": 0,
        "stoch_norm": False, "linear_probing": False, "pct_to_freeze": 0,
    }  # fmt: skip
    run_inline(jobs.step(1, settings=plain))
    reference = weights(jobs, 1, 1)
    (jobs.run / "c1").rename(jobs.run / "plain")

    assert run_inline(jobs.step(1, settings=plain | off)).code == 0

    got = weights(jobs, 1, 1)
    assert all(torch.equal(got[key], reference[key]) for key in reference)


@pytest.mark.parametrize(
    ("settings", "inert"),
    [
        ({"pct_to_freeze": 1, "sp_reg": 0.1, "bss_reg": 0.1}, ("bss_reg", "sp_reg")),
        ({"mixup": 0.4, "mixup_prob": 0}, ("mixup",)),
        ({"batch_size": 4, "bss_reg": 0.1}, ("bss_reg",)),
        ({"amp": True}, ("amp",)),
    ],
)
def test_settings_without_effect_are_reported_and_change_nothing(
    jobs: Any, run_inline: Any, settings: dict[str, Any], inert: tuple[str, ...]
) -> None:
    plain = {"opt": "adamw", "lr": 1e-3, "batch_size": 8}
    ended = run_inline(jobs.step(1, settings=plain | settings))
    got = weights(jobs, 1, 1)
    (jobs.run / "c1").rename(jobs.run / "with")

    without = {k: v for k, v in (plain | settings).items() if k not in inert}
    run_inline(jobs.step(1, settings=without))

    assert ended.message.inert == inert
    assert all(torch.equal(v, got[k]) for k, v in weights(jobs, 1, 1).items())


def test_stochastic_normalisation_is_inert_without_batchnorm(jobs: Any, run_inline: Any) -> None:
    settings = {"opt": "adamw", "lr": 1e-3, "batch_size": 8, "stoch_norm": True}

    ended = run_inline(jobs.step(1, model="mini_convnext", settings=settings))

    assert ended.message.inert == ("stoch_norm",)


def test_probing_then_finetuning_leaves_the_backbone_alone_until_half(
    jobs: Any, run_inline: Any
) -> None:
    settings = {"opt": "adamw", "lr": 1e-3, "batch_size": 8, "linear_probing": True}
    for to in (1, 2, 3):
        run_inline(jobs.step(to, start=to - 1, settings=settings, horizon=4))

    first, second, third = (weights(jobs, 1, to) for to in (1, 2, 3))
    backbone = [name for name in first if not name.startswith("fc.")]
    assert all(torch.equal(first[n], second[n]) for n in backbone)
    assert not torch.equal(first["fc.weight"], second["fc.weight"])
    assert any(not torch.equal(second[n], third[n]) for n in backbone)


def test_a_job_that_diverges_commits_the_curve_before_it(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_inline(jobs.step(2)).code == 0
    original = loop.soft_cross_entropy
    calls = iter(range(1000))

    def poisoned(*args: Any) -> torch.Tensor:
        return original(*args) * (float("nan") if next(calls) >= 4 else 1.0)

    monkeypatch.setattr(loop, "soft_cross_entropy", poisoned)
    ended = run_inline(jobs.step(4, start=2))

    assert ended.code == 0
    assert ended.message.state is State.DIVERGED
    assert [e.epoch for e in ended.message.epochs] == [3]
    assert ended.result["score"] == 0.0
    assert ended.result["fidelity"] == 4
    monkeypatch.undo()
    again = run_inline(jobs.step(4, start=2, attempt=1, nonce="n1"))
    assert again.message.cached
    assert again.message.epochs == ended.message.epochs


def test_a_loss_that_is_nan_for_an_update_is_no_bug_of_ours(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress is JSON, which has no NaN: telling it must not end the job."""
    original = loop.soft_cross_entropy
    calls = iter(range(1000))

    def poisoned(*args: Any) -> torch.Tensor:
        return original(*args) * (float("nan") if next(calls) == 3 else 1.0)

    monkeypatch.setattr(loop, "soft_cross_entropy", poisoned)
    monkeypatch.setattr(loop, "READ_EVERY", 4)
    monkeypatch.setattr(report, "PROGRESS_SECONDS", 0.0)
    settings = {"opt": "adamw", "lr": 1e-3, "batch_size": 2}

    ended = run_inline(jobs.step(1, settings=settings))

    assert (ended.code, ended.message.state) == (0, State.DIVERGED), ended.message.reason


def test_finite_losses_whose_sum_is_not_finite_are_a_divergence(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.soft_cross_entropy
    monkeypatch.setattr(loop, "soft_cross_entropy", lambda *args: original(*args) + 3e38)

    ended = run_inline(jobs.step(1))

    assert (ended.code, ended.message.state) == (0, State.DIVERGED), ended.message.reason


def test_a_rate_that_explodes_diverges_by_itself(jobs: Any, run_inline: Any) -> None:
    settings = {"opt": "sgd", "lr": 1e-2, "batch_size": 2, "sp_reg": 1e-1}
    job = jobs.step(4, settings=settings | {"lr": 1e8}, space_id="custom")

    ended = run_inline(job)

    assert ended.message.state is State.DIVERGED, ended.message
    assert ended.code == 0
    assert ended.message.epochs == ()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("pretended"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "cublas"],
)
def test_memory_that_runs_out_halves_the_micro_batch_and_redoes_the_update(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    settings = {"opt": "sgd", "lr": 1e-2, "batch_size": 8}
    run_inline(jobs.step(1, model="mini_convnext", settings=settings))
    reference = weights(jobs, 1, 1)
    (jobs.run / "c1").rename(jobs.run / "plain")
    original = loop.soft_cross_entropy

    def hungry(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        if len(logits) > 2:
            raise error
        return original(logits, *args)

    monkeypatch.setattr(loop, "soft_cross_entropy", hungry)
    ended = run_inline(jobs.step(1, model="mini_convnext", settings=settings))

    assert ended.message.micro_batch == 2
    for name, value in weights(jobs, 1, 1).items():
        torch.testing.assert_close(value, reference[name], atol=1e-5, rtol=1e-4)


def test_memory_that_never_suffices_is_a_fact_about_the_configuration(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(loop, "soft_cross_entropy", starved)
    ended = run_inline(jobs.step(1))

    assert (ended.code, ended.message.state) == (0, State.OOM)
    assert not (jobs.run / "c1" / "f1").exists()


def test_the_average_of_the_weights_is_scored_when_it_is_switched_on(
    jobs: Any, run_inline: Any
) -> None:
    plain = run_inline(jobs.step(1))
    (jobs.run / "c1").rename(jobs.run / "plain")

    averaged = run_inline(jobs.step(1, flags={"ema": True}))

    assert averaged.code == 0
    ours, theirs = averaged.result["curve"][0], plain.result["curve"][0]
    assert ours["train_loss"] == theirs["train_loss"]
    assert ours["log_loss"] != theirs["log_loss"]


def test_finetuning_beats_training_from_scratch_by_using_the_weights(
    jobs: Any, run_inline: Any
) -> None:
    settings = {"opt": "adamw", "lr": 1e-3, "batch_size": 8, "data_augmentation": "none"}

    ended = run_inline(jobs.step(2, settings=settings, horizon=2))

    assert ended.message.epochs[-1].value >= 0.75


def test_every_update_draws_its_own_noise_and_always_the_same(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key per (epoch, update): a key per epoch alone would mix every batch alike."""
    original = loop.mix
    drawn: list[tuple[float, float]] = []

    def spied(images: torch.Tensor, labels: torch.Tensor, targets: Any) -> Any:
        numpy_state = np.random.get_state()  # the generator that timm draws from
        drawn.append((float(np.random.rand()), 0.0))
        np.random.set_state(numpy_state)
        return original(images, labels, targets)

    forward = loop.soft_cross_entropy

    def noise(*args: Any) -> torch.Tensor:
        state = torch.get_rng_state()
        drawn[-1] = (drawn[-1][0], float(torch.rand(())))
        torch.set_rng_state(state)
        return forward(*args)

    monkeypatch.setattr(loop, "mix", spied)
    monkeypatch.setattr(loop, "soft_cross_entropy", noise)
    run_inline(jobs.step(2))
    first, drawn[:] = list(drawn), []
    (jobs.run / "c1").rename(jobs.run / "first")
    # Workers draw the images elsewhere: the main process's generators are then seeded by us alone.
    run_inline(jobs.step(2, limits={"workers": 1}))

    assert len(first) == 6
    assert len({a for a, _ in first}) == len({b for _, b in first}) == 6
    assert drawn == first

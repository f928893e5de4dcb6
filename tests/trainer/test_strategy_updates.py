"""What a setting adds to an update, to the last term: the loop's step against plain autograd.

Plain gradient descent makes an update readable: w - lr * gradient. Each test trains one or two
updates through the trainer's own session and loop, computes the same update by the formula of the
paper on a copy of the model, and demands equality; what the setting must not touch is compared too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from one_epoch import Tensors, Trained, train_one_epoch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional

from qtt_trainer import work
from qtt_trainer.keys import key, key32
from qtt_trainer.session import EMA_DECAY

LR = 0.1
SEED, CONFIG = 3, 1
ONE, TWO = {"batch_size": 24}, {"batch_size": 12}
"""Updates in the epoch of 24 images."""
PLAIN = {"opt": "sgd", "lr": LR, "data_augmentation": "none", "sched": "cosine"}
TRANSFORMER, RESNET = "mini_vit", "mini_resnet"

Train = Callable[..., Trained]


@pytest.fixture
def train(jobs: Any) -> Train:
    """`train(settings, model, space)`: one epoch of plain gradient descent and what is added."""

    def run(
        settings: Mapping[str, Any],
        model: str = TRANSFORMER,
        space: str = "native",
        **fields: Any,
    ) -> Trained:
        return train_one_epoch(jobs, {**PLAIN, **settings}, model=model, space=space, **fields)

    return run


def at(run: Trained, state: Tensors) -> nn.Module:
    """A copy of the model with these tensors, as the loop trains it."""
    model = copy.deepcopy(run.before)
    model.load_state_dict(state)
    return model.train()


def gradient(model: nn.Module, loss: torch.Tensor) -> Tensors:
    """d loss / d parameter by name; zeros where the loss does not depend on one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, found, strict=True)
    }


def assert_update(
    new: Tensors, old: Tensors, direction: Tensors, rate: float, *, rtol: float = 1e-3
) -> None:
    """new = old - rate * direction, within rounding of the largest part."""
    for name, slope in direction.items():
        moved = old[name] - new[name]
        tolerance = rtol * rate * float(slope.abs().max()) + 1e-7
        torch.testing.assert_close(moved, rate * slope, atol=tolerance, rtol=rtol, msg=name)


def rates(run: Trained) -> list[float]:
    """Cosine over four epochs, by its formula."""
    per_epoch = len(run.states)
    return [
        LR * 0.5 * (1 + np.cos(np.pi * update / (4 * per_epoch))) for update in range(per_epoch)
    ]


def cross_entropy(run: Trained, model: nn.Module, number: int = 0) -> torch.Tensor:
    images, labels = run.batches[number]
    return functional.cross_entropy(model(images), labels)


def pre_logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    features: torch.Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return features


# --- the loss and the optimizer -------------------------------------------------------------------


@pytest.mark.parametrize("name", [TRANSFORMER, RESNET, "mini_convnext", "mini_efficientnet"])
def test_an_update_is_minus_the_rate_times_the_gradient_of_the_cross_entropy(
    train: Train, name: str
) -> None:
    run = train(TWO, name)

    first, second = rates(run)
    model = at(run, run.start)
    assert_update(run.states[0], run.start, gradient(model, cross_entropy(run, model)), first)
    model = at(run, run.states[0])
    assert_update(
        run.states[1], run.states[0], gradient(model, cross_entropy(run, model, 1)), second
    )


def test_label_smoothing_is_torchs(train: Train) -> None:
    run = train({**ONE, "smoothing": 0.1})

    model = at(run, run.start)
    images, labels = run.batches[0]
    loss = functional.cross_entropy(model(images), labels, label_smoothing=0.1)
    assert_update(run.states[0], run.start, gradient(model, loss), LR)


def test_class_weights_weigh_each_images_term(train: Train) -> None:
    run = train(ONE, task={"loss": {"class_weights": {"0": 3}}})

    model = at(run, run.start)
    images, labels = run.batches[0]
    weight = torch.tensor([3.0, 1.0, 1.0]) * 3 / 5  # eight images a class: mean 1 over the images
    terms = functional.cross_entropy(model(images), labels, reduction="none") * weight[labels]
    assert_update(run.states[0], run.start, gradient(model, terms.mean()), LR)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_the_cross_entropy_against_both_labels(train: Train, alpha: float) -> None:
    """lambda ~ Beta(alpha, alpha), partner = the batch reversed (arXiv 1710.09412, eq. 1)."""
    run = train({**ONE, "mixup": alpha, "mixup_prob": 1})

    np.random.seed(key32(SEED, CONFIG, "step", 0, 0))
    np.random.rand()  # whether this batch is mixed at all
    share = np.random.beta(alpha, alpha)
    images, labels = run.batches[0]
    model = at(run, run.start)
    logits = model(share * images + (1 - share) * images.flip(0))
    loss = share * functional.cross_entropy(logits, labels)
    loss = loss + (1 - share) * functional.cross_entropy(logits, labels.flip(0))
    assert_update(run.states[0], run.start, gradient(model, loss), LR)


def test_dropout_zeroes_and_rescales_the_classifiers_input(train: Train) -> None:
    run = train({**ONE, "drop": 0.4})

    images, labels = run.batches[0]
    model = at(run, run.start)
    whole = pre_logits(at(run, run.start).eval(), images)
    torch.manual_seed(key(SEED, CONFIG, "step", 0, 0))
    dropped = pre_logits(model, images)
    kept = dropped != 0
    assert float(kept.float().mean()) == pytest.approx(0.6, abs=0.05)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.6)
    torch.manual_seed(key(SEED, CONFIG, "step", 0, 0))
    loss = functional.cross_entropy(model(images), labels)
    assert_update(run.states[0], run.start, gradient(model, loss), LR)


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_clipping_shortens_the_whole_gradient_to_its_limit_and_keeps_its_direction(
    train: Train, limit: float
) -> None:
    run = train({**ONE, "clip_grad": limit})

    model = at(run, run.start)
    slope = gradient(model, cross_entropy(run, model))
    norm = float(torch.stack([g.square().sum() for g in slope.values()]).sum().sqrt())
    shorter = {name: g * min(1.0, limit / norm) for name, g in slope.items()}
    assert (limit < norm) is (limit == 0.01)
    assert_update(run.states[0], run.start, shorter, LR)


def test_weight_decay_pulls_matrices_to_zero_and_leaves_vectors_alone(train: Train) -> None:
    plain, decayed = train(ONE), train({**ONE, "weight_decay": 0.05})

    exempt = plain.before.no_weight_decay()  # type: ignore[operator]
    for name, w in plain.start.items():
        pulled = w.ndim > 1 and name not in exempt
        expected = plain.states[0][name] - (LR * 0.05 * w if pulled else 0)
        torch.testing.assert_close(decayed.states[0][name], expected, msg=name)
    assert exempt


@pytest.mark.parametrize("decay", [0.65, 0.1])
def test_layer_decay_scales_each_layers_update_and_nothing_else(train: Train, decay: float) -> None:
    plain, decayed = train(ONE), train({**ONE, "layer_decay": decay})

    theirs = param_groups_layer_decay(plain.before, layer_decay=decay)
    scale = {id(p): g["lr_scale"] for g in theirs for p in g["params"]}
    for name, parameter in plain.before.named_parameters():
        factor = max(1e-3, scale[id(parameter)])  # the native space's least
        moved = plain.states[0][name] - plain.start[name]
        got = decayed.states[0][name] - decayed.start[name]
        torch.testing.assert_close(got, factor * moved, atol=1e-7, rtol=1e-3, msg=name)
    assert decayed.start.keys() == plain.start.keys()


# --- what is frozen -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("name", [TRANSFORMER, RESNET])
def test_freezing_stops_the_first_layers_and_changes_no_other_gradient(
    train: Train, name: str, share: float
) -> None:
    run = train({**ONE, "pct_to_freeze": share}, name)

    head = run.prefixes()
    groups = group_parameters(run.before, run.before.group_matcher(coarse=False))  # type: ignore[operator]
    ordered = [[n for n in names if not n.startswith(head)] for _, names in sorted(groups.items())]
    ordered = [names for names in ordered if names]
    count = sum((i + 1) / len(ordered) <= share for i in range(len(ordered)))
    frozen = {n for names in ordered[:count] for n in names}
    moved = {n for n, p in run.start.items() if not torch.equal(p, run.states[0][n])}
    parameters = {n for n, _ in run.before.named_parameters()}
    assert not moved & frozen
    model = at(run, run.start)
    for module_name, module in model.named_modules():
        own = {f"{module_name}.{n}" for n, _ in module.named_parameters(recurse=False)}
        if own and own <= frozen:
            module.eval()  # BatchNorm of a frozen layer keeps its statistics
            buffers = {f"{module_name}.{n}" for n, _ in module.named_buffers(recurse=False)}
            assert not moved & buffers
    slope = gradient(model, cross_entropy(run, model))
    trained = {n: g for n, g in slope.items() if n in parameters - frozen}
    assert_update(run.states[0], run.start, trained, LR)


def test_probing_trains_the_head_alone_and_as_without_probing(train: Train) -> None:
    plain, probed = train(ONE), train({**ONE, "linear_probing": True})

    head = plain.prefixes()
    for name, w in plain.start.items():
        expected = plain.states[0][name] if name.startswith(head) else w
        torch.testing.assert_close(probed.states[0][name], expected, msg=name)


# --- regularisers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "factor"), [("native", 1.0), ("qtt-compat", 2.0)], ids=["native", "compat"]
)
@pytest.mark.parametrize("name", [TRANSFORMER, RESNET])
def test_l2_sp_pulls_the_backbone_to_its_pretrained_weights(
    train: Train, name: str, space: str, factor: float
) -> None:
    """The first update begins at w0 and must be the plain one; the second is pulled back.

    Coupled: alpha/2 |w - w0|^2 in the native space, alpha |w - w0|^2 in the published tool's.
    """
    settings = {**TWO, "opt": "momentum", "momentum": 0.0}
    plain = train(settings, name, space)
    pulled = train({**settings, "sp_reg": 0.1}, name, space)

    for key_, value in plain.states[0].items():
        torch.testing.assert_close(pulled.states[0][key_], value, msg=key_)
    rate = rates(plain)[1] if space == "native" else LR
    for key_, w in plain.states[1].items():
        away = plain.states[0][key_] - plain.start[key_]
        trains = key_ in dict(plain.before.named_parameters())
        backbone = trains and not key_.startswith(plain.prefixes())
        expected = w - rate * 0.1 * factor * away if backbone else w
        torch.testing.assert_close(pulled.states[1][key_], expected, atol=2e-7, rtol=1e-4, msg=key_)


def test_l2_sp_beside_adamw_is_decoupled_as_its_weight_decay_is(train: Train) -> None:
    """w <- w - lr alpha (w - w0) beside Adam's step, which must not see the pull."""
    settings = {**TWO, "opt": "adamw", "lr": 0.01}
    plain, pulled = train(settings), train({**settings, "sp_reg": 0.1})

    for name, value in plain.states[0].items():
        assert torch.equal(pulled.states[0][name], value), name
    rate = rates(plain)[1] / LR * 0.01
    for name, w in plain.states[1].items():
        away = plain.states[0][name] - plain.start[name]
        expected = w if name.startswith(plain.prefixes()) else w - rate * 0.1 * away
        torch.testing.assert_close(pulled.states[1][name], expected, atol=1e-7, rtol=1e-4, msg=name)


def test_delta_compares_the_stages_with_the_teachers_in_eval_mode(train: Train) -> None:
    """Zero at the start where nothing is drawn; then the gradient of the stages' mean squares."""
    plain, tied = train(TWO), train({**TWO, "delta_reg": 0.1})

    for name, value in plain.states[0].items():
        torch.testing.assert_close(tied.states[0][name], value, atol=1e-7, rtol=1e-5, msg=name)
    stages = list(tied.session.penalties.stages)
    assert len(stages) == 4
    teacher: Any = tied.session.penalties.teacher
    assert not any(module.training for module in teacher.modules())
    student: Any = at(tied, tied.states[0])
    images = tied.batches[1][0]
    mine = student.forward_intermediates(images, indices=stages, intermediates_only=True)
    original = copy.deepcopy(tied.before).eval()
    with torch.no_grad():
        theirs: Any = original.forward_intermediates(  # type: ignore[operator]
            images, indices=stages, intermediates_only=True
        )
    distance = sum(((a - b) ** 2).mean() for a, b in zip(mine, theirs, strict=True))
    loss = cross_entropy(tied, student, 1) + 0.1 * distance
    assert_update(tied.states[1], tied.states[0], gradient(student, loss), rates(tied)[1])


def test_delta_of_the_published_tool_is_a_mean_over_the_batch(train: Train) -> None:
    """Their sum made the strength follow the batch: twelve images would count twelvefold."""
    run = train({**TWO, "delta_reg": 0.1, "opt": "momentum", "momentum": 0.0}, space="qtt-compat")

    student: Any = at(run, run.states[0])
    original = copy.deepcopy(run.before).eval()
    images = run.batches[1][0]
    with torch.no_grad():
        theirs = pre_logits(original, images)
    distance = sum(
        ((a - b) ** 2).sum() for a, b in zip(pre_logits(student, images), theirs, strict=True)
    )
    loss = cross_entropy(run, student, 1) + 0.1 * distance / 12
    assert_update(run.states[1], run.states[0], gradient(student, loss), LR)


@pytest.mark.parametrize("name", [TRANSFORMER, RESNET])
def test_spectral_shrinkage_adds_the_smallest_squared_singular_value(
    train: Train, name: str
) -> None:
    run = train({**ONE, "bss_reg": 1.0}, name)

    model: Any = at(run, run.start)
    images, labels = run.batches[0]
    features = model.forward_features(images)
    spectrum = torch.linalg.svdvals(model.forward_head(features, pre_logits=True).double())
    loss = functional.cross_entropy(model.forward_head(features), labels)
    loss = loss + spectrum[-1].square().float()
    assert_update(run.states[0], run.start, gradient(model, loss), LR)


def test_co_tuning_adds_the_source_heads_cross_entropy(train: Train) -> None:
    """KL(p(y_s|y_t) || g_s(f(x))) up to a constant; the source head learns along."""
    both = train({**ONE, "cotuning_reg": 0.5})

    images, labels = both.batches[0]
    penalties = both.session.penalties
    assert penalties.relation is not None
    assert penalties.source_head is not None
    student: Any = at(both, both.start)
    source = _source_head(TRANSFORMER)
    log_p = source(pre_logits(student, images)).log_softmax(1)
    target = penalties.relation[labels]
    loss = cross_entropy(both, student) - 0.5 * (target * log_p).sum(1).mean()
    of_source = torch.autograd.grad(loss, list(source.parameters()), retain_graph=True)
    assert_update(both.states[0], both.start, gradient(student, loss), LR)
    for (name, w), slope, old in zip(
        penalties.source_head.named_parameters(), of_source, source.parameters(), strict=True
    ):
        torch.testing.assert_close(w, old - LR * slope, atol=1e-6, rtol=1e-4, msg=name)


def _source_head(model: str) -> nn.Module:
    """The shipped classifier, read from its file."""
    from safetensors.torch import load_file

    from qtt_core.hub import load_hub
    from qtt_trainer.pretrained import find_weights

    card = load_hub("tiny").card(model)
    path = find_weights(card)
    assert path is not None
    stored = load_file(path)
    name = timm.get_pretrained_cfg(card.tag).classifier  # type: ignore[union-attr]
    weight, bias = stored[f"{name}.weight"], stored[f"{name}.bias"]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def test_the_relationship_reads_training_images_only_and_is_kept_per_data_and_weights(
    train: Train, jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published tool took it from validation: labels leaked into training."""
    from qtt_trainer import data

    read: list[str] = []
    original = data.read_image

    def spied(path: Path, **options: Any) -> Any:
        read.append(path.relative_to(jobs.data).parts[0])
        return original(path, **options)

    monkeypatch.setattr(data, "read_image", spied)
    run = train({**ONE, "cotuning_reg": 1}, RESNET)

    relation = run.session.penalties.relation
    assert relation is not None
    assert set(read) == {"train"}
    assert len(read) == 3 * 24, "once for P, twice for training: here and in the loop"
    torch.testing.assert_close(relation.sum(1), torch.ones(3))
    assert relation.shape == (3, _source_head(RESNET).out_features)  # type: ignore[arg-type]
    kept = [path.relative_to(jobs.run).parts for path in jobs.run.glob("relationship/*/*")]
    fingerprint = work.load_manifest(jobs.run, "dataset.json").fingerprint
    assert kept == [("relationship", fingerprint, f"{run.session.weights_sha256}-32.safetensors")]
    read.clear()
    assert torch.equal(
        train({**ONE, "cotuning_reg": 1}, RESNET).session.penalties.relation, relation
    )  # type: ignore[arg-type]
    assert len(read) == 2 * 24, "the second time P comes from its file"


# --- beside the model -----------------------------------------------------------------------------


def test_the_moving_average_follows_its_formula_and_does_not_touch_the_model(train: Train) -> None:
    """d_t = min(.9998, 1 - (1 + t)^(-2/3)) after t updates, as timm's warm-up has it."""
    settings = {"batch_size": 2}
    plain, averaged = train(settings), train(settings, flags={"ema": True})

    for name, value in plain.states[-1].items():
        assert torch.equal(averaged.states[-1][name], value), name
    expected = averaged.start
    for update, state in enumerate(averaged.states):
        step = max(0, update - 1)
        decay = 0.0 if step == 0 else min(EMA_DECAY, 1 - (1 + step) ** (-2 / 3))
        for name, value in state.items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
        for name, value in expected.items():
            if value.is_floating_point():
                torch.testing.assert_close(averaged.averages[update][name], value, msg=name)


def test_evaluation_takes_many_images_at_a_time_whatever_the_batch(jobs: Any) -> None:
    """The published tool evaluated two at a time where it trained with two."""
    from qtt_trainer.loaders import eval_loader

    sizes = {b: eval_loader([], batch=b, workers=0, pin=False).batch_size for b in (2, 16, 512)}  # type: ignore[arg-type]

    assert sizes == {2: 64, 16: 64, 512: 256}


def test_the_cost_is_training_and_evaluation_and_nothing_else(
    jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictor learned train + evaluation seconds; their tool charged the whole call."""
    from qtt_trainer import checkpoint

    original = checkpoint.commit

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return original(*args, **options)

    monkeypatch.setattr(checkpoint, "commit", slow)
    first = run_inline(jobs.step(2)).result
    second = run_inline(jobs.step(3, start=2)).result

    assert first["cost"] == pytest.approx(sum(row["seconds"] for row in first["curve"]))
    assert second["cost"] == pytest.approx(second["curve"][-1]["seconds"])
    for row in second["curve"]:
        assert row["seconds"] == pytest.approx(row["train_seconds"] + row["eval_seconds"])

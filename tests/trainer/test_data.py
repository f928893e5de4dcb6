"""The data sets of a step: order, augmentation, seeds; nothing depends on the workers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from qtt_core.jobs import JobDocument, Limits, Paths, Task
from qtt_trainer import data, loaders, precision, prepare
from qtt_trainer.transforms import plan_transforms

CONFIG = {
    "input_size": (3, 24, 24),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.5, 0.25, 0.2),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
AUGMENTATIONS = (
    {"data_augmentation": "none"},
    {"data_augmentation": "trivial_augment"},
    {"data_augmentation": "random_augment", "ra_num_ops": 2, "ra_magnitude": 9},
    {"data_augmentation": "random_augment", "ra_num_ops": 3, "ra_magnitude": 17},
    {"data_augmentation": "auto_augment", "auto_augment": "v0"},
    {"data_augmentation": "auto_augment", "auto_augment": "original"},
)


def names(values) -> list[str]:
    return ["-".join(map(str, value.values())) for value in values]


def manifest_of(folder: Path, state: Path, **task: object) -> data.DatasetManifest:
    job = JobDocument(
        run_uid="r",
        attempt=0,
        nonce="n",
        task=Task(data=str(folder), **task),
        paths=Paths(root=str(state)),
    )
    return prepare.prepare(job)[0]


@pytest.fixture(scope="module")
def manifest(glyph_folder, tmp_path_factory) -> data.DatasetManifest:
    return manifest_of(glyph_folder, tmp_path_factory.mktemp("state"))


def train_set(manifest, folder, config, *, seed=0, config_id=0, **options) -> data.TrainSet:
    transform = data.build_transforms(CONFIG, config, None, train=True, **options)
    return data.TrainSet(manifest, "train", folder, transform, seed=seed, config_id=config_id)


# --- order -------------------------------------------------------------------------------------


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    orders = [data.epoch_order(50, seed=0, config_id=1, epoch=epoch) for epoch in (0, 1)]

    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1]
    assert orders[0] == data.epoch_order(50, seed=0, config_id=1, epoch=0)


@pytest.mark.parametrize("other", [{"seed": 1, "config_id": 1}, {"seed": 0, "config_id": 2}])
def test_order_depends_on_seed_and_configuration(other):
    here = data.epoch_order(50, seed=0, config_id=1, epoch=0)

    assert here != data.epoch_order(50, **other, epoch=0)


def test_the_sampler_resumes_within_an_epoch():
    sampler = data.KeyedSampler(20, seed=0, config_id=1)
    sampler.epoch = 3
    whole = list(sampler)

    sampler.start = 7

    assert list(sampler) == whole[7:]
    assert len(sampler) == 13
    assert {epoch for epoch, _ in whole} == {3}


def test_drawing_an_order_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()

    data.epoch_order(50, seed=0, config_id=1, epoch=0)

    assert torch.equal(before, torch.get_rng_state())


# --- augmentation ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", AUGMENTATIONS, ids=names(AUGMENTATIONS))
def test_a_sample_depends_on_its_key_alone(manifest, glyph_folder, config):
    one = train_set(manifest, glyph_folder, config)
    first, label = one[0, 3]
    for generator in (random, np.random):
        generator.seed(99)
    one[5, 1]
    again, _ = one[0, 3]

    assert torch.equal(first, again)
    assert label == manifest.samples("train")[3][1]
    assert first.shape == (3, 24, 24)
    assert first.dtype == torch.float32


@pytest.mark.parametrize("config", AUGMENTATIONS, ids=names(AUGMENTATIONS))
def test_epoch_configuration_and_seed_change_the_sample(manifest, glyph_folder, config):
    base = train_set(manifest, glyph_folder, config)
    others = [
        base[1, 3][0],
        train_set(manifest, glyph_folder, config, seed=1)[0, 3][0],
        train_set(manifest, glyph_folder, config, config_id=1)[0, 3][0],
    ]

    assert not any(torch.equal(base[0, 3][0], other) for other in others)


def test_augmentations_differ_from_each_other(manifest, glyph_folder):
    samples = [train_set(manifest, glyph_folder, c)[0, 3][0] for c in AUGMENTATIONS]

    for number, one in enumerate(samples):
        assert not any(torch.equal(one, other) for other in samples[number + 1 :])


@pytest.mark.parametrize("config", AUGMENTATIONS, ids=names(AUGMENTATIONS))
def test_no_augmentation_fails_on_two_hundred_images(manifest, glyph_folder, config):
    one = train_set(manifest, glyph_folder, config)

    for epoch in range(9):
        for number in range(len(one)):
            assert torch.isfinite(one[epoch, number][0]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_count_changes_nothing(manifest, glyph_folder, workers):
    def batches(count: int):
        sampler = data.KeyedSampler(manifest.n_train, seed=0, config_id=0)
        loader = DataLoader(
            train_set(manifest, glyph_folder, AUGMENTATIONS[2]),
            batch_size=5,
            sampler=sampler,
            num_workers=count,
            persistent_workers=count > 0,
        )
        for epoch in (0, 1):
            sampler.epoch = epoch
            yield from loader

    for (x, y), (x_other, y_other) in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(x, x_other)
        assert torch.equal(y, y_other)


def test_seeding_a_sample_does_not_touch_cuda_generators(manifest, glyph_folder, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("torch.cuda keeps a log of calls made before CUDA starts")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", never)

    train_set(manifest, glyph_folder, AUGMENTATIONS[0])[0, 0]


# --- transforms --------------------------------------------------------------------------------


def test_crop_pct_is_clamped_so_that_nothing_is_padded():
    volo = {**CONFIG, "crop_pct": 1.15}

    assert plan_transforms(volo, {}, None, train=False).crop_pct == 1.0
    white = data.build_transforms({**volo, "mean": (0, 0, 0), "std": (1, 1, 1)}, {}, 48, False)
    assert white(Image.new("RGB", (64, 48), "white")).min() == 1.0


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [0.8, 1.0])
def test_evaluation_equals_timms_own_transform(mode, crop, draw_glyph):
    from timm.data.transforms_factory import create_transform

    config = {**CONFIG, "crop_mode": mode, "crop_pct": crop}
    image = draw_glyph("5", np.random.default_rng(0), 50).resize((60, 40))
    theirs = create_transform(
        input_size=(3, 24, 24),
        is_training=False,
        interpolation="bicubic",
        mean=CONFIG["mean"],
        std=CONFIG["std"],
        crop_pct=crop,
        crop_mode=mode,
    )

    ours = data.build_transforms(config, {}, None, train=False)(image)

    assert torch.allclose(ours, theirs(image), atol=1e-5)


@pytest.mark.parametrize("policy", [None, "v0", "original"])
def test_training_without_torchvision_augmentation_equals_timms_recipe(policy, draw_glyph):
    from timm.data.transforms_factory import create_transform

    config = {"data_augmentation": "auto_augment", "auto_augment": policy} if policy else {}
    image = draw_glyph("5", np.random.default_rng(0), 50)
    theirs = create_transform(
        input_size=(3, 24, 24),
        is_training=True,
        color_jitter=0.4,
        auto_augment=policy,
        interpolation="bicubic",
        mean=CONFIG["mean"],
        std=CONFIG["std"],
    )
    ours = data.build_transforms(CONFIG, config, None, train=True)

    for number in range(10):
        results = []
        for transform in (ours, theirs):
            random.seed(number)
            np.random.seed(number)  # timm draws from the global generator
            torch.manual_seed(number)
            results.append(transform(image))
        assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize(
    ("space", "name", "jitter"),
    [
        ("native", "none", 0.4),
        ("native", "trivial_augment", 0.0),
        ("native", "random_augment", 0.0),
        ("qtt-compat", "trivial_augment", 0.4),
        ("quicktune-v1", "random_augment", 0.4),
        ("qtt-compat", "auto_augment", 0.0),
    ],
)
def test_the_spaces_differ_in_their_colour_jitter(space, name, jitter):
    plan = plan_transforms(CONFIG, {"data_augmentation": name}, None, True, space_id=space)

    assert plan.color_jitter == jitter
    assert plan.to_json()["color_jitter"] == jitter


def test_image_size_overrides_the_models():
    plan = plan_transforms(CONFIG, {}, 40, train=False)

    assert plan.size == 40
    assert data.build_transforms(CONFIG, {}, 40, False)(Image.new("RGB", (9, 9))).shape[1] == 40


@pytest.mark.parametrize("config", AUGMENTATIONS, ids=names(AUGMENTATIONS))
def test_one_channel_images_stay_one_channel(glyph_folder, tmp_path, config):
    manifest = manifest_of(glyph_folder, tmp_path, in_chans=1)
    grey = {**CONFIG, "input_size": (1, 24, 24)}
    transform = data.build_transforms(grey, config, None, train=True)
    one = data.TrainSet(manifest, "train", glyph_folder, transform, seed=0, config_id=0)

    assert one[0, 0][0].shape == (1, 24, 24)


# --- evaluation and reading ----------------------------------------------------------------------


def test_the_evaluation_set_keeps_the_manifests_order(manifest, glyph_folder):
    transform = data.build_transforms(CONFIG, {}, None, train=False)
    val = data.EvalSet(manifest, "val", glyph_folder, transform)

    labels = [val[number][1] for number in range(len(val))]

    assert labels == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(val[2][0], val[2][0])


def test_a_worker_survives_one_signal_to_the_group_and_ends_with_the_next():
    """One that ignored every SIGTERM kept a process whose data set had changed from ever ending."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            loaders.quiet_worker(0)
            os.write(writing, b"r")
            while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                time.sleep(0.005)
            os.write(writing, b"s")
            signal.pause()
        finally:
            os._exit(0)
    assert os.read(reading, 1) == b"r"

    os.kill(pid, signal.SIGTERM)
    survived = os.read(reading, 1)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)

    assert survived == b"s"
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    os.close(reading)
    os.close(writing)


# With workers torch waits five seconds before it ends one that reported an error: once is enough.
@pytest.mark.parametrize(("workers", "content"), [(0, b""), (0, None), (1, b"")])
def test_an_image_that_broke_after_prepare_ends_the_job_with_its_name(
    glyph_folder, tmp_path, workers, content
):
    folder = Path(shutil.copytree(glyph_folder, tmp_path / "data"))
    manifest = manifest_of(folder, tmp_path)
    victim = folder / manifest.samples("val")[5][0]
    victim.unlink() if content is None else victim.write_bytes(content)
    transform = data.build_transforms(CONFIG, {}, None, train=False)
    val = data.EvalSet(manifest, "val", folder, transform)

    with pytest.raises(data.DatasetChangedError, match=victim.name):
        list(DataLoader(val, batch_size=4, num_workers=workers))


def test_another_split_is_labelled_by_the_runs_class_map(glyph_folder, make_folder, tmp_path):
    manifest = manifest_of(glyph_folder, tmp_path)
    other = make_folder(tmp_path / "other", {"test": {"0": 1, "2": 3}})
    (other / "test/2/001.png").write_bytes(b"")

    extended = data.with_split(manifest, other, "test")

    assert [label for _, label in extended.samples("test")] == [0, 2, 2]
    assert "test/2/001.png" in extended.excluded
    assert extended.samples("train") == manifest.samples("train")


def test_a_split_with_an_unknown_class_or_without_images_is_refused(
    manifest, make_folder, tmp_path
):
    make_folder(tmp_path, {"test": {"0": 1, "9": 1}, "empty": {"0": 0}})

    with pytest.raises(data.BadDataError, match="'9'"):
        data.with_split(manifest, tmp_path, "test")
    with pytest.raises(data.BadDataError, match="no readable image"):
        data.with_split(manifest, tmp_path, "empty")
    with pytest.raises(data.BadDataError, match="does not exist"):
        data.with_split(manifest, tmp_path, "nothing")


@pytest.mark.parametrize(
    ("device", "said", "kills", "count"),
    [
        ("cuda", 8, 0, 8), ("cuda", 8, 1, 4), ("cuda", 8, 2, 2), ("cuda", 1, 1, 0),
        ("cuda", None, 0, 6), ("cuda", None, 1, 3), ("cpu", None, 1, 0),
    ],
)  # fmt: skip
def test_each_kill_for_memory_halves_the_loaders_workers(
    monkeypatch, device: str, said: int | None, kills: int, count: int
) -> None:
    monkeypatch.setattr(precision, "usable_cpus", lambda: 7)
    job = JobDocument(
        run_uid="r", attempt=kills, nonce="n", task=Task(data="/d"), paths=Paths(root="/r"),
        limits=Limits(workers=said, oom_kills=kills),
    )  # fmt: skip

    assert precision.loader_workers(job, torch.device(device)) == count


@pytest.mark.parametrize("space", ["native", "qtt-compat"])
@pytest.mark.parametrize(
    ("config", "own"),
    [
        ({"data_augmentation": "trivial_augment"}, tv.TrivialAugmentWide()),
        (
            {"data_augmentation": "random_augment", "ra_num_ops": 3, "ra_magnitude": 17},
            tv.RandAugment(3, 17),
        ),
        ({"data_augmentation": "random_augment"}, tv.RandAugment(2, 9)),
    ],
    ids=["trivial", "random-3-17", "random"],
)
def test_torchvisions_augmentations_stand_between_flip_and_jitter(space, config, own, draw_glyph):
    """The recipe written out: crop, flip, torchvision's policy, jitter in upstream's spaces."""
    steps = [RandomResizedCropAndInterpolation(24, interpolation="bicubic")]
    steps += [tv.RandomHorizontalFlip(0.5), own]
    if space == "qtt-compat":
        steps.append(tv.ColorJitter(0.4, 0.4, 0.4))
    by_hand = tv.Compose([*steps, tv.PILToTensor()])
    ours = data.build_transforms(CONFIG, config, None, train=True, space_id=space)
    mean, std = (torch.tensor(CONFIG[name]).view(3, 1, 1) for name in ("mean", "std"))

    for number in range(12):
        image = draw_glyph("5", np.random.default_rng(number), 40)
        results = []
        for transform in (by_hand, ours):
            random.seed(number)
            torch.manual_seed(number)
            results.append(transform(image.copy()))
        expected, got = results
        torch.testing.assert_close(got * std + mean, expected / 255, atol=1e-5, rtol=0)

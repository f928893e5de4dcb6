"""`prepare`: what it writes, what it sends, and one clear message for every fault of a data set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtt_core.jobs import Flags, JobDocument, Limits, Paths, Task
from qtt_core.results import EXIT_CODES, State, StepResult
from qtt_trainer import prepare
from qtt_trainer.data_errors import BadDataError, DatasetChangedError
from qtt_trainer.dataset_manifest import load_manifest, quick_check, save_manifest

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF|Truncated File")


@pytest.fixture
def data(glyph_folder, tmp_path) -> Path:
    """An own copy of the shared folder, free to be broken."""
    return Path(shutil.copytree(glyph_folder, tmp_path / "data"))


def job_for(data: Path, tmp_path: Path, *, seed: int = 0, **task: object) -> JobDocument:
    return JobDocument(
        run_uid="run-1",
        attempt=0,
        nonce="n0",
        task=Task(data=str(data), **task),
        paths=Paths(root=str(tmp_path / "state")),
        limits=Limits(threads=2),
        flags=Flags(offline=True),
        seed=seed,
    )


def prepared(data: Path, tmp_path: Path, **task: object):
    """(result, manifest) of a data set that must be good."""
    result = prepare.run(job_for(data, tmp_path, **task))
    assert result.state is State.OK, result.reason
    return result, load_manifest(tmp_path / "state/runs/run-1")


def reason(data: Path, tmp_path: Path, **task: object) -> str:
    """The message of a data set that must be refused."""
    result = prepare.run(job_for(data, tmp_path, **task))
    assert result.state is State.BAD_DATA
    assert EXIT_CODES[result.state] == 65
    assert result.prepared is None
    assert not (tmp_path / "state/runs/run-1/dataset.json").exists()
    assert StepResult.parse(result.encode(), nonce="n0", attempt=0).reason == result.reason
    return result.reason


# --- a good data set ---------------------------------------------------------------------------


def test_the_manifest_holds_classes_files_and_counts(glyph_folder, tmp_path):
    result, manifest = prepared(glyph_folder, tmp_path)

    assert manifest.class_names == ("0", "1", "2")
    assert (manifest.n_train, manifest.n_val) == (24, 12)
    assert manifest.class_counts("train") == (8, 8, 8)
    assert manifest.samples("val")[4] == ("val/1/000.png", 1)
    assert all((glyph_folder / path).is_file() for path, _ in manifest.samples("train"))
    assert result.prepared is not None
    assert result.prepared["digest"] == manifest.digest
    assert result.prepared["fingerprint"] == manifest.fingerprint


def test_the_message_fits_the_termination_log_and_the_ledger(glyph_folder, tmp_path):
    result, manifest = prepared(glyph_folder, tmp_path)

    message = result.encode()
    facts = StepResult.parse(message, nonce="n0", attempt=0).prepared

    assert len(message.encode()) <= 4096
    assert facts is not None
    assert facts["n_train"] == 24
    assert facts["n_val"] == 12
    assert facts["classes"] == 3
    assert facts["metafeatures"] == manifest.metafeatures


def test_preparing_twice_gives_the_same_bytes(glyph_folder, tmp_path):
    first, _ = prepared(glyph_folder, tmp_path)
    second, _ = prepared(glyph_folder, tmp_path)

    assert first.prepared == second.prepared


def test_user_given_metafeatures_override_measured_ones(glyph_folder, tmp_path):
    given = {"num_samples": 11788.0, "domain": 3.0}

    result, _ = prepared(glyph_folder, tmp_path, metafeatures=given)

    assert result.prepared is not None
    assert result.prepared["metafeatures"]["num_samples"] == 11788
    assert result.prepared["metafeatures"]["domain"] == 3
    assert result.prepared["metafeatures"]["n_train"] == 24


def test_val_is_mapped_by_name_when_a_class_is_missing_there(data, tmp_path):
    shutil.rmtree(data / "val/1")

    result, manifest = prepared(data, tmp_path)

    assert dict(manifest.samples("val"))["val/2/000.png"] == 2
    assert manifest.val_missing_classes == ("1",)
    assert any("'1'" in text and "no validation image" in text for text in result.warnings)


def test_an_empty_class_folder_in_val_counts_as_missing(data, tmp_path):
    for file in (data / "val/1").iterdir():
        file.unlink()

    _, manifest = prepared(data, tmp_path)

    assert manifest.val_missing_classes == ("1",)


def test_splits_may_have_other_names(data, tmp_path):
    (data / "train").rename(data / "training")
    (data / "val").rename(data / "holdout")

    _, manifest = prepared(data, tmp_path, train_split="training", val_split="holdout")

    assert manifest.samples("train")[0][0] == "training/0/000.png"


def test_the_test_split_is_not_looked_at(data, tmp_path):
    before = prepared(data, tmp_path)[1].fingerprint
    (data / "test/unknown").mkdir(parents=True)
    (data / "test/unknown/broken.png").write_bytes(b"")

    assert prepared(data, tmp_path)[1].fingerprint == before


# --- auto split --------------------------------------------------------------------------------


@pytest.fixture
def only_train(data) -> Path:
    shutil.rmtree(data / "val")
    return data


def test_auto_split_is_stratified_and_never_validates_on_training_images(only_train, tmp_path):
    _, manifest = prepared(only_train, tmp_path, auto_split=0.25)

    train = {path for path, _ in manifest.samples("train")}
    val = {path for path, _ in manifest.samples("val")}
    assert not train & val
    assert len(train | val) == 24
    assert manifest.class_counts("val") == (2, 2, 2)
    assert manifest.auto_split is not None
    assert manifest.auto_split.share == 0.25


def test_auto_split_depends_on_the_seed_alone(only_train, tmp_path):
    def held(seed: int):
        job = job_for(only_train, tmp_path, auto_split=0.25, seed=seed)
        assert prepare.run(job).state is State.OK
        return load_manifest(tmp_path / "state/runs/run-1").samples("val")

    assert held(0) == held(0) != held(1)


def test_auto_split_is_not_used_where_a_val_folder_exists(data, tmp_path):
    result, manifest = prepared(data, tmp_path, auto_split=0.25)

    assert manifest.n_val == 12
    assert manifest.auto_split is None
    assert any("autoSplit has no effect" in text for text in result.warnings)


def test_a_class_of_one_image_stays_in_train(only_train, tmp_path):
    for file in sorted((only_train / "train/1").iterdir())[1:]:
        file.unlink()

    _, manifest = prepared(only_train, tmp_path, auto_split=0.25)

    assert manifest.class_counts("train") == (6, 1, 6)
    assert manifest.val_missing_classes == ("1",)


def test_auto_split_of_single_images_has_nothing_to_validate_on(make_folder, tmp_path):
    data = make_folder(tmp_path / "data", {"train": {"0": 1, "1": 1}})

    assert "no image is left to validate on" in reason(data, tmp_path, auto_split=0.5)


# --- faults of the layout ----------------------------------------------------------------------


def test_no_val_folder_is_an_error_that_offers_auto_split(only_train, tmp_path):
    text = reason(only_train, tmp_path)

    assert "'val'" in text
    assert "autoSplit" in text
    assert "'train'" in text


def test_no_train_folder_says_what_is_there(data, tmp_path):
    (data / "train").rename(data / "trian")

    text = reason(data, tmp_path)

    assert "no folder 'train'" in text
    assert "'trian'" in text


def test_a_missing_data_folder_is_named(tmp_path):
    assert str(tmp_path / "nothing") in reason(tmp_path / "nothing", tmp_path)


def test_a_file_in_place_of_the_data_folder_is_refused(tmp_path):
    (tmp_path / "data").write_text("no folder")

    assert "no folder" in reason(tmp_path / "data", tmp_path)


def test_val_only_classes_are_named_with_the_ones_train_has(data, tmp_path):
    (data / "val/1").rename(data / "val/one")

    text = reason(data, tmp_path)

    assert "'one'" in text
    assert "'0', '1', '2'" in text


def test_an_empty_class_folder_in_train_is_named(data, tmp_path):
    for file in (data / "train/1").iterdir():
        file.unlink()
    (data / "train/1/readme.txt").write_text("later")

    text = reason(data, tmp_path)

    assert "class folder '1' holds no image" in text


def test_one_class_is_not_enough(make_folder, tmp_path):
    data = make_folder(tmp_path / "data", {"train": {"0": 4}, "val": {"0": 2}})

    assert "only the class '0'" in reason(data, tmp_path)


def test_images_without_class_folders_are_explained(data, tmp_path):
    for split in ("train", "val"):
        files = list((data / split).rglob("*.png"))
        for number, file in enumerate(files):
            file.rename(data / split / f"{number}.png")
        for folder in ("0", "1", "2"):
            (data / split / folder).rmdir()

    text = reason(data, tmp_path)

    assert "use one folder a class" in text
    assert text.count("\n") == 1, "both splits are reported at once"


def test_all_faults_come_in_one_message(data, tmp_path):
    shutil.rmtree(data / "train/0")
    (data / "train/empty").mkdir()
    (data / "val/2").rename(data / "val/two")

    text = reason(data, tmp_path)

    assert "'empty'" in text
    assert "'0', 'two'" in text


def test_train_and_val_in_one_folder_are_refused(data, tmp_path):
    shutil.rmtree(data / "val")
    (data / "val").symlink_to(data / "train")

    assert "same folder" in reason(data, tmp_path)
    assert "same folder" in reason(data, tmp_path, val_split="train")


def test_a_wrong_number_of_classes_is_an_error(data, tmp_path):
    assert "3 classes, but dataset.numClasses is 10" in reason(data, tmp_path, num_classes=10)


@pytest.mark.parametrize("kind", ["Csv", "WebDataset", "Parquet"])
def test_other_formats_are_refused_by_name(data, tmp_path, kind):
    text = reason(data, tmp_path, format=kind)

    assert kind in text
    assert "ImageFolder" in text


def test_other_channel_counts_are_refused(data, tmp_path):
    assert "4 channels" in reason(data, tmp_path, in_chans=4)


def test_a_hundred_faults_still_fit_the_message(make_folder, tmp_path):
    names = {f"{n:03d}-{'long-name' * 8}": 1 for n in range(100)}
    data = make_folder(tmp_path / "data", {"train": names, "val": {"0": 1}})
    for file in data.glob("train/*/*.png"):
        file.write_bytes(b"")

    result = prepare.run(job_for(data, tmp_path))
    sent = StepResult.parse(result.encode(), nonce="n0", attempt=0)

    assert sent.reason == result.reason
    assert "'0'" in sent.reason


def test_a_fault_is_answered_without_loading_torch(tmp_path):
    code = f"""
import sys
from qtt_core.jobs import JobDocument, Paths, Task
from qtt_trainer import prepare
job = JobDocument(run_uid="r", attempt=0, nonce="n", task=Task(data={str(tmp_path)!r}),
                  paths=Paths(root={str(tmp_path)!r}))
assert prepare.run(job).state == "bad_data"
sys.exit("torch" in sys.modules)
"""

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- broken images -----------------------------------------------------------------------------


@pytest.fixture
def large(make_folder, tmp_path) -> Path:
    """Enough images for 1 % of train to be more than one."""
    splits = {"train": dict.fromkeys("01", 110), "val": dict.fromkeys("01", 10)}
    return make_folder(tmp_path / "large", splits, px=8)


def test_a_few_broken_images_are_left_out_and_counted(large, tmp_path):
    (large / "train/0/003.png").write_bytes(b"")
    whole = (large / "train/1/004.png").read_bytes()
    (large / "train/1/004.png").write_bytes(whole[: len(whole) // 2])

    result, manifest = prepared(large, tmp_path)

    assert manifest.n_train == 218
    assert set(manifest.excluded) == {"train/0/003.png", "train/1/004.png"}
    assert "empty file" in manifest.excluded["train/0/003.png"]
    assert result.prepared is not None
    assert result.prepared["excluded"] == {"train": 2}
    assert any("2 unreadable images" in text for text in result.warnings)


def test_more_than_one_percent_broken_training_images_stop_the_run(large, tmp_path):
    for name in ("003", "004", "005"):
        (large / f"train/0/{name}.png").write_bytes(b"no image")

    text = reason(large, tmp_path)

    assert "3 of 220" in text
    assert "train/0/003.png" in text


def test_a_class_without_a_readable_image_stops_the_run(make_folder, tmp_path):
    splits = {"train": {"0": 150, "1": 150, "2": 1}, "val": {"0": 2, "1": 2, "2": 2}}
    data = make_folder(tmp_path / "data", splits, px=8)
    (data / "train/2/000.png").write_bytes(b"")

    assert "train/2: none of its 1 images can be read" in reason(data, tmp_path)


def test_broken_validation_images_leave_one_denominator_for_all(large, tmp_path):
    for number in range(4):
        (large / f"val/0/00{number}.png").write_bytes(b"")

    _, manifest = prepared(large, tmp_path)

    assert manifest.n_val == 16


def test_a_pipe_named_like_an_image_does_not_hang(large, tmp_path):
    os.mkfifo(large / "train/0/pipe.png")

    _, manifest = prepared(large, tmp_path)

    assert "train/0/pipe.png" in manifest.excluded


def test_a_file_of_gigabytes_is_not_read(large, tmp_path):
    with (large / "train/0/huge.png").open("wb") as file:
        file.truncate((1 << 30) + 1)  # a hole: takes no disk

    _, manifest = prepared(large, tmp_path)

    assert "1 GiB" in manifest.excluded["train/0/huge.png"]


def test_names_that_are_no_utf8_survive_the_manifest(data, tmp_path):
    odd = os.fsdecode(b"caf\xe9.png")
    shutil.copy(data / "train/0/000.png", data / "train/0" / odd)

    _, manifest = prepared(data, tmp_path)

    assert (f"train/0/{odd}", 0) in manifest.samples("train")
    quick_check(manifest, data)


def test_a_loop_of_links_is_reported_and_left_out(large, tmp_path):
    (large / "train/0/loop.png").symlink_to(large / "train/0/loop.png")
    (large / "train/loop").symlink_to(large / "train/loop")

    _, manifest = prepared(large, tmp_path)

    assert set(manifest.excluded) == {"train/0/loop.png"}


def test_odd_but_readable_images_are_kept(data, tmp_path):
    folder = data / "train/0"
    Image.new("RGBA", (9, 9), (1, 2, 3, 4)).save(folder / "alpha.png")
    Image.new("P", (9, 9)).save(folder / "palette.gif")
    Image.new("CMYK", (9, 9)).save(folder / "cmyk.jpg")
    Image.new("1", (9, 9)).save(folder / "bilevel.tiff")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "deep.png")

    _, manifest = prepared(data, tmp_path)

    assert manifest.class_counts("train") == (13, 8, 8)
    assert not manifest.excluded


def test_validation_images_that_also_train_are_reported(data, tmp_path):
    shutil.copy(data / "train/0/000.png", data / "val/0/copy.png")

    result, manifest = prepared(data, tmp_path)

    assert manifest.metafeatures["overlap_share"] == pytest.approx(1 / 13, abs=1e-6)
    assert any("also training images" in text for text in result.warnings)


# --- the manifest's life -----------------------------------------------------------------------


def test_an_untouched_data_set_passes_the_quick_check(data, tmp_path):
    _, manifest = prepared(data, tmp_path)

    quick_check(manifest, data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: (data / "train/0/000.png").unlink(),
        lambda data: shutil.copy(data / "val/0/000.png", data / "val/0/new.png"),
        lambda data: shutil.copy(data / "train/1/001.png", data / "train/0/000.png"),
        lambda data: shutil.rmtree(data / "val"),
    ],
    ids=["removed", "added", "replaced", "val gone"],
)
def test_a_changed_data_set_fails_the_quick_check(data, tmp_path, change):
    _, manifest = prepared(data, tmp_path)
    change(data)

    with pytest.raises(DatasetChangedError) as error:
        quick_check(manifest, data)

    assert EXIT_CODES[error.value.state] == 65


def test_equal_size_and_new_content_is_seen_by_the_time(data, tmp_path):
    _, manifest = prepared(data, tmp_path)
    file = data / "train/0/000.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    later = manifest.quick.newest_mtime_ns + 10**9
    os.utime(file, ns=(later, later))

    with pytest.raises(DatasetChangedError, match="other content"):
        quick_check(manifest, data)


def test_a_copy_with_new_times_is_the_same_data_set(data, tmp_path):
    _, manifest = prepared(data, tmp_path)
    for file in data.rglob("*.png"):
        os.utime(file, (2_000_000_000, 2_000_000_000))

    quick_check(manifest, data)


def test_a_volume_that_prepare_never_saw_gets_the_same_class_map(data, tmp_path):
    """A volume of a configuration's own: its first step describes the data set again."""
    from qtt_trainer.work import check_dataset

    shutil.rmtree(data / "val")
    _, manifest = prepared(data, tmp_path, auto_split=0.25)
    job = job_for(data, tmp_path / "other", auto_split=0.25, fingerprint=manifest.fingerprint)
    run_dir = tmp_path / "other/state/runs/run-1"

    made, read = check_dataset(job, run_dir), check_dataset(job, run_dir)

    assert (made.class_names, made.splits) == (manifest.class_names, manifest.splits)
    assert (made.fingerprint, made.quick) == (manifest.fingerprint, manifest.quick)
    assert made.digest == read.digest
    changed = replace(job, task=replace(job.task, fingerprint="f" * 64))
    with pytest.raises(DatasetChangedError):
        check_dataset(changed, tmp_path / "third/state/runs/run-1")


def test_another_fingerprint_than_the_jobs_is_a_changed_data_set(data, tmp_path):
    _, manifest = prepared(data, tmp_path)
    (data / "train/0/000.png").unlink()

    result = prepare.run(job_for(data, tmp_path, fingerprint=manifest.fingerprint))

    assert result.state is State.DATASET_CHANGED
    assert load_manifest(tmp_path / "state/runs/run-1") == manifest


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b'{"schema": 99}', b'{"schema": 1, "class_names": 3}'],
    ids=["empty", "no keys", "list", "newer", "wrong type"],
)
def test_a_damaged_manifest_is_told_from_a_missing_one(tmp_path, content):
    with pytest.raises(DatasetChangedError, match="does not exist"):
        load_manifest(tmp_path)
    (tmp_path / "dataset.json").write_bytes(content)

    with pytest.raises(DatasetChangedError, match=r"damaged|schema"):
        load_manifest(tmp_path)


def test_a_manifest_survives_the_round_trip(data, tmp_path):
    (data / "train/0/sub").mkdir()
    shutil.copy(data / "train/0/000.png", data / "train/0/sub/ü.png")
    _, manifest = prepared(data, tmp_path)

    digest = save_manifest(manifest, tmp_path / "again")

    assert load_manifest(tmp_path / "again") == replace(manifest, digest=digest)
    assert digest == manifest.digest


def test_a_full_disk_leaves_the_old_manifest_and_no_litter(data, tmp_path, monkeypatch):
    _, manifest = prepared(data, tmp_path)
    folder = tmp_path / "state/runs/run-1"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare.run(job_for(data, tmp_path))

    assert load_manifest(folder) == manifest
    assert [entry.name for entry in folder.iterdir()] == ["dataset.json"]


def test_the_manifest_is_plain_json(data, tmp_path):
    prepared(data, tmp_path)

    raw = json.loads((tmp_path / "state/runs/run-1/dataset.json").read_text())

    assert raw["schema"] == 1
    assert raw["splits"]["train"]["files"][0][0] == "000.png"


def test_scan_raises_bad_data_for_callers_that_want_no_result(only_train, tmp_path):
    with pytest.raises(BadDataError, match="autoSplit"):
        prepare.scan(job_for(only_train, tmp_path), only_train)

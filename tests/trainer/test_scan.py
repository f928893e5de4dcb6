"""The scanner: which files belong to which class, and what changes a fingerprint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtt_trainer.data_errors import BadDataError, DataUnreachableError
from qtt_trainer.scan import QuickFacts, fingerprint, raise_storage, scan_split


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def paths(root: Path, split: str = "train") -> dict[str, list[str]]:
    found = scan_split(root, split)
    assert found is not None
    return {name: [item.path for item in files] for name, files in found.classes.items()}


def test_classes_and_files_come_in_lexicographic_order(tmp_path):
    for name in ("class2/b.png", "class10/a.png", "class2/a.png"):
        touch(tmp_path / "train" / name)

    assert list(paths(tmp_path)) == ["class10", "class2"]
    assert paths(tmp_path)["class2"] == ["train/class2/a.png", "train/class2/b.png"]


def test_nested_folders_take_the_top_level_name(tmp_path):
    touch(tmp_path / "train/cat/2019/may/a.JPG")
    touch(tmp_path / "train/cat/b.webp")

    assert paths(tmp_path) == {"cat": ["train/cat/2019/may/a.JPG", "train/cat/b.webp"]}


def test_hidden_files_and_other_files_are_no_images(tmp_path):
    touch(tmp_path / "train/cat/a.png")
    touch(tmp_path / "train/cat/.a.png")
    touch(tmp_path / "train/cat/.thumbs/b.png")
    touch(tmp_path / "train/.git/b.png")
    touch(tmp_path / "train/cat/notes.txt")

    found = scan_split(tmp_path, "train")

    assert paths(tmp_path) == {"cat": ["train/cat/a.png"]}
    assert found is not None
    assert found.other == 1


def test_a_missing_split_is_none_and_an_empty_class_is_listed(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)

    assert scan_split(tmp_path, "val") is None
    assert paths(tmp_path) == {"cat": []}


def test_links_are_followed_once(tmp_path):
    touch(tmp_path / "elsewhere/a.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")

    assert paths(tmp_path) == {"cat": ["train/cat/a.png"]}


def test_two_links_to_one_folder_are_two_classes(tmp_path):
    touch(tmp_path / "elsewhere/a.png")
    for name in ("cat", "dog"):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).symlink_to(tmp_path / "elsewhere")

    assert {name: len(files) for name, files in paths(tmp_path).items()} == {"cat": 1, "dog": 1}


def test_a_pipe_and_a_dangling_link_are_listed_as_irregular(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    (tmp_path / "train/cat/gone.png").symlink_to(tmp_path / "nowhere.png")

    found = scan_split(tmp_path, "train")

    assert found is not None
    assert [item.regular for item in found.files] == [False, False]


def test_names_that_are_no_utf8_are_kept(tmp_path):
    folder = os.fsencode(tmp_path) + b"/train/cat"
    Path(os.fsdecode(folder)).mkdir(parents=True)
    with open(folder + b"/\xff.png", "wb") as file:  # noqa: PTH123  # bytes have no Path
        file.write(b"x")

    found = scan_split(tmp_path, "train")

    assert found is not None
    (item,) = found.files
    assert len(fingerprint(tmp_path, [item])) == 64


def test_a_fingerprint_sees_names_sizes_and_both_ends_of_the_content(tmp_path):
    body = b"a" * 20_000
    file = touch(tmp_path / "train/cat/a.png", body)

    def now() -> str:
        found = scan_split(tmp_path, "train")
        assert found is not None
        return fingerprint(tmp_path, found.files)

    marks = [now()]
    for change in (b"b" + body[1:], body[:-1] + b"b", body + b"a"):
        file.write_bytes(change)
        marks.append(now())
    file.rename(file.with_name("b.png"))
    marks.append(now())

    assert len(set(marks)) == 5


def test_a_fingerprint_does_not_depend_on_times_or_on_the_root(tmp_path):
    marks = []
    for root in (tmp_path / "one", tmp_path / "two"):
        file = touch(root / "train/cat/a.png")
        os.utime(file, (1, 1) if root.name == "one" else (9, 9))
        found = scan_split(root, "train")
        assert found is not None
        marks.append((fingerprint(root, found.files), QuickFacts.of(found.files)))

    assert marks[0][0] == marks[1][0]
    assert marks[0][1] != marks[1][1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    touch(tmp_path / "train/cat/a.png")
    (tmp_path / "train/cat").chmod(0)

    with pytest.raises(BadDataError, match="train/cat"):
        scan_split(tmp_path, "train")


def test_an_error_of_the_volume_asks_for_a_retry():
    with pytest.raises(DataUnreachableError, match="failed"):
        raise_storage(OSError(5, "Input/output error"), Path("/data/a.png"))

    raise_storage(PermissionError(13, "Permission denied"), Path("/data/a.png"))


def test_the_scanner_loads_neither_torch_nor_pillow():
    code = (
        "import sys, qtt_trainer.scan, qtt_trainer.dataset_manifest;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'PIL', 'timm')))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

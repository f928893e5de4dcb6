"""More than sixty data sets as people bring them: each is refused with one clear message.

A case breaks a copy of a good folder (three classes, train and val) and says which words the answer
must hold: what is wrong, where, and what to do. Every one goes the whole way of a process: state,
exit code, termination message, `result.json`; none may end as a bug of ours.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qtt_core.results import State

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF|Truncated File")

Break = Callable[[Path], None]


def picture(kind: str, px: int = 32) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (px, px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(width: int, height: int, body: bytes = b"", **options: Any) -> bytes:
    """A PNG with these claims in its header, true or not."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), **options)
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", picture("PNG"))
    return file.getvalue()


UNREADABLE = {
    "empty": b"",
    "one-byte": b"\x89",
    "text": b"see attachment\n",
    "html-error-page": b"<!DOCTYPE html><title>404 Not Found</title>",
    "json-error": b'{"message": "API rate limit exceeded"}',
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "pdf": b"%PDF-1.7\n1 0 obj\n",
    "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "zip-named-jpg": zipped(),
    "gzipped-png": gzip.compress(picture("PNG"), mtime=0),
    "zeros": bytes(4096),
    "noise": np.random.default_rng(1).bytes(4096),
    "elf": b"\x7fELF" + bytes(60),
    "heic": b"\0\0\0\x18ftypheic" + bytes(40),
    "avif": b"\0\0\0\x1cftypavif" + bytes(40),
    "ico": struct.pack("<HHH", 0, 1, 1) + bytes(30),
    "netpbm": b"P6 2 2 255\n" + bytes(12),
    "jpeg-start-only": b"\xff\xd8\xff",
    "jpeg-header-only": picture("JPEG")[:200],
    "jpeg-cut-in-half": picture("JPEG", 96)[: len(picture("JPEG", 96)) // 2],
    "png-signature-only": b"\x89PNG\r\n\x1a\n",
    "png-without-pixels": png(32, 32),
    "png-that-does-not-inflate": png(32, 32, zlib.compress(bytes(97 * 32))[:2] + bytes(30)),
    "png-of-width-0": png(0, 32, zlib.compress(b"")),
    "png-wrong-checksum": png(32, 32, zlib.compress(bytes(97 * 32)), crc=7),
    "png-bomb": png(100_000, 100_000, zlib.compress(bytes(1 << 16))),
    "png-cut-short": picture("PNG")[:-400],
    "gif-cut-short": picture("GIF")[:60],
    "webp-cut-short": picture("WEBP")[:60],
    "bmp-cut-short": picture("BMP")[:100],
    "bmp-of-100000-rows": picture("BMP")[:18] + struct.pack("<ii", 9, 10**8) + picture("BMP")[26:],
    "tiff-cut-short": picture("TIFF")[:100],
    "tiff-offset-beyond-the-end": b"II*\0" + struct.pack("<I", 10**9),
}


def whole_class(content: bytes) -> Break:
    """Every image of train/1 has this content."""

    def break_it(data: Path) -> None:
        for path in (data / "train" / "1").iterdir():
            path.write_bytes(content)

    return break_it


def gone(*parts: str) -> Break:
    return lambda data: shutil.rmtree(data.joinpath(*parts))


def renamed(old: str, new: str) -> Break:
    return lambda data: (data / old).rename(data / new) and None


def emptied(*folders: str) -> Break:
    def break_it(data: Path) -> None:
        for folder in folders:
            for path in (data / folder).iterdir():
                path.unlink()

    return break_it


def flat(split: str) -> Break:
    """All images of a split directly in its folder."""

    def break_it(data: Path) -> None:
        for number, path in enumerate(sorted((data / split).glob("*/*"))):
            path.rename(data / split / f"{number}.png")
        for folder in list((data / split).iterdir()):
            if folder.is_dir():
                folder.rmdir()

    return break_it


def suffixes(split: str, suffix: str) -> Break:
    def break_it(data: Path) -> None:
        for path in (data / split).glob("*/*"):
            path.rename(path.with_suffix(suffix))

    return break_it


def both(*breaks: Break) -> Break:
    def break_it(data: Path) -> None:
        for one in breaks:
            one(data)

    return break_it


def replaced_by(path: str, make: Callable[[Path], object]) -> Break:
    """A folder that is something else."""

    def break_it(data: Path) -> None:
        shutil.rmtree(data / path)
        make(data / path)

    return break_it


def classes_by(change: Callable[[str], str]) -> Break:
    """The classes of val have other names than those of train."""

    def break_it(data: Path) -> None:
        for folder in list((data / "val").iterdir()):
            folder.rename(folder.with_name(change(folder.name)))

    return break_it


def one_level_deeper(data: Path) -> None:
    inner = Path(shutil.copytree(data, data.with_name("flowers")))
    for split in ("train", "val"):
        shutil.rmtree(data / split)
    shutil.move(inner, data / "flowers")


def one_percent_and_more(data: Path) -> None:
    (data / "train" / "0" / "000.png").write_bytes(b"")  # one of 24


def pipes(data: Path) -> None:
    for path in list((data / "train" / "1").iterdir()):
        path.unlink()
        os.mkfifo(path)


def dangling(data: Path) -> None:
    for path in list((data / "train" / "2").iterdir()):
        path.unlink()
        path.symlink_to(data / "nowhere" / path.name)


def folders_named_like_images(data: Path) -> None:
    for path in list((data / "train" / "0").iterdir()):
        path.unlink()
        path.mkdir()


LAYOUTS: dict[str, tuple[Break, list[str], dict[str, Any]]] = {
    "no-train": (gone("train"), ["no folder 'train'", "it holds 'val'"], {}),
    "no-val": (gone("val"), ["no folder 'val'", "autoSplit"], {}),
    "nothing": (both(gone("train"), gone("val")), ["it holds no folder", "'train'"], {}),
    "misspelt-train": (renamed("train", "trian"), ["'train'", "'trian'"], {}),
    "upper-case": (renamed("train", "Train"), ["'train'", "'Train'"], {}),
    "training-and-validation": (
        both(renamed("train", "training"), renamed("val", "validation")),
        ["'training'", "'validation'"], {},
    ),
    "one-level-too-deep": (
        one_level_deeper,
        ["no folder 'train'", "'flowers'"], {},
    ),
    "classes-without-splits": (
        lambda data: [p.rename(data / p.name) for p in list((data / "train").iterdir())]
        and shutil.rmtree(data / "train"),
        ["no folder 'train'", "'0'"], {},
    ),
    "train-is-a-file": (replaced_by("train", Path.touch), ["no folder 'train'"], {}),
    "train-is-a-dead-link": (
        replaced_by("train", lambda path: path.symlink_to("gone")), ["no folder 'train'"], {},
    ),
    "train-links-to-itself": (
        replaced_by("train", lambda path: path.symlink_to(path.name)), ["no folder 'train'"], {},
    ),
    "train-empty": (replaced_by("train", Path.mkdir), ["no class folder with images"], {}),
    "val-empty": (replaced_by("val", Path.mkdir), ["no images", "one folder a class"], {}),
    "val-is-train": (
        replaced_by("val", lambda path: path.symlink_to("train")), ["same folder"], {},
    ),
    "train-flat": (flat("train"), ["lie directly in it", "one folder a class"], {}),
    "val-flat": (flat("val"), ["lie directly in it", "names of train"], {}),
    "loose-images": (
        lambda data: shutil.copy(data / "train/0/000.png", data / "train/stray.png") and None,
        ["outside a class folder", "train/stray.png"], {},
    ),
    "one-class": (
        both(gone("train", "1"), gone("train", "2"), gone("val", "1"), gone("val", "2")),
        ["only the class '0'", "at least two"], {},
    ),
    "one-class-is-empty": (emptied("train/1"), ["'1' holds no image"], {}),
    "all-classes-empty": (emptied("train/0", "train/1", "train/2"), ["holds no image"], {}),
    "only-val-empty-classes": (emptied("val/0", "val/1", "val/2"), ["no images"], {}),
    "unknown-class-in-val": (renamed("val/1", "val/one"), ["'one'", "does not exist in train"], {}),
    "val-class-in-other-case": (
        both(renamed("train/0", "train/cat"), renamed("val/0", "val/Cat")),
        ["'Cat'", "'cat'"], {},
    ),
    "val-class-with-a-blank": (renamed("val/2", "val/2 "), ["'2 '", "'2'"], {}),
    "val-classes-numbered-from-1": (
        classes_by(lambda name: f"n{int(name) + 1}"), ["'n1', 'n2', 'n3'"], {},
    ),
    "train-class-removed": (gone("train", "2"), ["'2' does not exist in train"], {}),
    "wrong-count": ((lambda data: None), ["3 classes", "numClasses is 10"], {"num_classes": 10}),
    "images-of-another-kind": (suffixes("train", ".heic"), ["holds no image", "jpg, png"], {}),
    "no-suffix": (suffixes("train", ""), ["holds no image"], {}),
    "raw-arrays": (suffixes("train", ".npy"), ["holds no image"], {}),
    "videos": (suffixes("train", ".mp4"), ["holds no image"], {}),
    "hidden-classes": (
        both(renamed("train/0", "train/.0"), renamed("train/1", "train/.1")),
        ["only the class '2'"], {},
    ),
    "more-than-one-percent": (one_percent_and_more, ["1 of 24", "more than 1 %", "000.png"], {}),
    "pipes": (pipes, ["not a regular file", "train/1"], {}),
    "dead-links": (dangling, ["link to nothing", "train/2"], {}),
    "folders-named-like-images": (folders_named_like_images, ["'0' holds no image"], {}),
    "auto-split-of-single-images": (
        both(gone("val"), lambda data: [
            path.unlink() for c in "012" for path in sorted((data / "train" / c).iterdir())[1:]
        ] and None),
        ["no image is left to validate on", "autoSplit"], {"auto_split": 0.5},
    ),
    "csv": ((lambda data: None), ["Csv", "ImageFolder"], {"format": "Csv"}),
    "web-data-set": ((lambda data: None), ["WebDataset", "ImageFolder"], {"format": "WebDataset"}),
    "twelve-channels": ((lambda data: None), ["12 channels"], {"in_chans": 12}),
}  # fmt: skip

CASES: dict[str, tuple[Break, list[str], dict[str, Any]]] = {
    **LAYOUTS,
    **{
        f"content-{name}": (whole_class(content), ["train/1: none of its 8 images", ".png"], {})
        for name, content in UNREADABLE.items()
    },
}


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", list(CASES))
def test_a_bad_data_set_is_refused_with_one_clear_message(
    name: str,
    glyph_folder: Path,
    tmp_path: Path,
    jobs: Any,
    run_inline: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    break_it, words, task = CASES[name]
    data = tmp_path / "broken"
    shutil.copytree(glyph_folder, data)
    break_it(data)
    job = jobs.base(task={"data": str(data), **task}, run_uid="bad")

    ended = run_inline(job, command="prepare")

    reason = ended.message.reason
    assert (ended.code, ended.message.state) == (65, State.BAD_DATA), reason
    for word in words:
        assert word in reason
    assert len(reason) <= 1000
    assert "Traceback" not in caplog.text + reason
    assert "Error(" not in reason, "an exception's representation is no message"
    assert not (jobs.root / "runs" / "bad" / "dataset.json").exists()
    assert ended.result["reason"] == reason


READABLE = {
    "alpha": lambda: Image.new("RGBA", (40, 30), (255, 0, 0, 128)),
    "grey-with-alpha": lambda: Image.new("LA", (40, 30), (90, 128)),
    "sixteen-bit": lambda: Image.fromarray(np.full((30, 40), 40_000, np.uint16)),
    "palette": lambda: Image.new("P", (40, 30), 3),
    "one-bit": lambda: Image.new("1", (40, 30), 1),
    "one-pixel": lambda: Image.new("RGB", (1, 1), "red"),
    "very-wide": lambda: Image.new("RGB", (4000, 2), "red"),
}


@pytest.mark.parametrize("name", list(READABLE))
def test_an_odd_picture_is_trained_on_like_any_other(
    name: str, glyph_folder: Path, tmp_path: Path, jobs: Any, run_inline: Any
) -> None:
    data = tmp_path / "odd"
    shutil.copytree(glyph_folder, data)
    READABLE[name]().save(data / "train" / "1" / "000.png")
    READABLE[name]().save(data / "val" / "1" / "000.png")
    maker = type(jobs)(root=tmp_path / "state2", data=data)

    assert run_inline(maker.base(), command="prepare").code == 0
    ended = run_inline(maker.step(1))

    assert ended.code == 0, ended.message.reason
    assert ended.result["curve"][0]["log_loss"] < 30

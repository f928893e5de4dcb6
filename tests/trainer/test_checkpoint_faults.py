"""Real faults under the commit protocol: a disk that fills up, flipped bits, writers at once.

Whatever happens, a reader finds the old state or the new one, whole.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtt_core.results import State
from qtt_trainer import checkpoint, layout, volume
from qtt_trainer.checkpoint import CorruptCheckpointError, Found, Label
from qtt_trainer.endings import classify
from qtt_trainer.layout import ConfigFolder

FLOATS = 60_000
"""A state of 240 kB: several pages of a disk, many writes of torch's archive."""
IDENTITY = {"run_uid": "r", "config_id": 1}


def label(fidelity: int, *, attempt: int = 0, nonce: str = "n", batch: int = 0) -> Label:
    return Label(
        fidelity=fidelity, attempt=attempt, nonce=nonce, identity=IDENTITY, previous=fidelity - 1,
        epoch=fidelity - (batch > 0), batch=batch, meta={"padding": "x" * 5000},
    )  # fmt: skip


def files(value: float) -> dict[str, checkpoint.Writer]:
    return {
        layout.STATE: checkpoint.save_state({"w": torch.full((FLOATS,), value)}),
        layout.RESULT: lambda file, written: (file.write(b'{"v": %d}' % value), None)[1],
    }


def newest(folder: ConfigFolder, to: int = 99) -> Found | None:
    return next((f for f in checkpoint.resumable(folder, to) if isinstance(f, Found)), None)


def value_of(found: Found) -> float:
    """The one number that a whole state consists of."""
    w = checkpoint.load_state(found)["w"]
    assert w.shape == (FLOATS,)
    assert bool((w == w[0]).all())
    return float(w[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own; skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "qtt-test", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount program here")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill_but(place: Path, room: int) -> None:
    """Leave about `room` bytes."""
    free = os.statvfs(place)
    with (place / "ballast").open("wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - room)))


@pytest.mark.parametrize("kind", ["commit", "part"])
def test_a_disk_that_is_full_at_any_byte_leaves_the_old_state_or_the_new(
    small_disk: Path, kind: str
) -> None:
    """From no room at all to enough, a page at a time: state, result, manifest, folders."""
    ends = set()
    for pages in (*range(0, 70, 3), *range(70, 200, 10)):
        folder = ConfigFolder(path=small_disk / f"c{pages}")
        folder.path.mkdir()
        checkpoint.commit(folder, label(1), files(1))
        fill_but(small_disk, pages * 4096)

        try:
            if kind == "commit":
                checkpoint.commit(folder, label(2), files(2))
            else:
                checkpoint.save_part(folder, label(2, batch=3), files(2))
            ends.add("written")
            expected = 2
        except OSError as error:
            ended = classify(error)
            ends.add(f"{errno.errorcode[error.errno or 0]} {ended.state.value} {ended.exit_code}")
            expected = 1

        found = newest(folder)
        assert found is not None
        assert value_of(found) == expected
        assert not list(folder.path.glob(".f*")), "a full disk needs its room back"
        (small_disk / "ballast").unlink()
        volume.remove_tree(folder.path)
    assert ends == {"written", "ENOSPC disk_full 75"}, (
        "the room was never too little, or never enough"
    )


def test_a_step_on_a_full_disk_asks_for_a_retry_and_goes_on_when_there_is_room(
    small_disk: Path, jobs: Any, run_inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room when training begins, and none when it ends."""
    maker = type(jobs)(root=small_disk, data=jobs.data)
    assert run_inline(maker.base(), command="prepare").code == 0
    monkeypatch.setattr(volume, "require_space", lambda path, size: fill_but(small_disk, 100_000))

    first = run_inline(maker.step(1, model="mini_resnet"))

    assert (first.code, first.message.state) == (75, State.DISK_FULL), first.message.reason
    assert not (maker.run / "c1" / "f1").exists()
    (small_disk / "ballast").unlink()
    monkeypatch.undo()
    small = {"opt": "sgd", "lr": 1e-2, "batch_size": 8}
    remount = ["mount", "-o", "remount,size=32m", str(small_disk)]
    subprocess.run(remount, check=True)
    assert run_inline(maker.step(1, settings=small, config_id=2)).code == 0
    assert run_inline(maker.step(1, model="mini_resnet", attempt=1)).code == 0


def test_a_bit_that_flipped_anywhere_is_seen(tmp_path: Path) -> None:
    folder = ConfigFolder(path=tmp_path)
    checkpoint.commit(folder, label(1), files(1))
    target = folder.committed(1)
    rng = np.random.default_rng(0)
    for name in (layout.STATE, layout.RESULT, layout.MANIFEST):
        whole = (target / name).read_bytes()
        places = rng.choice(len(whole), size=min(len(whole), 60), replace=False)
        for place in places:
            data = bytearray(whole)
            data[place] ^= 1 << int(rng.integers(8))
            (target / name).write_bytes(data)
            if name == layout.MANIFEST and _same_meaning(data, whole):
                continue
            with pytest.raises(CorruptCheckpointError):
                checkpoint.verify(target)
        (target / name).write_bytes(whole)
    assert checkpoint.verify(target)


def _same_meaning(data: bytes, whole: bytes) -> bool:
    """Blanks between the words of JSON carry nothing."""
    import json

    try:
        return bool(json.loads(data) == json.loads(whole))
    except ValueError:
        return False


@pytest.mark.parametrize("name", [layout.STATE, layout.RESULT, layout.MANIFEST])
def test_a_file_that_was_cut_anywhere_is_seen(tmp_path: Path, name: str) -> None:
    folder = ConfigFolder(path=tmp_path)
    checkpoint.commit(folder, label(1), files(1))
    path = folder.committed(1) / name
    whole = path.read_bytes().rstrip()
    for length in np.linspace(0, len(whole) - 1, 25).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpointError):
            checkpoint.verify(folder.committed(1))


def test_of_writers_at_once_one_wins_whole(tmp_path: Path) -> None:
    """A node that was thought dead and its replacement, six at a time."""
    for turn in range(12):
        folder = ConfigFolder(path=tmp_path / f"c{turn}")
        folder.path.mkdir()
        gate_out, gate_in = os.pipe()
        pids = []
        for writer in range(6):
            pid = os.fork()
            if pid == 0:
                code = 70
                try:
                    os.close(gate_in)
                    os.read(gate_out, 1)  # until the parent opens it for all
                    mine = label(1, attempt=writer, nonce=f"n{writer}")
                    won = checkpoint.commit(folder, mine, files(writer))
                    code = 1 if won is not None else 0
                finally:
                    os._exit(code)
            pids.append(pid)
        os.close(gate_in)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        os.close(gate_out)

        assert sorted(codes) == [0, 0, 0, 0, 0, 1]
        found = checkpoint.verify(folder.committed(1))
        assert value_of(found) == codes.index(1)
        assert found.manifest["nonce"] == f"n{codes.index(1)}"
        assert [path.name for path in folder.path.iterdir()] == ["f1"]


def test_a_kill_at_any_moment_of_the_writing_leaves_a_whole_state(tmp_path: Path) -> None:
    """Not at a stage but anywhere: the killed process saves part after part, then commits."""
    folder = ConfigFolder(path=tmp_path)
    checkpoint.commit(folder, label(1), files(1))
    rng = np.random.default_rng(0)
    position, survived = (1, 0), 0
    for attempt in range(20):
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for batch in range(position[1] + 1, 10_000):
                    part = label(2, attempt=attempt, nonce=f"n{attempt}", batch=batch)
                    checkpoint.save_part(folder, part, files(batch))
                    os.write(tell, b".")
            finally:
                os._exit(1)
        for _ in range(int(rng.integers(1, 4))):
            os.read(told, 1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
        os.close(tell)

        found = newest(folder, 2)
        assert found is not None
        assert found.position > position, "what was told to be saved is there"
        assert value_of(found) == found.position[1]
        position = found.position
        survived += 1
    assert survived == 20
    checkpoint.commit(folder, label(2, attempt=99, nonce="last"), files(2))
    checkpoint.clean_up(folder, 2, attempt=99, nonce="last")
    assert sorted(path.name for path in folder.path.iterdir()) == ["f1", "f2"]

"""The commit protocol: always the old or the new state, never none; every damage is seen."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from qtt_core.results import State
from qtt_trainer import checkpoint, layout, volume
from qtt_trainer.checkpoint import CorruptCheckpointError, Found, Label
from qtt_trainer.endings import EndedError, classify
from qtt_trainer.layout import ConfigFolder

IDENTITY = {"run_uid": "r", "config_id": 1, "seed": 3, "dtype": "fp32"}
STAGES = ("state.pt", "result.json", "manifest.json", "staged", "renamed", "committed")


@pytest.fixture
def folder(tmp_path: Path) -> ConfigFolder:
    path = tmp_path / "c1"
    path.mkdir()
    return ConfigFolder(path=path)


def label(fidelity: int, *, attempt: int = 0, nonce: str = "n", **fields: Any) -> Label:
    return Label(
        **{
            "fidelity": fidelity,
            "attempt": attempt,
            "nonce": nonce,
            "identity": IDENTITY,
            "epoch": fidelity,
            "previous": fidelity - 1,
            "meta": {},
            **fields,
        }
    )


def files(value: int) -> dict[str, checkpoint.Writer]:
    return {
        layout.STATE: checkpoint.save_state({"w": torch.full((64,), value), "epoch": value}),
        layout.RESULT: lambda file, written: (file.write(b'{"v": %d}' % value), None)[1],
    }


def commit(folder: ConfigFolder, fidelity: int, value: int | None = None, **fields: Any) -> Any:
    value = fidelity if value is None else value
    return checkpoint.commit(folder, label(fidelity, **fields), files(value))


def newest(folder: ConfigFolder, to: int = 99) -> Found | None:
    found = (f for f in checkpoint.resumable(folder, to) if isinstance(f, Found))
    return next(found, None)


def test_a_commit_is_read_back_with_its_tensors_and_its_result(folder: ConfigFolder) -> None:
    commit(folder, 3)

    found = checkpoint.verify(folder.committed(3))

    assert torch.equal(checkpoint.load_state(found)["w"], torch.full((64,), 3))
    assert volume.read_json(found.folder / layout.RESULT) == {"v": 3}
    assert found.sha256(layout.STATE) == volume.file_sha256(found.folder / layout.STATE)
    assert sorted(p.name for p in folder.path.iterdir()) == ["f3"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_killed_at_any_stage_leaves_the_old_or_the_new_state(
    folder: ConfigFolder, stage: str
) -> None:
    commit(folder, 1)
    pid = os.fork()
    if pid == 0:
        try:
            checkpoint.commit(
                folder,
                label(2, nonce="killed"),
                files(2),
                on_stage=lambda at: os.kill(os.getpid(), signal.SIGKILL) if at == stage else None,
            )
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    found = newest(folder)

    assert found is not None
    done = stage in {"renamed", "committed"}
    assert found.position == ((2, 0) if done else (1, 0))
    # The same attempt runs again over its own leftovers, and the next one cleans up.
    assert (commit(folder, 2, nonce="killed") is None) is done
    checkpoint.clean_up(folder, 2, attempt=1, nonce="x")
    assert sorted(p.name for p in folder.path.iterdir()) == ["f1", "f2"]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", ["state.pt", "result.json", "manifest.json"])
def test_damage_to_any_file_is_seen_and_the_generation_before_is_used(
    folder: ConfigFolder, damage: Callable[[Path], None], name: str
) -> None:
    commit(folder, 1)
    commit(folder, 2)
    damage(folder.committed(2) / name)

    with pytest.raises(CorruptCheckpointError, match="f2"):
        checkpoint.verify(folder.committed(2))

    found = newest(folder)
    assert found is not None
    assert found.folder == folder.committed(1)


def test_the_loser_of_a_race_replaces_nothing(folder: ConfigFolder) -> None:
    assert commit(folder, 3, value=1, nonce="winner") is not None

    assert commit(folder, 3, value=2, nonce="loser") is None

    assert volume.read_json(folder.committed(3) / layout.RESULT) == {"v": 1}
    assert sorted(p.name for p in folder.path.iterdir()) == ["f3"]


def test_a_folder_that_does_not_verify_makes_room(folder: ConfigFolder) -> None:
    commit(folder, 3)
    truncate(folder.committed(3) / layout.STATE)

    checkpoint.make_room(folder, 3, "n2")

    assert commit(folder, 3, value=9, nonce="n2") is not None
    checkpoint.clean_up(folder, 3, 0, "n2")
    assert sorted(p.name for p in folder.path.iterdir()) == ["f3"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_commit_and_no_temporary_files(
    folder: ConfigFolder, number: int
) -> None:
    commit(folder, 1)

    def fill(file: IO[bytes], written: Any) -> None:
        file.write(b"x" * 1000)
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        checkpoint.commit(folder, label(2), {**files(2), "more": fill})

    assert classify(caught.value).state is State.DISK_FULL
    assert classify(caught.value).exit_code == 75
    assert sorted(p.name for p in folder.path.iterdir()) == ["f1"]
    assert newest(folder) is not None


@pytest.mark.parametrize("room", [0, 5_000, 300_000], ids=["none", "little", "half"])
def test_a_disk_that_fills_up_under_torchs_writer_ends_in_enospc(
    folder: ConfigFolder, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer replaces the error by an opaque RuntimeError while it unwinds."""

    class Full(io.RawIOBase):
        left = room

        def write(self, data: Any) -> int:
            self.left -= memoryview(data).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return memoryview(data).nbytes

    commit(folder, 1)
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", **kw: Full() if mode == "xb" else opened(self, mode, **kw),
    )

    with pytest.raises(OSError, match="No space") as caught:
        checkpoint.commit(
            folder, label(2), {layout.STATE: checkpoint.save_state({"w": torch.zeros(1 << 18)})}
        )

    assert classify(caught.value).state is State.DISK_FULL
    assert sorted(p.name for p in folder.path.iterdir()) == ["f1"]


def test_training_does_not_begin_without_room_for_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(EndedError, match="MB free") as caught:
        volume.require_space(tmp_path, 1 << 60)

    assert caught.value.state is State.DISK_FULL
    volume.require_space(tmp_path, 1)


def test_parts_are_found_newest_first_and_only_up_to_the_jobs_epoch(folder: ConfigFolder) -> None:
    commit(folder, 2)
    for batch in (3, 5):
        part = label(5, epoch=3, batch=batch, previous=2)
        checkpoint.save_part(folder, part, {layout.STATE: files(batch)[layout.STATE]})

    positions = [f.position for f in checkpoint.resumable(folder, 5) if isinstance(f, Found)]

    assert positions == [(3, 5), (2, 0)]
    before = newest(folder, to=3)
    assert before is not None
    assert before.position == (2, 0)
    assert len(list(folder.parts(5).iterdir())) == 1


def test_a_step_without_weights_is_no_place_to_continue_from(folder: ConfigFolder) -> None:
    commit(folder, 1)
    only_result = {layout.RESULT: files(2)[layout.RESULT]}
    checkpoint.commit(folder, label(2, state=State.DIVERGED), only_result)

    found = newest(folder)

    assert found is not None
    assert found.position == (1, 0)
    assert checkpoint.verify(folder.committed(2)).manifest["state"] == "diverged"


def test_another_identity_is_refused_with_the_fields_that_differ(folder: ConfigFolder) -> None:
    commit(folder, 1)
    found = checkpoint.verify(folder.committed(1))

    with pytest.raises(EndedError, match="seed is 3 there and 4 here") as caught:
        checkpoint.require_identity(found, IDENTITY | {"seed": 4})

    assert caught.value.exit_code == 64
    checkpoint.require_identity(found, IDENTITY | {"dtype": "bf16"}, allow_dtype_change=True)
    with pytest.raises(EndedError):
        checkpoint.require_identity(found, IDENTITY | {"dtype": "bf16"})


def test_clean_up_removes_own_parts_and_lower_attempts_only(folder: ConfigFolder) -> None:
    for attempt in (0, 1, 2):
        folder.staging(3, attempt, f"n{attempt}").mkdir()
    folder.staging(4, 0, "other").mkdir()
    checkpoint.save_part(folder, label(3, epoch=2, batch=1), files(2))
    checkpoint.save_part(folder, label(4, epoch=2, batch=1), files(2))

    checkpoint.clean_up(folder, 3, attempt=1, nonce="n1")

    assert sorted(p.name for p in folder.path.iterdir()) == [
        ".f3.a1.n1",
        ".f3.a2.n2",
        ".f4.a0.other",
        "f4.part",
    ]


def test_garbage_is_collected_inside_the_run_only(tmp_path: Path) -> None:
    run, outside = tmp_path / "runs" / "r", tmp_path / "outside"
    for path in (run / "c1" / "f1", run / "c1" / "f2", run / "c2" / "f1", outside):
        path.mkdir(parents=True)
        (path / "x").write_text("x")
    (run / "link").symlink_to(outside)
    paths = ["c1/f1", "c9/none", ".", "c1/f2", "c1", "link/x", "link"]

    refused = checkpoint.collect_garbage(run, paths, keep=run / "c1" / "f2")

    assert not (run / "c1" / "f1").exists()
    assert (run / "c1" / "f2" / "x").exists()
    assert (outside / "x").exists()
    assert not (run / "link").exists()
    assert [w.split()[1] for w in refused] == [".", "c1/f2", "c1", "link/x"]


def test_an_archive_with_code_in_it_is_not_loaded(folder: ConfigFolder) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, ("true",))

    def write(file: IO[bytes], written: Any) -> None:
        torch.save({"w": Evil()}, file)

    checkpoint.commit(folder, label(1), {layout.STATE: write})
    found = checkpoint.verify(folder.committed(1))

    with pytest.raises(CorruptCheckpointError, match="cannot be loaded"):
        checkpoint.load_state(found)


def test_a_nonce_cannot_leave_the_folder(folder: ConfigFolder) -> None:
    assert folder.staging(1, 0, "../../x").parent == folder.path


def test_files_are_durable_before_the_manifest_and_the_manifest_before_the_name(
    folder: ConfigFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut may lose is what was not synced; the order is the protocol."""
    seen: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def spied_fsync(descriptor: int) -> None:
        seen.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def spied_rename(self: Path, target: Path) -> Path:
        seen.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(Path, "rename", spied_rename)
    commit(folder, 2)

    assert seen == [
        "sync state.pt",
        "sync result.json",
        "sync manifest.json",
        "sync .f2.a0.n",
        "rename to f2",
        "sync c1",
    ]

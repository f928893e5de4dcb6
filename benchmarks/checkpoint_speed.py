"""Saving a checkpoint and reading it back verified, against a plain write of the same bytes.

    python benchmarks/checkpoint_speed.py [--megabytes 90] [--repeat 7] [--to DIR]

The baseline writes the archive's bytes to one file and calls fsync; a commit also hashes, writes
manifest and result, syncs both folders, renames, and is then verified by size and digest. Both are
timed in turns on the same disk. Exits 1 past the bound.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from measure import OUT

from qtt_trainer import checkpoint, layout
from qtt_trainer.checkpoint import Label
from qtt_trainer.layout import ConfigFolder

BOUND = 1.5


def plain(path: Path, content: memoryview) -> float:
    mark = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - mark


def committed(folder: ConfigFolder, turn: int, state: dict[str, torch.Tensor]) -> float:
    label = Label(fidelity=turn, attempt=0, nonce="n", identity={}, epoch=turn, meta={})
    files = {
        layout.STATE: checkpoint.save_state(state),
        layout.RESULT: lambda file, written: (file.write(b"{}"), None)[1],
    }
    mark = time.perf_counter()
    checkpoint.commit(folder, label, files)
    checkpoint.verify(folder.committed(turn))
    return time.perf_counter() - mark


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=90)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--to", type=Path, default=OUT / "checkpoint_speed", help="on which disk")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.to, ignore_errors=True)
    folder = ConfigFolder(path=arguments.to / "c1")
    folder.path.mkdir(parents=True)
    layers = max(1, arguments.megabytes // 10)  # as a model has: many tensors, none tiny
    generator = torch.Generator().manual_seed(0)
    size = arguments.megabytes * 250_000 // layers
    state = {f"layer{i}.weight": torch.randn(size, generator=generator) for i in range(layers)}
    archive = io.BytesIO()
    torch.save(state, archive)
    baseline, ours = [], []
    for turn in range(arguments.repeat + 1):  # the first of each warms the disk
        baseline.append(plain(arguments.to / "plain", archive.getbuffer()))
        ours.append(committed(folder, turn + 1, state))
        shutil.rmtree(folder.committed(turn + 1))
    ratio = statistics.median(ours[1:]) / statistics.median(baseline[1:])
    shutil.rmtree(arguments.to)
    kept = ratio <= BOUND
    print(
        f"commit + verify / write + fsync of {archive.tell() / 1e6:.0f} MB: {ratio:.2f} "
        f"(bound {BOUND}) {'kept' if kept else 'MISSED'}"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

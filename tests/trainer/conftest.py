"""Small image folders for the trainer's tests: digits drawn with Pillow's own font."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent))

from qtt_core.hub import load_hub
from qtt_core.jobs import parse_job
from qtt_core.results import State, StepResult
from qtt_trainer import prepare
from qtt_trainer.context import Context
from qtt_trainer.process import locate, run_job
from qtt_trainer.stopping import Stop

Draw = Callable[..., Image.Image]
MakeFolder = Callable[..., Path]


def _draw_glyph(text: str, rng: np.random.Generator, px: int = 32) -> Image.Image:
    """A bright character of jittered size, place and angle on a dark, smooth background (RGB)."""
    size = float(rng.uniform(0.7, 0.9)) * px
    mask = Image.new("L", (px, px), 0)
    centre = tuple(px / 2 + rng.uniform(-0.06, 0.06, 2) * px)
    ImageDraw.Draw(mask).text(
        centre, text, fill=255, font=ImageFont.load_default(size=size), anchor="mm"
    )
    mask = mask.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR)
    shade = np.linspace(*rng.uniform(10, 70, 2), px)[:, None] * np.ones((1, px))
    paper = Image.fromarray(np.repeat(shade[..., None], 3, 2).astype(np.uint8))
    ink = Image.new("RGB", (px, px), tuple(int(v) for v in rng.integers(190, 256, 3)))
    return Image.composite(ink, paper, mask)


def _make_folder(
    root: Path, splits: Mapping[str, Mapping[str, int]], *, px: int = 32, seed: int = 0
) -> Path:
    """`{"train": {"0": 8}, ...}` as an ImageFolder of PNG files; a class draws its first letter."""
    rng = np.random.default_rng(seed)
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                _draw_glyph(name[0], rng, px).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture(scope="session")
def draw_glyph() -> Draw:
    """`draw_glyph("7", rng, px)` -> an RGB image."""
    return _draw_glyph


@pytest.fixture(scope="session")
def make_folder() -> MakeFolder:
    """`make_folder(root, {"train": {"0": 8}, "val": {"0": 4}}, px=32, seed=0)` -> root."""
    return _make_folder


@pytest.fixture(scope="session")
def glyph_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 8 training and 4 validation images each, 32 px. Shared: never change it."""
    splits = {"train": dict.fromkeys("012", 8), "val": dict.fromkeys("012", 4)}
    return _make_folder(tmp_path_factory.mktemp("glyphs"), splits)


# --- jobs ------------------------------------------------------------------------------

Job = dict[str, Any]

SETTINGS = {"opt": "adamw", "lr": 1e-3, "batch_size": 8, "weight_decay": 0.01, "sched": "cosine"}


@dataclass(kw_only=True)
class JobMaker:
    """Job documents over one prepared run folder; `step(...)` fills in what a test does not say."""

    root: Path
    data: Path

    @property
    def run(self) -> Path:
        return self.root / "runs" / "run-1"

    def base(self, **fields: Any) -> Job:
        task = {"data": str(self.data), **fields.pop("task", {})}
        return {
            "schema": 1,
            "run_uid": "run-1",
            "attempt": 0,
            "nonce": "n0",
            "task": task,
            "paths": {"root": str(self.root)},
            "limits": {"threads": 1, **fields.pop("limits", {})},
            **fields,
        }

    def step(
        self,
        to: int,
        *,
        start: int = 0,
        model: str = "mini_resnet",
        settings: Mapping[str, Any] | None = None,
        config_id: int = 1,
        horizon: int = 4,
        **fields: Any,
    ) -> Job:
        config = {"model": model, **(SETTINGS if settings is None else settings)}
        return self.base(
            **{
                "step": f"c{config_id}-f{to}",
                "config_id": config_id,
                "config": config,
                "space_id": "native",
                "card": load_hub("tiny").card(model).to_json(),
                "fidelity_from": start,
                "fidelity_to": to,
                "max_fidelity": horizon,
                "seed": 3,
                **fields,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an in-process job ended."""

    code: int
    message: StepResult
    result: Mapping[str, Any]


@pytest.fixture
def jobs(tmp_path: Path, glyph_folder: Path) -> JobMaker:
    """A prepared run on three classes of 8 + 4 glyphs."""
    maker = JobMaker(root=tmp_path / "state", data=glyph_folder)
    done = prepare.run(parse_job(maker.base(), command="prepare"))
    assert done.state is State.OK, done.reason
    return maker


class StopAfter(Stop):
    """A stop that is asked for when the loop has looked `looks` times: a place, not a moment."""

    def __init__(self, looks: int, why: State = State.PREEMPTED) -> None:
        self._looks: float = looks
        self._why = why
        super().__init__()

    @property
    def state(self) -> State | None:  # type: ignore[override]
        self._looks -= 1
        return self._why if self._looks < 0 else None

    @state.setter
    def state(self, value: State | None) -> None:
        pass


RunInline = Callable[..., Ending]


@pytest.fixture
def run_inline() -> RunInline:
    """`run_inline(job, command="step", stop_after=None)` -> Ending: the contract, in process."""

    def run(
        job: Job,
        *,
        command: str = "step",
        stop_after: int | None = None,
        why: State = State.PREEMPTED,
    ) -> Ending:
        stop = Stop() if stop_after is None else StopAfter(stop_after, why)
        context = Context(stop=stop, born=time.monotonic())
        attempt, texts = locate(command, job), list[str]()
        code = run_job(attempt, job, context, texts.append)
        message = StepResult.parse(texts[-1], nonce=job["nonce"], attempt=job["attempt"])
        assert attempt.folder is not None
        return Ending(
            code=code,
            message=message,
            result=json.loads((attempt.folder / "result.json").read_text()),
        )

    return run


class Served:
    """A running `serve` process: send lines, read events."""

    def __init__(self, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qtt_trainer", "serve", "--die-with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.count = 0
        assert self.event()["event"] == "ready"

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "serve ended"
        event: dict[str, Any] = json.loads(line)
        return event

    def send(self, command: str, job: Any) -> int:
        assert self.process.stdin is not None
        self.count += 1
        line = {"id": self.count, "command": command, "job": job}
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return self.count

    def until(self, name: str) -> dict[str, Any]:
        while True:
            event = self.event()
            if event["event"] == name:
                return event

    def run(self, command: str, job: Any) -> dict[str, Any]:
        self.send(command, job)
        return self.until("ended")

    def close(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()
        return self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One warm trainer for all tests of a session."""
    server = Served(QTT_MIN_UNSAVED_SECONDS="0")
    yield server
    assert server.close() == 0


@pytest.fixture(scope="session")
def saving() -> Iterator[Served]:
    """A warm trainer whose jobs save their state after each update."""
    server = Served(QTT_MIN_UNSAVED_SECONDS="0", QTT_PART_SECONDS="0")
    yield server
    assert server.close() == 0


@pytest.fixture
def start_serve() -> Callable[..., Served]:
    """Starts a further warm trainer; the test closes it."""
    return Served

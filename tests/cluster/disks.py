"""Claims as folders, and pods that see what their mounts show them: no more, under no other name.

Steps leave the files that the real trainer leaves; `garbage` and `recovery` are the real trainer's
commands, in this process.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtt_core.jobs import JobDocument
from qtt_core.results import EXIT_CODES, State, StepResult
from qtt_core.testing.trainer import Volume, result_of
from qtt_operator.cluster import Object
from qtt_operator.pods import CHECKPOINTS
from qtt_trainer import garbage, layout, recovery, volume
from tests.cluster.fake_cluster import document_of


class Disks:
    """`answer(pod)` is what a `FakeCluster` asks for; a claim's folder is `folder(name)`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.toy = Volume()
        self.mounted: list[tuple[str, dict[str, str]]] = []
        """(command, path -> claim) of every pod that ended."""

    def folder(self, claim: str) -> Path:
        return self.root / "claims" / claim

    def claims(self) -> set[str]:
        """Claims that a pod has written to."""
        parent = self.root / "claims"
        return {path.name for path in parent.iterdir()} if parent.is_dir() else set()

    def files(self, claim: str, uid: str) -> set[str]:
        """Every file and empty folder of a run on a claim, relative to the run's folder."""
        run = self.folder(claim) / "runs" / uid
        files = (p for p in run.rglob("*") if p.is_file() or not any(p.iterdir()))
        return {str(path.relative_to(run)) for path in files}

    def answer(self, pod: Object) -> tuple[int, str]:
        command, document = document_of(pod)
        with tempfile.TemporaryDirectory(dir=self.root) as temporary:
            here = self._mount(pod, Path(temporary))
            inside = replace(
                document, paths=replace(document.paths, root=str(here / CHECKPOINTS[1:]))
            )
            if command in {"garbage", "recovery"}:
                report = (garbage if command == "garbage" else recovery).run(inside)
                return report.exit_code, report.message.encode()
            result = result_of(command, document, self.toy)
            if command == "prepare":
                run = layout.run_folder(inside.paths.root, inside.run_uid)
                (run / "dataset.json").write_text("{}")
            if command == "step":
                result = self._step(inside, result)
        return EXIT_CODES[result.state], result.encode()

    def _mount(self, pod: Object, here: Path) -> Path:
        """The pod's file system, with a link for each mount of a claim."""
        (trainer,) = pod["spec"]["containers"]
        sources = {v["name"]: v for v in pod["spec"]["volumes"]}
        seen = {}
        for mount in sorted(trainer["volumeMounts"], key=lambda m: len(m["mountPath"])):
            path = here / mount["mountPath"].lstrip("/")
            claim = sources[mount["name"]].get("persistentVolumeClaim", {}).get("claimName", "")
            if not mount["mountPath"].startswith(CHECKPOINTS):
                continue
            seen[mount["mountPath"]] = claim
            source = self.folder(claim) / mount.get("subPath", "") if claim else path
            source.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            if claim:
                path.symlink_to(source)
        self.mounted.append((document_of(pod)[0], seen))
        return here

    def _step(self, job: JobDocument, result: StepResult) -> StepResult:
        """Commit as the trainer does, its `gc` and the attempt's files included."""
        run = layout.run_folder(job.paths.root, job.run_uid)
        folder = layout.config_folder(run, job.config_id)
        target, attempt = folder.committed(job.fidelity_to), layout.attempt_folder(
            run, "step", config_id=job.config_id, fidelity_to=job.fidelity_to, attempt=job.attempt
        )  # fmt: skip
        attempt.mkdir(parents=True, exist_ok=True)
        (attempt / layout.LOG).write_text("")
        if target.exists():
            return result
        saved = list(folder.all_committed())
        if job.fidelity_from > 0 and not saved and not job.flags.allow_restart:
            return StepResult(attempt=job.attempt, nonce=job.nonce, state=State.CHECKPOINT_CORRUPT)
        target.mkdir(parents=True)
        state = volume.write_json(target / layout.STATE, {"weights": 1})
        curve = [
            {"epoch": e, "top1": self.toy.scores[f"{job.config_id}-{e}"], "seconds": 2.0}
            for e in range(1, job.fidelity_to + 1)
        ]
        raw: dict[str, Any] = {
            "state": State.OK.value, "reason": "", "metric": "top1", "curve": curve,
            "config": dict(job.config), "timing": {"total": 5.0}, "nonce": job.nonce,
            "checkpoint": {"sha256": state.sha256, "bytes": state.size_bytes},
        }  # fmt: skip
        told = volume.write_json(target / layout.RESULT, raw)
        volume.write_json(target / layout.MANIFEST, {"files": [state.to_json(), told.to_json()]})
        (attempt / layout.RESULT).write_text(json.dumps(raw))
        garbage_of_step = [p for p in job.gc if (run / p) != target]
        for path in garbage_of_step:
            volume.remove_tree(run / path)
        return replace(result, checkpoint_sha256=state.sha256, checkpoint_bytes=state.size_bytes)

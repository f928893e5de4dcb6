"""Scores a finished or running run's checkpoints on a folder of images, from outside the run.

One trainer parent is started for it; ledger, optimizer and status stay untouched.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qtt_core.errors import DataError
from qtt_core.hub import Hub
from qtt_core.jobs import JobDocument
from qtt_core.plan import Identity
from qtt_core.spec import API_VERSION, KIND, parse_manifest
from qtt_operator.devices import count_cores, count_cuda, default_devices, make_slots, parse_devices
from qtt_operator.documents import Places, RunContents, evaluate_document
from qtt_operator.evaluation import evaluate
from qtt_operator.local_backend import LocalBackend
from qtt_operator.record import RunRecord
from qtt_operator.report import Row, with_test


async def score_on(
    record: RunRecord, rows: Sequence[Row], images: Path, devices: str | None
) -> list[Row]:
    """The rows with `test` filled in. Raises: DataError if the folder cannot be used."""
    folder = images.expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"--test {images}: no such folder; it holds one folder per class")
    run = contents_of(record)
    if run.spec.trainer.custom:
        raise DataError("--test: this run has a trainer of its own, and ours cannot score for it")
    cuda = count_cuda()
    names = parse_devices(devices, cuda) if devices else default_devices(1, 1, cuda)
    document = document_for(run, record, split=folder.name, data=folder.parent)
    with tempfile.TemporaryDirectory(prefix="qtt-evaluate-") as scratch:
        backend = LocalBackend(make_slots(names[:1], count_cores()), state_dir=Path(scratch))
        try:
            scores = await evaluate(backend, document, [row.checkpoint for row in rows])
        finally:
            await backend.close()
    return with_test(rows, scores, record.metric.name)


def document_for(run: RunContents, record: RunRecord, *, split: str, data: Path) -> JobDocument:
    """An evaluation's job document, without checkpoints yet."""
    token = f"eval-{secrets.token_hex(4)}"
    return evaluate_document(
        run, record.state, checkpoints=(), split=split, token=token, data=str(data)
    )


def contents_of(record: RunRecord) -> RunContents:
    """What the run's jobs have in common, from what it wrote down at its start."""
    facts = record.facts
    manifest = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": facts["name"]},
        "spec": facts["spec"],
    }
    run = parse_manifest(manifest)
    hub = Hub.from_json(facts["hub"])
    recorded = record.state.run
    identity = Identity(
        uid=str(facts["uid"]),
        name=str(facts["name"]),
        seed=recorded.seed if recorded else 0,
        space_id=run.spec.search.space or "custom",
        space_sha=recorded.space_hash if recorded else "",
        spec_hash=recorded.spec_hash if recorded else "",
        version="",
        raw_spec=run.raw_spec,
    )
    places = Places(
        data=str(facts["data"]), root=str(facts["root"]), weights=str(facts.get("weights", ""))
    )
    return RunContents(spec=run.spec, identity=identity, hub=hub, places=places)

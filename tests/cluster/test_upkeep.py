"""Checkpoints and claims of whole runs: the operator's loop on claims that are real folders."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qtt_core.ledger.events import Done, Event, Note, Open, Retry
from qtt_core.spec import check_spec, parse_manifest
from qtt_operator.claims import one_node_advice
from qtt_operator.cluster import CLAIMS, RUNS, Object
from qtt_operator.names import config_claim
from qtt_operator.owner import RunObject
from qtt_operator.store import EmbeddedStore
from qtt_operator.volumes import Volumes
from tests.cluster.disks import Disks
from tests.cluster.fake_cluster import FakeCluster, document_of
from tests.cluster.fake_operator import SETTINGS, FakeOperator, manifest
from tests.cluster.test_reconcile import (
    complete,
    events_of,
    keys_of,
    only_once,
    put_back,
    steps_of,
)

TEMPLATE = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
Scenario = Callable[[FakeCluster, FakeOperator], Awaitable[None]]


def play(
    store: EmbeddedStore, disks: Disks, scenario: Scenario = complete, **spec: Any
) -> tuple[FakeCluster, Object, list[Event]]:
    """A run on a cluster with disks; its TuningRun and events as they are at the end."""
    cluster = FakeCluster()
    cluster.answer = disks.answer

    async def main() -> tuple[Object, list[Event]]:
        run = await cluster.create(RUNS, "default", manifest(**spec))
        operator = FakeOperator(cluster, store)
        async with operator.running():
            await scenario(cluster, operator)
        return run, await events_of(store, run)

    run, events = asyncio.run(main())
    return cluster, cluster.objects.get(("tuningruns", "default", "toy"), run), events


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


def checkpoints(disks: Disks, claim: str, uid: str) -> set[str]:
    """Folders with weights on a claim."""
    files = disks.files(claim, uid)
    return {path.removesuffix("/state.pt") for path in files if path.endswith("/state.pt")}


def notes(events: list[Event], what: str = "garbage") -> list[Note]:
    return [e for e in events if isinstance(e, Note) and e.what == what]


def claims(cluster: FakeCluster) -> set[str]:
    """Claims that the operator made."""
    found = {name for plural, _, name in cluster.objects if plural == "persistentvolumeclaims"}
    return found - {"data"}


@pytest.mark.parametrize(
    ("retention", "count"), [("Incumbent", 1), ("TopK", 2), ("None", 0), ("All", 12)]
)
def test_at_the_end_the_volume_holds_what_retention_promises(
    redis_store: EmbeddedStore, disks: Disks, retention: str, count: int
) -> None:
    checkpoint = {"volumeClaimTemplate": TEMPLATE, "retention": retention, "topK": 2}

    _, run, events = play(
        redis_store, disks, checkpoint=checkpoint, budget={"maxSteps": 12}, parallelism=1
    )

    only_once(events, 12)
    uid, best = run["metadata"]["uid"], run["status"]["best"]
    left = checkpoints(disks, "toy-checkpoints", uid)
    if retention == "TopK":  # the incumbent is one of the best two, or a third one beside them
        assert count <= len(left) <= count + 1
    elif retention != "All":
        assert len(left) == count
    if retention in {"Incumbent", "TopK"}:
        assert best["checkpoint"] in left
    if retention == "TopK":
        assert {f"c{t['configID']}" for t in run["status"]["top"][:2]} <= {
            path.split("/")[0] for path in left
        }
    folders = {path.split("/")[0] for path in disks.files("toy-checkpoints", uid)}
    assert folders == {"dataset.json"} | {path.split("/")[0] for path in left}


def test_complete_is_said_after_the_volume_is_clean(
    redis_store: EmbeddedStore, disks: Disks
) -> None:
    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        cluster.answer = lambda pod: None if document_of(pod)[0] == "garbage" else disks.answer(pod)
        await operator.until(lambda: any("-gc-0" in j["metadata"]["name"] for j in cluster.jobs()))
        await asyncio.sleep(0.2)
        assert not operator.is_true("Complete")
        cluster.answer = disks.answer
        await complete(cluster, operator)

    _, _, events = play(redis_store, disks, scenario)

    assert len(notes(events)) == 1


def test_garbage_that_fails_is_tried_three_times_and_then_said(
    redis_store: EmbeddedStore, disks: Disks
) -> None:
    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        cluster.answer = lambda pod: (
            (75, "") if document_of(pod)[0] == "garbage" else disks.answer(pod)
        )
        await complete(cluster, operator)

    cluster, _, events = play(redis_store, disks, scenario)

    only_once(events)
    assert [bool(note.new) for note in notes(events)] == [False] * 3
    names = [j["metadata"]["name"] for j in cluster.jobs() if "-gc-" in j["metadata"]["name"]]
    assert names == ["toy-gc-0", "toy-gc-1", "toy-gc-2"]
    reasons = [o["reason"] for (plural, *_), o in cluster.objects.items() if plural == "events"]
    assert "GarbageFailed" in reasons


def test_an_operator_that_dies_while_garbage_is_collected_is_followed_by_one_that_goes_on(
    redis_store: EmbeddedStore, disks: Disks
) -> None:
    cluster = FakeCluster()
    cluster.answer = disks.answer

    async def main() -> list[Event]:
        run = await cluster.create(RUNS, "default", manifest())
        first = FakeOperator(cluster, redis_store)
        async with first.running():
            await first.until(lambda: any("-gc-" in j["metadata"]["name"] for j in cluster.jobs()))
        second = FakeOperator(cluster, redis_store, epoch=2)
        async with second.running():
            await complete(cluster, second)
        return await events_of(redis_store, run)

    events = asyncio.run(main())

    only_once(events)
    assert len(notes(events)) == 1
    run = cluster.objects[("tuningruns", "default", "toy")]
    left = checkpoints(disks, "toy-checkpoints", run["metadata"]["uid"])
    assert left == {run["status"]["best"]["checkpoint"]}


def test_a_reopened_run_trains_again_what_was_deleted(
    redis_store: EmbeddedStore, disks: Disks
) -> None:
    """Only the incumbent was kept: the others may begin anew, without a failed attempt first."""

    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        await complete(cluster, operator)
        await operator.edit(budget={"maxSteps": 12})
        await operator.until(lambda: steps_of(operator) == 12)
        await complete(cluster, operator)

    cluster, _, events = play(redis_store, disks, scenario, budget={"maxSteps": 7}, parallelism=1)

    only_once(events, 12)
    deleted = {path for path in json.loads(notes(events)[0].new) if "/" not in path}
    documents = [document_of(job) for job in cluster.jobs()]
    again = {f"c{d.config_id}" for _, d in documents if d.flags.allow_restart}
    assert again
    assert again <= deleted
    assert not [e for e in events if isinstance(e, Retry)]


# --- one claim a configuration --------------------------------------------------------------------


PER_CONFIG = {"volumeClaimTemplate": TEMPLATE, "scope": "Config"}


def test_every_configuration_has_a_claim_of_its_own_while_it_may_go_on(
    redis_store: EmbeddedStore, disks: Disks
) -> None:
    cluster, run, events = play(
        redis_store, disks, checkpoint=PER_CONFIG, budget={"maxSteps": 12}, parallelism=2
    )

    only_once(events, 12)
    uid, best = run["metadata"]["uid"], run["status"]["best"]
    mine = config_claim("toy", str(best["configID"]), uid)
    assert claims(cluster) == {mine}
    jobs = {j["metadata"]["labels"].get("quicktune.dev/config") for j in cluster.jobs()}
    assert jobs <= {str(best["configID"]), "prepare", None}  # a pod object holds its claim
    assert checkpoints(disks, mine, uid) == {best["checkpoint"]}
    for command, mounts in disks.mounted:
        seen = {path: claim for path, claim in mounts.items() if claim}
        if command == "prepare":
            assert not seen
        else:
            assert len(seen) == 1
            assert re.fullmatch(r"toy-c\d+-[0-9a-f]{5}", *seen.values())
    assert not [job for job in cluster.jobs() if "affinity" in job["spec"]["template"]["spec"]]


def test_a_claim_carries_labels_and_goes_with_the_run_only_under_delete(
    redis_store: EmbeddedStore, disks: Disks
) -> None:
    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        await operator.until(lambda: len(claims(cluster)) >= 2)
        assert not any(owned(c) for c in objects(cluster))
        await operator.edit(deletionPolicy="Delete")
        await operator.until(lambda: all(owned(c) for c in objects(cluster)))
        await operator.edit(deletionPolicy="Retain")
        await operator.until(lambda: not any(owned(c) for c in objects(cluster)))
        await complete(cluster, operator)

    def objects(cluster: FakeCluster) -> list[Object]:
        return [
            o for (plural, _, name), o in cluster.objects.items()
            if plural == CLAIMS.plural and name != "data"
        ]  # fmt: skip

    def owned(claim: Object) -> bool:
        return bool(claim["metadata"].get("ownerReferences"))

    cluster, run, _ = play(
        redis_store, disks, scenario, checkpoint=PER_CONFIG, budget={"maxSteps": 30}
    )

    (claim,) = objects(cluster)
    labels = claim["metadata"]["labels"]
    assert labels["quicktune.dev/run-uid"] == run["metadata"]["uid"]
    assert labels["quicktune.dev/config"] == str(run["status"]["best"]["configID"])


@pytest.mark.parametrize("parallelism", [1, 3])
def test_never_more_volumes_than_the_spec_allows(
    redis_store: EmbeddedStore, disks: Disks, parallelism: int
) -> None:
    """Random search goes from one configuration to the next: old ones must make room."""
    most = 0

    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(claims(cluster)))
                await asyncio.sleep(0.002)

        watching = asyncio.create_task(watch())
        await complete(cluster, operator)
        watching.cancel()

    checkpoint = {**PER_CONFIG, "maxVolumes": 3}
    _, run, events = play(
        redis_store, disks, scenario, checkpoint=checkpoint, parallelism=parallelism,
        budget={"maxSteps": 14}, optimizer={"algorithm": "FreezeThawRandom", "seed": 3},
    )  # fmt: skip

    only_once(events, 14)
    assert most <= 3
    assert int(run["status"]["configs"]["started"]) > 3  # it did not stand still either


RWX = {"accessModes": ["ReadWriteMany"], "resources": {}, "storageClassName": "slow"}


@pytest.mark.parametrize(
    ("template", "phase", "waited", "told"),
    [
        (RWX, "Pending", 61.0, True),
        (RWX, "Pending", 59.0, False),
        (RWX, "Bound", 600.0, False),
        (RWX, "Pending", None, False),
        (TEMPLATE, "Pending", 600.0, False),
    ],
    ids=["a minute", "less", "bound", "nobody waits", "a class that waits for its first pod"],
)
def test_a_class_that_gives_no_shared_volume_is_told_with_the_way_out(
    template: dict[str, Any], phase: str, waited: float | None, told: bool
) -> None:
    cluster = FakeCluster()
    run = manifest(checkpoint={"volumeClaimTemplate": template})
    owner = RunObject(run=parse_manifest(run), uid="u")
    volumes = Volumes(
        cluster=cluster, run=lambda: owner, settings=SETTINGS, clock=lambda: 1000.0  # type: ignore[arg-type]
    )  # fmt: skip

    async def main() -> None:
        await volumes.ensure()
        claim = cluster.objects[("persistentvolumeclaims", "default", "toy-checkpoints")]
        cluster.change({**claim, "status": {"phase": phase}}, "persistentvolumeclaims")
        await volumes.look(None if waited is None else 1000.0 - waited)

    asyncio.run(main())

    assert bool(volumes.trouble) is told
    if told:
        assert all(w in volumes.trouble for w in ("toy-checkpoints", "slow", "ReadWriteOnce"))


@pytest.mark.parametrize(
    ("parallelism", "checkpoint", "told"),
    [(5, None, True), (4, None, False), (5, {"volumeClaimTemplate": RWX}, False),
     (9, PER_CONFIG, False), (5, {"claimName": "mine"}, False)],
)  # fmt: skip
def test_many_jobs_on_one_nodes_volume_deserve_a_word_from_lint_and_operator(
    parallelism: int, checkpoint: dict[str, Any] | None, told: bool
) -> None:
    spec = {"parallelism": parallelism, "budget": {"maxSteps": 60}}
    run = parse_manifest(manifest(**spec, **({"checkpoint": checkpoint} if checkpoint else {})))

    advice = [fault for fault in check_spec(run) if fault.field == "spec.parallelism"]

    assert bool(one_node_advice(run.spec, SETTINGS.checkpoint_defaults)) is told
    assert bool(advice) is told


def test_a_claim_that_is_going_away_is_waited_for() -> None:
    """The same name again, soon after `deletionPolicy: Delete`: a pod on it would wait for ever."""
    cluster = FakeCluster()
    owner = RunObject(run=parse_manifest(manifest()), uid="u")
    volumes = Volumes(
        cluster=cluster, run=lambda: owner, settings=SETTINGS, clock=lambda: 0.0  # type: ignore[arg-type]
    )  # fmt: skip
    key = ("persistentvolumeclaims", "default", "toy-checkpoints")
    leaving = {"name": key[2], "namespace": key[1], "uid": "old", "resourceVersion": "1",
               "deletionTimestamp": "2026-01-01T00:00:00Z"}  # fmt: skip
    cluster.objects[key] = {"metadata": leaving}

    assert asyncio.run(volumes.ensure()) is False
    del cluster.objects[key]
    assert asyncio.run(volumes.ensure()) is True


# --- what the store has lost ----------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [None, PER_CONFIG], ids=["one claim", "claim a config"])
@pytest.mark.parametrize("loss", ["everything", "the newest results"])
def test_results_that_no_job_can_tell_are_read_from_the_volume(
    redis_store: EmbeddedStore, disks: Disks, loss: str, checkpoint: dict[str, Any] | None
) -> None:
    cluster = FakeCluster()
    cluster.answer = disks.answer
    spec = {"budget": {"maxSteps": 12}} | ({"checkpoint": checkpoint} if checkpoint else {})

    async def main() -> tuple[list[Event], int]:
        run = await cluster.create(RUNS, "default", manifest(**spec))
        uid = run["metadata"]["uid"]
        first = FakeOperator(cluster, redis_store)
        async with first.running():
            await first.until(lambda: steps_of(first) >= 3)
            kept = keys_of(redis_store, uid) if loss != "everything" else {}
            await first.until(lambda: steps_of(first) >= 7)
        counted = steps_of(first)
        put_back(redis_store, uid, kept)
        for job in cluster.jobs():
            cluster.remove(job, "jobs")
        second = FakeOperator(cluster, redis_store, epoch=2)
        async with second.running():
            await second.until(lambda: second.condition("StoreAvailable").get("status") == "False")
            await complete(cluster, second)
            assert second.is_true("StoreAvailable")
        return await events_of(redis_store, run), counted

    events, counted = asyncio.run(main())

    only_once(events, 12)
    brought = [e for e in events if isinstance(e, Open) and e.why.get("rule") == "recovery"]
    assert brought
    told = [json.loads(note.new) for note in notes(events, "recovery")]
    assert told[-1]["more"] == 0
    assert sum(fact["told"] for fact in told) >= 1
    scores = {(e.c, epoch): s for e in events if isinstance(e, Done) for epoch, s, _ in e.epochs}
    toy = disks.toy.scores
    assert scores == {k: pytest.approx(toy[f"{k[0]}-{k[1]}"], abs=1e-6) for k in scores}
    assert counted >= 7


def test_a_volume_that_knows_no_more_is_read_once_and_a_person_decides(
    redis_store: EmbeddedStore, disks: Disks
) -> None:
    cluster = FakeCluster()
    cluster.answer = disks.answer

    async def main() -> list[Event]:
        run = await cluster.create(RUNS, "default", manifest(budget={"maxSteps": 8}))
        uid = run["metadata"]["uid"]
        first = FakeOperator(cluster, redis_store)
        async with first.running():
            await first.until(lambda: steps_of(first) >= 4)
        put_back(redis_store, uid, {})
        shutil.rmtree(disks.folder("toy-checkpoints"))
        for job in cluster.jobs():
            cluster.remove(job, "jobs")
        second = FakeOperator(cluster, redis_store, epoch=2)
        async with second.running():
            await second.until(lambda: bool(cluster.jobs()))
            await asyncio.sleep(0.5)
            assert [j["metadata"]["name"] for j in cluster.jobs()] == ["toy-recovery-0"]
            assert second.condition("StoreAvailable")["reason"] == "DataRegressed"
            note = {"metadata": {"annotations": {"quicktune.dev/retry": "yes"}}}
            await cluster.patch(RUNS, "default", "toy", note)
            await complete(cluster, second)
        return await events_of(redis_store, run)

    only_once(asyncio.run(main()), 8)


# --- a claim of the user's ------------------------------------------------------------------------


SHARED = {"claimName": "shared", "subPath": "team"}


@pytest.mark.parametrize("ends", ["clean", "failing", "hanging"])
def test_a_shared_claim_is_wiped_before_the_run_goes_and_never_holds_it_up(
    redis_store: EmbeddedStore, disks: Disks, ends: str
) -> None:
    later: list[float] = []

    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        operator.shift_clock(lambda: sum(later))
        await operator.until(lambda: steps_of(operator) >= 2)
        run = operator.run()
        assert run["metadata"]["finalizers"] == ["quicktune.dev/wipe"]
        if ends != "clean":
            cluster.answer = lambda pod: (
                disks.answer(pod)
                if document_of(pod)[0] != "garbage"
                else (75, "") if ends == "failing" else None
            )  # fmt: skip
        cluster.delete_gracefully(run, "tuningruns")
        if ends == "hanging":
            await operator.until(
                lambda: any("wipe" in j["metadata"]["name"] for j in cluster.jobs())
            )
            await asyncio.sleep(0.1)
            assert ("tuningruns", "default", "toy") in cluster.objects
            later.append(700.0)
        await operator.until(lambda: ("tuningruns", "default", "toy") not in cluster.objects)

    other = disks.folder("shared") / "team" / "runs" / "another"
    other.mkdir(parents=True)
    cluster, run, _ = play(
        redis_store, disks, scenario, checkpoint=SHARED, deletionPolicy="Delete",
        budget={"maxSteps": 40},
    )  # fmt: skip

    mine = disks.folder("shared") / "team" / "runs" / run["metadata"]["uid"]
    assert mine.exists() is (ends != "clean")
    assert other.is_dir()
    reasons = [o["reason"] for (plural, *_), o in cluster.objects.items() if plural == "events"]
    assert ("NotWiped" in reasons) is (ends != "clean")


def test_no_finalizer_is_set_where_nothing_of_the_users_must_be_wiped(
    redis_store: EmbeddedStore, disks: Disks
) -> None:
    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        await operator.until(lambda: steps_of(operator) >= 1)
        assert not operator.run()["metadata"].get("finalizers")
        await operator.edit(deletionPolicy="Delete")
        await operator.until(lambda: bool(operator.run()["metadata"].get("finalizers")))
        await operator.edit(deletionPolicy="Retain")
        await operator.until(lambda: not operator.run()["metadata"].get("finalizers"))

    play(redis_store, disks, scenario, checkpoint=SHARED, budget={"maxSteps": 40})


def test_the_ledger_of_a_deleted_run_is_parted_with(
    redis_store: EmbeddedStore, disks: Disks
) -> None:
    async def scenario(cluster: FakeCluster, operator: FakeOperator) -> None:
        await operator.until(lambda: steps_of(operator) >= 2)
        run = operator.run()
        log = f"qtt:{{{run['metadata']['uid']}}}:log"
        assert await operator.client.ttl(log) == -1
        cluster.remove(run, "tuningruns")
        await operator.until(lambda: not operator.reconciler.active)
        async with asyncio.timeout(10):
            while await operator.client.ttl(log) < 0:
                await asyncio.sleep(0.01)

    play(redis_store, disks, scenario, budget={"maxSteps": 40})


def test_chores_are_no_business_of_the_planner(redis_store: EmbeddedStore, disks: Disks) -> None:
    cluster, _, _ = play(redis_store, disks)

    (job,) = [j for j in cluster.jobs() if "-gc-" in j["metadata"]["name"]]
    labels = job["metadata"]["labels"]
    assert labels["app.kubernetes.io/component"] == "garbage"
    assert not {"quicktune.dev/config", "quicktune.dev/attempt"} & labels.keys()
    assert document_of(job)[1].cards == ()

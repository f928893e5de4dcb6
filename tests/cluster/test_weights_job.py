"""The Job that fills a claim with weights: when it is made, what it mounts, whom it lets out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qtt_core.hub import load_hub
from qtt_core.jobs import JobDocument, Limits, Paths, Task
from qtt_core.ledger.events import Close, Event, Open, Prepared, Retry, WeightsFetched
from qtt_core.plan import CreateJob, Supply
from qtt_core.results import EXIT_CODES, State, StepResult
from qtt_core.spec import TuningRun, parse_manifest
from qtt_operator.cluster import CLAIMS, JOBS, RUNS, Object
from qtt_operator.isolation import STEPS, build_way_out
from qtt_operator.manifests import build_job
from qtt_operator.names import COMPONENT_LABEL, FILLED_BY_ANNOTATION
from qtt_operator.owner import RunObject
from qtt_operator.pods import JobRequest
from qtt_operator.redis_ledger import RedisLedger
from qtt_operator.settings import ClaimDefaults, OperatorSettings
from qtt_operator.store import EmbeddedStore
from qtt_operator.supplies import supply_of, ties_to_one_node
from tests.cluster.fake_cluster import FakeCluster, document_of
from tests.cluster.fake_operator import SETTINGS, FakeOperator, manifest

SEARCH = {"space": "native", "hub": "timm24", "portfolio": "None", "poolSize": 16,
          "models": ["edgenext_xx_small", "dla46x_c"]}  # fmt: skip
MODELS = ("edgenext_xx_small", "dla46x_c")
CLAIM = ("persistentvolumeclaims", "default", "toy-weights")
RWX = replace(SETTINGS, weights_defaults=ClaimDefaults(accessModes=("ReadWriteMany",), size="9Gi"))


def events_of(store: EmbeddedStore, cluster: FakeCluster) -> list[Event]:
    async def read() -> list[Event]:
        client = store.client()
        try:
            uid = cluster.objects[("tuningruns", "default", "toy")]["metadata"]["uid"]
            return await RedisLedger.reader(client, uid).read()
        finally:
            await client.aclose()

    return asyncio.run(read())


def play(
    store: EmbeddedStore,
    *,
    settings: OperatorSettings = SETTINGS,
    before: Callable[[FakeCluster], None] = lambda _cluster: None,
    until: Callable[[FakeCluster, FakeOperator], bool] = lambda _c, o: o.is_true("Complete"),
    **spec: Any,
) -> FakeCluster:
    """A run of models whose weights come from a hub, until something is so."""
    cluster = FakeCluster()
    before(cluster)

    async def main() -> None:
        await cluster.create(RUNS, "default", manifest(**{"search": SEARCH, **spec}))
        operator = FakeOperator(cluster, store, settings=settings)
        async with operator.running():
            await operator.until(lambda: until(cluster, operator))

    asyncio.run(main())
    return cluster


def names(cluster: FakeCluster) -> list[str]:
    return [job["metadata"]["name"] for job in cluster.jobs()]


def claims_of(job: Object) -> dict[str, tuple[str, bool]]:
    """Mount path -> (claim, read-only)."""
    pod = job["spec"]["template"]["spec"]
    sources = {v["name"]: v.get("persistentVolumeClaim") for v in pod["volumes"]}
    return {
        mount["mountPath"]: (source["claimName"], mount.get("readOnly", False))
        for mount in pod["containers"][0]["volumeMounts"]
        if (source := sources[mount["name"]]) is not None
    }


def refuse(cluster: FakeCluster) -> None:
    """No weights come; all else works."""

    def answer(pod: Object) -> tuple[int, str]:
        command, document = document_of(pod)
        if command != "weights":
            return cluster.succeed(pod)
        state = State.WEIGHTS_UNAVAILABLE
        said = StepResult(
            attempt=document.attempt, nonce=document.nonce, state=state,
            reason="no weights for dla46x_c (1 of 2): hub:443 cannot be reached",
        )  # fmt: skip
        return EXIT_CODES[state], said.encode()

    cluster.answer = answer


def test_one_job_fills_a_claim_that_every_later_pod_mounts_read_only(
    redis_store: EmbeddedStore,
) -> None:
    cluster = play(redis_store)

    events = events_of(redis_store, cluster)
    assert [n for n in names(cluster) if "weights" in n] == ["toy-weights-a0"]
    kinds = [e.c for e in events if isinstance(e, Open)]
    assert kinds[:2] == ["weights", "prepare"]
    assert next(e for e in events if isinstance(e, WeightsFetched)).models == MODELS
    assert cluster.objects[CLAIM]["spec"]["resources"]["requests"]["storage"] == "20Gi"
    for job in cluster.jobs():
        kind = job["metadata"]["labels"][COMPONENT_LABEL]
        wanted = {"weights": ("toy-weights", False), "garbage": None}
        assert claims_of(job).get("/weights") == wanted.get(kind, ("toy-weights", True))


def test_steps_are_told_where_the_weights_lie_and_stay_offline(redis_store: EmbeddedStore) -> None:
    cluster = play(redis_store)

    for job in cluster.jobs():
        command, document = document_of(job)
        if command in {"prepare", "step"}:
            assert document.paths.weights == "/weights"
            assert document.flags.offline


def test_the_claim_of_a_run_goes_with_it_and_is_no_claim_of_checkpoints(
    redis_store: EmbeddedStore,
) -> None:
    cluster = play(redis_store, deletionPolicy="Retain")

    metadata = cluster.objects[CLAIM]["metadata"]
    assert [o["name"] for o in metadata["ownerReferences"]] == ["toy"]
    assert "quicktune.dev/run-uid" not in metadata["labels"]


def test_where_many_nodes_can_mount_it_one_claim_serves_the_namespace(
    redis_store: EmbeddedStore,
) -> None:
    cluster = play(redis_store, settings=RWX)

    claim = cluster.objects[("persistentvolumeclaims", "default", "quicktune-weights")]
    assert "ownerReferences" not in claim["metadata"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert CLAIM not in cluster.objects


def test_a_hub_that_cannot_be_reached_is_a_condition_before_any_step(
    redis_store: EmbeddedStore,
) -> None:
    cluster = play(
        redis_store,
        before=refuse,
        until=lambda _c, o: o.condition("Accepted").get("reason") == "WeightsMissing",
    )

    run = cluster.objects[("tuningruns", "default", "toy")]
    (accepted,) = [c for c in run["status"]["conditions"] if c["type"] == "Accepted"]
    assert accepted["status"] == "False"
    for words in ("dla46x_c", "hub:443", "qtt weights fetch --hub timm24", "toy-weights"):
        assert words in accepted["message"]
    assert names(cluster) == ["toy-weights-a0", "toy-weights-a1", "toy-weights-a2"]
    assert not [e for e in events_of(redis_store, cluster) if isinstance(e, Prepared)]


def test_a_token_after_the_network_was_opened_lets_the_run_go_on(
    redis_store: EmbeddedStore,
) -> None:
    cluster = FakeCluster()
    refuse(cluster)

    async def main() -> None:
        await cluster.create(RUNS, "default", manifest(search=SEARCH))
        operator = FakeOperator(cluster, redis_store)
        async with operator.running():
            await operator.until(
                lambda: operator.condition("Accepted").get("reason") == "WeightsMissing"
            )
            cluster.answer = cluster.succeed
            note = {"metadata": {"annotations": {"quicktune.dev/retry": "open"}}}
            await cluster.patch(RUNS, "default", "toy", note)
            await operator.until(lambda: operator.is_true("Complete"))
            assert operator.is_true("Accepted")

    asyncio.run(main())

    assert [n for n in names(cluster) if "weights" in n][-1] == "toy-weights-a3"


@pytest.mark.parametrize("stage", ["opened", "created", "running", "fetched"])
def test_an_operator_that_dies_around_the_fetch_fetches_once(
    redis_store: EmbeddedStore, stage: str
) -> None:
    cluster = FakeCluster()
    hold = stage in {"created", "running"}
    cluster.answer = lambda pod: None if hold else cluster.succeed(pod)
    reached: dict[str, Callable[[], bool]] = {
        "opened": lambda: cluster.calls[("POST", "jobs")] > 1,  # beside the dry run
        "created": lambda: "toy-weights-a0" in names(cluster),
        "running": lambda: any(p["status"]["phase"] == "Running" for p in cluster.pods()),
        "fetched": lambda: "toy-prepare-a0" in names(cluster),
    }

    async def main() -> None:
        await cluster.create(RUNS, "default", manifest(search=SEARCH))
        if stage == "opened":
            cluster.faults += [("POST", "jobs", 500)] * 3
        first = FakeOperator(cluster, redis_store, epoch=1)
        async with first.running():
            await first.until(reached[stage])
        cluster.faults.clear()
        cluster.answer = cluster.succeed
        second = FakeOperator(cluster, redis_store, epoch=2)
        async with second.running():
            await second.until(lambda: second.is_true("Complete"))

    asyncio.run(main())

    events = events_of(redis_store, cluster)
    assert len([e for e in events if isinstance(e, WeightsFetched)]) == 1
    assert not [e for e in events if isinstance(e, Retry)]
    assert [n for n in names(cluster) if "weights" in n] == ["toy-weights-a0"]
    assert isinstance(events[-1], Close) or any(isinstance(e, Close) for e in events)


def test_a_shared_claim_that_nobody_provides_is_named_after_a_minute(
    redis_store: EmbeddedStore,
) -> None:
    cluster = FakeCluster()
    cluster.answer = lambda _pod: None
    advance = cluster._advance
    cluster._advance = lambda job: advance(job) if len(cluster.pods()) == 0 else None  # type: ignore[method-assign]

    async def main() -> None:
        await cluster.create(RUNS, "default", manifest(search=SEARCH))
        operator = FakeOperator(cluster, redis_store, settings=RWX)
        async with operator.running():
            await operator.until(lambda: len(cluster.pods()) == 1)
            claim = cluster.objects[("persistentvolumeclaims", "default", "quicktune-weights")]
            cluster.change({**claim, "status": {"phase": "Pending"}}, CLAIMS.plural)
            operator.shift_clock(lambda: 70.0)
            operator.queue.add(("default", "toy"), 0.0)
            await operator.until(
                lambda: (
                    operator.condition("Progressing").get("reason") == "ReadWriteManyUnavailable"
                )
            )
            said = operator.condition("Progressing")["message"]
            assert "quicktune-weights asks the default class for ReadWriteMany" in said
            assert "trainer.weights.storageClassName" in said

    asyncio.run(main())


def test_a_claim_of_an_earlier_run_of_this_name_is_left_to_go(redis_store: EmbeddedStore) -> None:
    def earlier(cluster: FakeCluster) -> None:
        owner = {"kind": "TuningRun", "name": "toy", "uid": "of-the-one-before"}
        cluster.objects[CLAIM] = {
            "metadata": {
                "name": "toy-weights", "namespace": "default", "uid": "old",
                "ownerReferences": [owner],
            }
        }  # fmt: skip

    def opened(cluster: FakeCluster, _operator: FakeOperator) -> bool:
        old = cluster.objects.get(CLAIM, {"metadata": {"uid": ""}})["metadata"]["uid"] == "old"
        if old and cluster.calls[("GET", "persistentvolumeclaims")] > 3:  # it has looked, and waits
            assert names(cluster) == []
            del cluster.objects[CLAIM]
        return bool(names(cluster))

    cluster = play(redis_store, before=earlier, until=opened)

    assert cluster.objects[CLAIM]["metadata"]["uid"] != "old"


@pytest.mark.parametrize(
    ("spec", "settings", "claim", "fetches"),
    [
        ({}, {}, "birds-weights", True),
        ({"search": {"space": "native", "hub": "tiny"}}, {}, "", False),
        ({"weights": {"fetch": "Never"}}, {}, "", False),
        ({}, {"weights_fetch": "Never"}, "", False),
        ({"weights": {"fetch": "Auto"}}, {"weights_fetch": "Never"}, "birds-weights", True),
        ({}, {"weights_claim": "timm"}, "timm", True),
        ({"weights": {"fetch": "Never"}}, {"weights_claim": "timm"}, "timm", False),
        ({"weights": {"claimName": "mine"}}, {"weights_claim": "timm"}, "mine", True),
        ({"weights": {"claimName": "mine", "fetch": "Never"}}, {}, "mine", False),
        ({"search": {"space": "native", "hub": "tiny"}}, {"weights_claim": "timm"}, "", False),
        ({"trainer": {"custom": True, "devices": 1}}, {}, "", False),
        ({"trainer": {"custom": True, "devices": 1}, "weights": {"fetch": "Auto"}}, {},
         "birds-weights", True),
    ],
    ids=["default", "shipped weights", "never", "never here", "auto all the same",
         "the install's claim", "the install's, filled", "the user's claim", "the user's, filled",
         "shipped weights need no claim", "a trainer of one's own", "of one's own that asks"],
)  # fmt: skip
def test_where_weights_come_from(
    spec: dict[str, Any], settings: dict[str, Any], claim: str, fetches: bool
) -> None:
    run = birds(**spec)
    hub = load_hub(run.spec.search.hub)

    supply = supply_of(run, hub, OperatorSettings(**settings))

    assert supply.claim == claim
    assert supply.models == (tuple(hub.names) if fetches else ())
    assert supply.offline


def test_a_hub_of_ones_own_is_named_as_the_file_it_is_kept_in() -> None:
    run = birds(search={"space": "native", "hubRef": {"name": "mine", "key": "cards.json"}})

    assert supply_of(run, load_hub("timm24"), OperatorSettings()).hub == "cards.json"


def birds(**spec: Any) -> TuningRun:
    return parse_manifest(
        {
            "apiVersion": "quicktune.dev/v1alpha1", "kind": "TuningRun",
            "metadata": {"name": "birds", "namespace": "vision"},
            "spec": {"dataset": {"claimName": "d"}, "budget": {"maxSteps": 4}, **spec},
        }
    )  # fmt: skip


def rendered(settings: OperatorSettings, **spec: Any) -> Object:
    run = birds(**spec)
    job = CreateJob(
        kind="weights", c="weights", frm=0, to=1, attempt=0, decision="d", timeout_seconds=60.0
    )
    document = JobDocument(
        run_uid="u", attempt=0, nonce="n", task=Task(data="/data"),
        paths=Paths(root="/checkpoints", weights="/weights"), limits=Limits(wall_s=60.0),
    )  # fmt: skip
    request = JobRequest(
        job=job, name="birds-weights-a0", document=document, opened=None, epoch=1,
        weights="birds-weights",
    )  # fmt: skip
    return build_job(RunObject(run=run, uid="u"), request, settings)


def test_the_pod_mounts_its_claim_alone_and_only_it_asks_a_hub() -> None:
    mine = {"name": "trainer", "image": "me:1", "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}]}
    mine["resources"] = {"limits": {"nvidia.com/gpu": 1, "memory": "24Gi"}}  # type: ignore[assignment]
    job = rendered(
        OperatorSettings(weights_endpoint="http://mirror:8080", trainer_image="ours:1"),
        template={"spec": {"containers": [mine]}}, queueName="gpus",
        trainer={"custom": True, "devices": 1}, weights={"fetch": "Auto"},
    )  # fmt: skip

    (trainer,) = job["spec"]["template"]["spec"]["containers"]
    env = {e["name"]: e["value"] for e in trainer["env"]}
    assert claims_of(job) == {"/weights": ("birds-weights", False)}
    assert (trainer["args"], trainer["image"]) == (["weights"], "ours:1")
    assert (env["HF_HUB_OFFLINE"], env["HF_ENDPOINT"]) == ("0", "http://mirror:8080")
    assert "nvidia.com/gpu" not in json.dumps(trainer["resources"])
    assert not [label for label in job["metadata"]["labels"] if "kueue" in label]


def test_a_volume_of_one_node_ties_all_pods_to_it() -> None:
    template = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    spec = {"checkpoint": {"scope": "Config", "volumeClaimTemplate": template}}
    tied = rendered(OperatorSettings(), **spec)
    named = rendered(OperatorSettings(), weights={"claimName": "timm"}, **spec)

    assert "podAffinity" in tied["spec"]["template"]["spec"]["affinity"]
    assert "affinity" not in named["spec"]["template"]["spec"]
    assert not ties_to_one_node(birds(), "quicktune-weights", RWX)


@pytest.mark.parametrize(
    ("endpoint", "ports"),
    [("", [443]), ("https://mirror", [443]), ("http://mirror", [443, 80]),
     ("http://mirror:8080/hub", [443, 8080])],
)  # fmt: skip
def test_the_way_out_is_for_pods_that_fetch_and_for_names_and_the_hub_only(
    endpoint: str, ports: list[int]
) -> None:
    spec = build_way_out("vision", endpoint)["spec"]
    labels = rendered(OperatorSettings())["spec"]["template"]["metadata"]["labels"]

    assert spec["podSelector"]["matchLabels"] == {**STEPS, COMPONENT_LABEL: "weights"}
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    names, hosts = spec["egress"]
    assert [p["port"] for p in names["ports"]] == [53, 53]
    assert [p["port"] for p in hosts["ports"]] == ports
    assert "ingress" not in spec
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}


def test_a_claim_that_nobody_can_write_to_is_taken_as_it_is(redis_store: EmbeddedStore) -> None:
    def read_only(cluster: FakeCluster) -> None:
        cluster.objects[("persistentvolumeclaims", "default", "timm")] = {
            "metadata": {"name": "timm", "namespace": "default", "uid": "w"},
            "spec": {"accessModes": ["ReadOnlyMany"]},
        }

    cluster = play(redis_store, before=read_only, weights={"claimName": "timm"})

    assert not [n for n in names(cluster) if "weights" in n]


def test_the_installs_claim_is_waited_for_where_it_is_needed(redis_store: EmbeddedStore) -> None:
    cluster = play(
        redis_store,
        settings=replace(SETTINGS, weights_claim="timm"),
        until=lambda _c, o: o.condition("Accepted").get("reason") == "WeightsMissing",
    )

    (accepted,) = cluster.objects[("tuningruns", "default", "toy")]["status"]["conditions"]
    assert "timm" in accepted["message"]


# --- the data set's claim, filled by a Job --------------------------------------------------------


def filled_by(cluster: FakeCluster, name: str = "fill") -> None:
    claim = cluster.objects[("persistentvolumeclaims", "default", "data")]
    claim["metadata"]["annotations"] = {FILLED_BY_ANNOTATION: name}


def filling(kind: str) -> Object:
    return {
        "metadata": {"name": "fill", "namespace": "default"},
        "status": {"conditions": [{"type": kind, "status": "True"}]},
    }


@pytest.mark.parametrize(
    ("job", "words"),
    [(None, "is not there"), ({"metadata": {"name": "fill", "namespace": "default"}}, "not filled"),
     (filling("Failed"), "has failed"), (filling("Suspended"), "not filled")],
    ids=["absent", "at work", "failed", "suspended"],
)  # fmt: skip
def test_a_run_waits_for_the_job_that_fills_its_data_set(
    redis_store: EmbeddedStore, job: Object | None, words: str
) -> None:
    def fill(cluster: FakeCluster) -> None:
        filled_by(cluster)
        if job is not None:
            cluster.objects[("jobs", "default", "fill")] = job

    cluster = play(
        redis_store, before=fill,
        until=lambda _c, o: o.condition("Accepted").get("reason") == "DatasetNotFound",
    )  # fmt: skip

    (accepted,) = cluster.objects[("tuningruns", "default", "toy")]["status"]["conditions"]
    assert words in accepted["message"]
    assert "fill" in accepted["message"]


def test_a_data_set_that_its_job_has_filled_is_read() -> None:
    from qtt_operator.references import require_claims

    cluster = FakeCluster()
    filled_by(cluster)
    cluster.objects[("jobs", "default", "fill")] = filling("Complete")
    run = birds(dataset={"claimName": "data"})
    run = replace(run, namespace="default")

    supply = asyncio.run(require_claims(cluster, run, Supply(), ours=False))  # type: ignore[arg-type]

    assert supply == Supply()
    assert cluster.calls[("GET", JOBS.plural)] == 1
    assert cluster.calls[("GET", CLAIMS.plural)] == 1

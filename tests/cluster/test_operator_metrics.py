"""Every metric of the table gets its values where the facts arise, with bounded labels."""

from __future__ import annotations

import asyncio
import re
import uuid
from dataclasses import replace

from qtt_core.results import EXIT_CODES, State
from qtt_core.testing.trainer import result_of
from qtt_operator.cluster import RUNS, Object
from qtt_operator.leader import Leader
from qtt_operator.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metrics
from qtt_operator.optimizer_share import OptimizerShare
from qtt_operator.store import EmbeddedStore
from qtt_operator.vitals import CountedWorkers, Vitals
from tests.cluster.fake_cluster import FakeCluster, document_of
from tests.cluster.fake_operator import FakeOperator, manifest
from tests.cluster.http_cluster import HttpCluster

NEED_A_FAULT = {
    "optimizer_worker_restarts",
    "optimizer_fallback_asks",
    "store_errors",
    "reconcile_errors",
    "api_throttled_seconds",
}
"""Set by what a good run does not show; `test_optimizer_share` and below drive them."""

PHASES = {"queue", "schedule", "pull", "startup", "load", "train", "eval", "save", "collect"}


def answering(cluster: FakeCluster) -> None:
    """Trainers that say how long each part took; the first step is preempted once."""
    spared = []

    def answer(pod: Object) -> tuple[int, str]:
        command, document = document_of(pod)
        if command == "step" and not spared:
            spared.append(document.step)
            return 143, ""
        result = result_of(command, document, cluster.volume)
        timing = {"load": 0.5, "train": 2.0, "wait": 0.5, "eval": 0.2, "save": 0.1}
        result = replace(
            result, timing=timing, gpu=f"GPU-{document.config_id}", images_per_second=150.0,
            memory_mb=900,
        )  # fmt: skip
        return EXIT_CODES[State.OK], result.encode()

    cluster.answer = answer


def test_a_run_gives_every_metric_a_value_and_its_own_series_end_with_it(
    redis_store: EmbeddedStore,
) -> None:
    texts = asyncio.run(scraped(redis_store))

    during, after = "\n".join(texts), texts[-1]
    missing = {
        name
        for name in (*GAUGES, *COUNTERS, *HISTOGRAMS)
        if not _has_sample(during, name) and name not in NEED_A_FAULT
    }
    assert not missing
    assert set(re.findall(r'step_phase_seconds_count{phase="(\w+)"}', after)) == PHASES
    assert 'quicktune_steps_total{namespace="default",outcome="ok"} 6.0' in after
    assert 'quicktune_step_data_wait_ratio_bucket{le="0.3"} 6.0' in after
    assert "quicktune_step_images_per_second_sum 900.0" in after
    assert "quicktune_step_peak_memory_bytes_sum 5.4e+09" in after
    assert 'quicktune_step_failures_total{namespace="default",reason="preempted"} 1.0' in after
    assert 'quicktune_runs{namespace="default",phase="Completed"} 1.0' in after
    assert 'run="toy"' in during
    assert 'run="toy"' not in after
    words = set(re.findall(r'="([^"]*)"', after))
    assert not any(re.search(r"toy-|-c\d+-f\d+|[0-9a-f]{32}", word) for word in words)


def _has_sample(text: str, name: str) -> bool:
    """A gauge or a labelled series that was set; of one without labels, that it was raised."""
    suffix = "_total" * (name in COUNTERS) + "_count" * (name in HISTOGRAMS)
    found = re.findall(rf"^quicktune_{name}{suffix}({{.*}})? (\S+)$", text, re.MULTILINE)
    return any(labels or name in GAUGES or float(value) > 0 for labels, value in found)


async def scraped(store: EmbeddedStore) -> list[str]:
    """What Prometheus would have read, again and again, of one run on a server of HTTP."""
    fake, metrics, texts = FakeCluster(), Metrics(), list[str]()
    answering(fake)
    share = OptimizerShare(1, news=CountedWorkers(metrics))
    async with HttpCluster(fake).serve(qps=1000.0, burst=1000, observer=metrics.api_called) as api:
        await fake.create(RUNS, "default", manifest())
        operator = FakeOperator(fake, store, api=api, share=share, metrics=metrics)
        leader = Leader(
            api, namespace="default", name="lease", identity="a", highest_epoch=_no_epoch
        )
        await leader.acquire()
        vitals = Vitals(
            metrics, cluster=api, leader=leader, queue=operator.queue, copies=operator.copies
        )
        vitals.reconciler, vitals.working = operator.reconciler, True
        tasks = [asyncio.create_task(vitals.watch_loop()), asyncio.create_task(leader.keep())]
        try:
            async with operator.running():
                while not operator.is_true("Complete") or operator.reconciler.active:
                    await asyncio.sleep(0.1)
                    texts.append(vitals.text().decode())
                assert vitals.unready() == ""
                assert vitals.unwell() == ""
        finally:
            for task in tasks:
                task.cancel()
            await share.close()
    return texts


async def _no_epoch() -> int:
    return 0


def test_products_that_trainers_claim_make_no_more_than_a_few_series(
    redis_store: EmbeddedStore,
) -> None:
    cluster = FakeCluster()
    texts = []

    def answer(pod: Object) -> tuple[int, str]:
        command, document = document_of(pod)
        result = replace(
            result_of(command, document, cluster.volume), gpu=uuid.uuid4().hex if command else ""
        )
        return EXIT_CODES[State.OK], result.encode()

    async def main() -> None:
        cluster.answer = answer
        many = manifest(budget={"maxSteps": 45}, parallelism=8)
        await cluster.create(RUNS, "default", many)
        operator = FakeOperator(cluster, redis_store)
        async with operator.running():
            await operator.until(lambda: operator.is_true("Complete"), 60.0)
            texts.append(operator.metrics.text().decode())

    asyncio.run(main())

    products = set(re.findall(r'gpu_product="([^"]*)"', texts[0]))
    assert "other" in products
    assert len(products) <= 34

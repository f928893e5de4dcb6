"""The policy that cuts steps off is there before the first of them, and is made once."""

from __future__ import annotations

import asyncio

import pytest

from qtt_core.errors import ClusterError
from qtt_operator.isolation import NAME, POLICIES, build_policy, isolate
from qtt_operator.owner import MANAGED
from tests.cluster.fake_cluster import FakeCluster

KEY = (POLICIES.plural, "vision", NAME)


def test_the_policy_chooses_every_pod_of_a_step_and_lets_nothing_through() -> None:
    spec = build_policy("vision")["spec"]

    assert spec["podSelector"]["matchLabels"].items() <= MANAGED.items()
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert not {"ingress", "egress"} & spec.keys()


def test_it_is_made_once_and_left_alone_afterwards() -> None:
    cluster = FakeCluster()
    asyncio.run(isolate(cluster, "vision"))  # type: ignore[arg-type]
    cluster.objects[KEY]["spec"]["policyTypes"] = ["Ingress"]

    asyncio.run(isolate(cluster, "vision"))  # type: ignore[arg-type]

    assert cluster.objects[KEY]["spec"]["policyTypes"] == ["Ingress"]


@pytest.mark.parametrize(("status", "raises"), [(409, False), (403, True)])
def test_another_operator_may_be_first_and_a_missing_right_is_said(
    status: int, raises: bool
) -> None:
    cluster = FakeCluster()
    cluster.faults.append(("POST", POLICIES.plural, status))

    if raises:
        with pytest.raises(ClusterError):
            asyncio.run(isolate(cluster, "vision"))  # type: ignore[arg-type]
    else:
        asyncio.run(isolate(cluster, "vision"))  # type: ignore[arg-type]

"""What the operators of the whole suite asked of the API server is what the chart grants, exactly.

`run_tests.sh` runs this last, on the audit log of all tests before it. With QTT_WHOLE_SUITE unset,
as after a part of the suite, a right that nobody used is no fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from real_cluster import Object, Testbed, command
from rights import Right, granted_by, right

pytestmark = [pytest.mark.testbed, pytest.mark.slow]  # slow: none of the parts before may run it

ACCOUNT = "quicktune-operator"
WHOLE = bool(os.environ.get("QTT_WHOLE_SUITE"))
VIOLATIONS = "pod-security.kubernetes.io/audit-violations"


def requests(testbed: Testbed) -> Iterator[Object]:
    """Every request of an operator's own account, in whichever namespace it was installed."""
    with (testbed.folder / "log" / "audit.jsonl").open() as log:
        for line in log:
            if f':{ACCOUNT}"' not in line or not line.endswith("\n"):
                continue
            event = json.loads(line)
            name = event["user"].get("username", "")
            if name.startswith("system:serviceaccount:") and name.endswith(f":{ACCOUNT}"):
                yield event


@pytest.fixture(scope="module")
def asked(testbed: Testbed) -> list[Object]:
    """Requests for objects; those for `/api` and its like need no right of ours."""
    found = [event for event in requests(testbed) if "objectRef" in event]
    if not found and not WHOLE:
        pytest.skip("no test before this one had an operator")
    return found


@pytest.fixture(scope="module")
def granted(root: Path) -> set[Right]:
    """What the chart's roles allow in cluster-wide mode."""
    text = command(str(root / "tests" / "testbed" / "operator.sh"))
    roles = [
        item
        for item in yaml.safe_load_all(text)
        if item
        and item["kind"] in {"ClusterRole", "Role"}
        and item["metadata"]["name"] in {ACCOUNT, f"{ACCOUNT}-lease"}
    ]
    assert len(roles) == 2
    return granted_by(roles)


def test_nothing_that_the_operator_asked_for_is_missing_from_its_role(
    asked: list[Object], granted: set[Right]
) -> None:
    assert {right(event) for event in asked} - granted == set()


def test_nobody_refused_the_operator_for_want_of_a_right(asked: list[Object]) -> None:
    """Not counted: what the same account was granted in the same place at another time.

    A server that has just started has not read its roles yet, and an uninstall takes the role
    before the pod that holds a Lease. Nor a namespace on its way out.
    """

    def claim(event: Object) -> tuple[str, Right, str]:
        return event["user"]["username"], right(event), event["objectRef"].get("namespace", "")

    refused, allowed = {}, set()
    for event in asked:
        status = event.get("responseStatus", {})
        if status.get("code") != 403:
            allowed.add(claim(event))
        elif "is being terminated" not in status.get("message", ""):
            refused[claim(event)] = status.get("message")

    assert {asked: why for asked, why in refused.items() if asked not in allowed} == {}


def test_every_right_was_used_by_the_suite(asked: list[Object], granted: set[Right]) -> None:
    if not WHOLE:
        pytest.skip("only a part of the suite was run: a right that it did not use is no fault")

    assert granted - {right(event) for event in asked} == set()


def test_the_restricted_standard_has_nothing_against_what_the_operator_made(
    asked: list[Object],
) -> None:
    made = [event for event in asked if event["verb"] == "create"]
    found = {e["annotations"][VIOLATIONS] for e in made if VIOLATIONS in e.get("annotations", {})}

    assert {event["objectRef"]["resource"] for event in made} >= {"jobs"}
    assert found == set()

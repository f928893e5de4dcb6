"""TuningRuns whose steps only pretend to train; all else, from API server to volume, is real.

`simulated` is the manifest, `Run` what a test says to one that is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ledger_reader import ended_attempt, epochs_of, events_of, faults, of_kind
from manifests import TRAINER
from real_cluster import Kube, RefusedError, until

Object = dict[str, Any]

SIMULATED_TRAINER = ("python", "-m", "qtt_core.testing.trainer")
ENDED_JOB = {"Complete", "Failed", "FailureTarget", "SuccessCriteriaMet"}


def simulated(
    name: str = "sim",
    *,
    seconds: float = 0.0,
    container: Mapping[str, Any] | None = None,
    pod: Mapping[str, Any] | None = None,
    **spec: Any,
) -> Object:
    """A run of steps that sleep; `container`, `pod` and `spec` overwrite."""
    trainer = {
        "name": "trainer", "image": TRAINER, "command": list(SIMULATED_TRAINER),
        "env": [{"name": "QTT_SLEEP", "value": str(seconds)}],
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        **(container or {}),
    }  # fmt: skip
    template = {"terminationGracePeriodSeconds": 5, "containers": [trainer], **(pod or {})}
    return {
        "apiVersion": "quicktune.dev/v1alpha1", "kind": "TuningRun", "metadata": {"name": name},
        "spec": {
            "dataset": {"claimName": "data"}, "search": {"space": "native", "hub": "tiny"},
            "optimizer": {"algorithm": "Random", "seed": 0}, "trainer": {"custom": True},
            "fidelity": {"max": 4, "step": 1, "stepsPerJob": 1}, "budget": {"maxSteps": 4},
            "template": {"spec": template}, **spec,
        },
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One TuningRun on the cluster. `system`: the namespace of operator and Redis."""

    kube: Kube
    system: Kube
    name: str

    @property
    def uid(self) -> str:
        """Its uid on the server."""
        return str(self.get()["metadata"]["uid"])

    def get(self) -> Object:
        """The object as it is. Raises: LookupError if it is gone."""
        return self.kube.get("tuningrun", self.name)

    def status(self) -> Object:
        """Its status, {} before the first one."""
        found: Object = self.get().get("status") or {}
        return found

    def patch(self, **spec: Any) -> None:
        """Change fields of the spec, as `kubectl patch --type=merge` does."""
        body = json.dumps({"spec": spec})
        self.kube.kubectl("patch", "tuningrun", self.name, "--type=merge", "-p", body)

    def condition(self, kind: str) -> tuple[str, str]:
        """A condition's (status, reason), ("", "") while there is none."""
        found = (c for c in self.status().get("conditions", ()) if c["type"] == kind)
        return next(((c["status"], c["reason"]) for c in found), ("", ""))

    def until_condition(
        self, kind: str, status: str, *reasons: str, seconds: float = 90.0
    ) -> Object:
        """The condition once it has this status and, if any are given, one of these reasons."""

        def look() -> Object | None:
            for found in self.status().get("conditions", ()):
                if found["type"] == kind and found["status"] == status:
                    return found if not reasons or found["reason"] in reasons else None
            return None

        return until(f"{self.name}: {kind}={status} {reasons}", look, seconds=seconds)

    def complete(self, reason: str = "BudgetExhausted", *, seconds: float = 180.0) -> Object:
        """The status once the run is Complete for this reason; fails at once when it is Failed."""

        def ended() -> bool:
            assert self.condition("Failed")[0] != "True", self.condition("Failed")
            return self.condition("Complete") == ("True", reason)

        until(f"{self.name} is Complete, {reason}", ended, seconds=seconds)
        return self.status()

    def jobs(self, component: str = "step") -> list[Object]:
        """Its Jobs of a kind, oldest decision first."""
        selector = f"quicktune.dev/run={self.name},app.kubernetes.io/component={component}"
        found = self.kube.items("job", selector)
        return sorted(found, key=lambda job: job["metadata"]["creationTimestamp"])

    def live(self) -> list[str]:
        """Names of step Jobs that have not ended."""
        return [job["metadata"]["name"] for job in self.jobs() if not has_ended(job)]

    def pods(self) -> list[Object]:
        """Pods of its steps."""
        selector = f"quicktune.dev/run={self.name},app.kubernetes.io/component=step"
        return self.kube.items("pod", selector)

    def working(self) -> list[Object]:
        """Pods of its steps whose trainer runs now."""
        return [pod for pod in self.pods() if is_running(pod)]

    def until_working(self, count: int, *, seconds: float = 90.0) -> list[Object]:
        """Its step pods once exactly so many run at once."""
        return until(
            f"{count} steps of {self.name} run",
            lambda: found if len(found := self.working()) == count else None,
            seconds=seconds,
        )

    def events(self) -> list[dict[str, str]]:
        """What the ledger says, [] while nothing can be read."""
        try:
            return events_of(self.system, self.uid)
        except RefusedError:
            return []

    def told(self) -> int:
        """Steps with a result in the ledger."""
        return sum(map(len, epochs_of(self.events()).values()))

    def until_told(self, count: int, *, seconds: float = 120.0) -> None:
        """Until at least so many steps have a result."""
        until(f"{count} steps are told", lambda: self.told() >= count, seconds=seconds, every=0.5)

    def ends(self) -> dict[str, str]:
        """How each attempt of a step ended: name of its Job -> kind of the event."""
        events = of_kind(self.events(), "done", "fail", "retry", "cancel")
        return {
            f"{self.name}-c{e['c']}-f{e['to']}-a{ended_attempt(e)}": e["k"]
            for e in events
            if e["c"].isdigit()
        }

    def faults(self, max_steps: int) -> list[str]:
        """What broke of the ledger's invariants."""
        return faults(self.events(), max_steps)


def has_ended(job: Mapping[str, Any]) -> bool:
    """Whether Kubernetes starts no further pod for it."""
    conditions: Sequence[Mapping[str, Any]] = job["status"].get("conditions") or ()
    return any(c["type"] in ENDED_JOB and c["status"] == "True" for c in conditions)


def is_running(pod: Mapping[str, Any]) -> bool:
    """Whether its first container runs and nobody is ending it."""
    statuses = pod["status"].get("containerStatuses") or [{}]
    deleting = "deletionTimestamp" in pod["metadata"]
    return "running" in statuses[0].get("state", {}) and not deleting

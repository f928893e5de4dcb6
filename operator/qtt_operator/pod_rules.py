"""What a run may not ask for in this install, of its pod and of the operator. Pure.

`qtt_core.spec_rules` refuses what no install allows; here are the rules that an admin may lift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtt_core.errors import Fault
from qtt_core.spec import TuningRun
from qtt_operator.abilities import not_installed
from qtt_operator.names import TRAINER
from qtt_operator.settings import OperatorSettings


def refused(run: TuningRun, settings: OperatorSettings) -> list[Fault]:
    """What this run asks for and the install does not allow, or does not have."""
    pod = run.spec.template.get("spec") or {}
    return [*_refused(pod, settings), *(not_installed(run) or _not_allowed(run, settings))]


def _not_allowed(run: TuningRun, settings: OperatorSettings) -> list[Fault]:
    """An entry point is code in the operator's own process: an admin says which ones may run."""
    wanted, allowed = run.spec.optimizer.name, settings.external_optimizers
    if wanted is None or wanted in allowed:
        return []
    remedy = f"is installed, but not allowed here; allowed: {', '.join(allowed) or 'none'}"
    return [Fault("spec.optimizer.name", wanted, remedy)]


def _refused(pod: Mapping[str, Any], settings: OperatorSettings) -> Iterator[Fault]:
    root = "spec.template.spec"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield Fault(f"{root}.{name}", pod[name], "is not allowed")
    account = pod.get("serviceAccountName") or pod.get("serviceAccount")
    if account and account not in settings.allowed_service_accounts:
        yield Fault(f"{root}.serviceAccountName", account, "is not allowed by this install")
    for volume in pod.get("volumes") or ():
        if "hostPath" in volume and not settings.allow_host_path:
            yield Fault(f"{root}.volumes[{volume.get('name')}]", "hostPath", "is not allowed")
        if any(
            "serviceAccountToken" in s for s in (volume.get("projected") or {}).get("sources", ())
        ):
            yield Fault(f"{root}.volumes[{volume.get('name')}]", "a token", "is not allowed")
    for container in [*(pod.get("containers") or ()), *(pod.get("initContainers") or ())]:
        if (container.get("securityContext") or {}).get("privileged"):
            yield Fault(
                f"{root}.containers[{container.get('name')}]", "privileged", "is not allowed"
            )
    extra = [c.get("name") for c in pod.get("containers") or () if c.get("name") != TRAINER]
    if extra:
        remedy = "a second container keeps the pod alive; use initContainers, restartPolicy Always"
        yield Fault(f"{root}.containers", extra, remedy)

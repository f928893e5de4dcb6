"""The images of this checkout start as the operator will start them: any user, read-only root."""

from __future__ import annotations

import pytest
from manifests import OPERATOR, TRAINER, TRAINER_USER, UNPRIVILEGED, mounted, pod
from real_cluster import Kube

pytestmark = pytest.mark.testbed

LOADS = "import sys, qtt_operator.controller; sys.exit('torch' in sys.modules)"
WORKER = (
    "import torch, gpytorch, sklearn, qtt_core.optuna_samplers, qtt_operator.optimizer_worker;"
    " print(torch.__version__)"
)
TRAINS = "import torch, torchvision, timm; print(timm.__version__)"
OPERATOR_MODULE = ["python", "-m", "qtt_operator"]
STARTS = {
    "qtt": (OPERATOR, ["qtt", "--help"], "usage: qtt"),
    "controller": (OPERATOR, [*OPERATOR_MODULE, "controller", "--help"], "--settings"),
    "controller-without-torch": (OPERATOR, ["python", "-c", LOADS], ""),
    "optimizer-worker": (OPERATOR, ["python", "-c", WORKER], "2."),
    "step": (TRAINER, ["python", "-m", "qtt_trainer", "step", "--help"], "--job"),
    "qtt-train-step": (TRAINER, ["qtt-train-step", "--help"], "usage:"),
    "trainer-imports": (TRAINER, ["python", "-c", TRAINS], "1.0.31"),
}  # fmt: skip


def starting(name: str) -> dict[str, object]:
    image, command, _ = STARTS[name]
    tmp, mount = mounted("tmp", "/tmp", emptyDir={})
    container = {
        "image": image, "command": command, "securityContext": UNPRIVILEGED, "volumeMounts": [mount]
    }  # fmt: skip
    return pod(
        name, "", container=container, securityContext=TRAINER_USER, volumes=[tmp],
        automountServiceAccountToken=False,
    )  # fmt: skip


def test_every_entry_point_starts_in_a_restricted_pod(restricted: Kube) -> None:
    restricted.create(*(starting(name) for name in STARTS))

    for name, (_, _, said) in STARTS.items():
        ended = restricted.ended_pod(name, seconds=180)
        log = restricted.logs(name)
        assert ended["exitCode"] == 0, f"{name}: {log}"
        assert said in log, f"{name}: {log}"


def test_the_user_of_the_image_is_not_root(restricted: Kube) -> None:
    for name, image in (("operator", OPERATOR), ("trainer", TRAINER)):
        own = {"image": image, "command": ["id", "-u"], "securityContext": UNPRIVILEGED}
        user = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        restricted.create(pod(name, "", container=own, securityContext=user))

        assert restricted.ended_pod(name)["exitCode"] == 0
        assert restricted.logs(name) == "10001\n"

"""`qtt data push`: a local folder onto a claim, through a short-lived pod that mounts it.

Tar over the API server's exec, as `kubectl cp` does it, but compared by digest on both sides, gone
on with where a push broke off, and visible under its name only when whole. The pod asks for no
right and no token, passes the Pod Security Standard `restricted`, and is deleted however this ends.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qtt_core.errors import (
    ClusterError,
    ClusterUnavailableError,
    Fault,
    NotFoundError,
    SpecError,
    VolumeError,
)
from qtt_operator import push_plan
from qtt_operator.cli import Outcome
from qtt_operator.output import render_one
from qtt_operator.push_plan import Item, Target

TRIES = 3
"""Streams in a row that may break without anything having arrived."""

POD_SECONDS = 6 * 3600
"""A pod that nobody deletes, because this process was killed, ends by itself."""

USER = 10001
"""As steps run: what it writes, they can read."""

CONTAINER = "push"

Run = Callable[[str, Sequence[str], bytes | Iterator[bytes]], str]
"""Runs a script of `push_plan` in the pod with arguments and stdin; what it printed."""


def push_verb(arguments: argparse.Namespace) -> Outcome:
    """`qtt data push DIR CLAIM[:path]`. Raises: SpecError; ClusterError; OSError."""
    if importlib.util.find_spec("kubernetes") is None:
        remedy = "is not installed: pip install 'quicktune-operator[operator]'"
        raise SpecError([Fault("qtt data push", "kubernetes", remedy)])
    target = push_plan.parse_target(arguments.target)
    _say(f"reading {arguments.folder}")
    items = push_plan.scan(arguments.folder, target)
    signal.signal(signal.SIGTERM, _interrupt)  # so that the pod goes, too
    with api_errors():
        api, namespace = _connect(arguments.context, arguments.namespace)
        with pod_on(api, namespace, target, image=arguments.image, wait=arguments.wait) as run:
            sent = push(items, target, run, replace=arguments.replace)
    facts = {
        "claim": target.claim, "path": target.path, "files": len(items),
        "bytes": sum(item.size for item in items), "sent": len(sent),
        "sentBytes": sum(item.size for item in sent),
    }  # fmt: skip
    if arguments.output != "table":
        return Outcome(text=render_one(facts, arguments.output))
    where = f"{target.claim}:{target.path}" if target.path else target.claim
    words = f"{facts['files']} files, {_megabytes(items)} MB on {where}, every digest compared; "
    return Outcome(text=f"{words}{facts['sent']} files were sent\n")


def push(items: Sequence[Item], target: Target, run: Run, *, replace: bool) -> list[Item]:
    """Send what the claim lacks; the items that were sent in this call.

    Raises: SpecError for names that hold something else, unless `replace`; ClusterError for what
    does not arrive as it is here.
    """
    names = push_plan.tops(items)
    there = push_plan.parse_listing(run(push_plan.LIST, [target.parent, *names], b""))
    whole = [n for n in names if _is_whole(n, items, there)]
    items, names = [i for i in items if i.top not in whole], [n for n in names if n not in whole]
    taken = sorted({path.partition("/")[0] for path in there} - {*whole})
    if taken and not replace:
        remedy = f"{target.claim} holds other contents of this name; use --replace, or another path"
        raise SpecError([Fault("CLAIM[:path]", name, remedy) for name in taken])
    if not names:
        return []
    sent = _send(items, names, target, run)
    run(push_plan.COMMIT, [target.stage, target.parent, *names], b"")
    return sent


def _send(items: Sequence[Item], names: Sequence[str], target: Target, run: Run) -> list[Item]:
    """Fill the stage until nothing is missing there."""
    sent: dict[str, Item] = {}
    tries, before = TRIES, len(items) + 1
    while True:
        staged = push_plan.parse_listing(run(push_plan.LIST, [target.stage, *names], b""))
        if staged.keys() - {item.path for item in items}:
            run(push_plan.CLEAR, [target.stage], b"")  # of another push to this target
            staged = {}
        missing = push_plan.missing(items, staged)
        if not missing:
            return list(sent.values())
        tries = TRIES if len(missing) < before else tries - 1
        if not tries:
            raise ClusterError(
                f"{len(missing)} of {len(items)} files do not arrive as they are here, such as"
                f" {missing[0].path}: did they change? The same command goes on"
            )
        before = len(missing)
        _stream(missing, target, run)
        sent |= {item.path: item for item in missing}


def _stream(missing: Sequence[Item], target: Target, run: Run) -> None:
    """Send in batches until all are through or the connection breaks."""
    done = 0
    for batch in push_plan.batches(missing):
        size = push_plan.tar_size(batch)
        try:
            run(push_plan.EXTRACT, [target.stage, str(size)], push_plan.tar_stream(batch))
        except ClusterUnavailableError as error:
            _say(f"{error}; going on")
            return
        done += len(batch)
        _say(f"{done} of {len(missing)} files sent")


def _is_whole(name: str, items: Sequence[Item], there: dict[str, str]) -> bool:
    mine = {item.path: item.mark for item in items if item.top == name}
    return mine == {p: m for p, m in there.items() if p.partition("/")[0] == name}


# --- the pod --------------------------------------------------------------------------------------


def build_pod(name: str, target: Target, image: str) -> dict[str, Any]:
    """A pod that waits for commands beside the claim, as `restricted` allows it."""
    wait = f"trap 'exit 0' TERM; sleep {POD_SECONDS} & wait"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "quicktune-push"}},
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": POD_SECONDS,
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": CONTAINER, "image": image, "command": ["sh", "-c", wait],
                    "securityContext": {
                        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "resources": {
                        "requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"},
                    },
                    "volumeMounts": [{"name": "claim", "mountPath": push_plan.MOUNT}],
                }
            ],
            "volumes": [
                {"name": "claim", "persistentVolumeClaim": {"claimName": target.claim}}
            ],
        },
    }  # fmt: skip


@contextlib.contextmanager
def pod_on(api: Any, namespace: str, target: Target, *, image: str, wait: float) -> Iterator[Run]:
    """A running pod that mounts the claim; deleted when the block ends, also by Ctrl-C.

    Raises: NotFoundError without the claim; ClusterError if the pod does not run in `wait` seconds.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        api.read_namespaced_persistent_volume_claim(target.claim, namespace)
    except ApiException as error:
        if error.status != 404:
            raise
        remedy = f"no such PersistentVolumeClaim in namespace {namespace}"
        raise NotFoundError([Fault("CLAIM[:path]", target.claim, remedy)]) from error
    name = f"qtt-push-{secrets.token_hex(4)}"
    api.create_namespaced_pod(namespace, build_pod(name, target, image))
    try:
        _await_running(api, namespace, name, wait)
        yield lambda script, words, stdin: execute(api, namespace, name, script, words, stdin)
    finally:
        try:
            api.delete_namespaced_pod(name, namespace, grace_period_seconds=0)
        except (ApiException, HTTPError) as error:  # what ended the push is worth more
            _say(f"pod {name} is left, kubectl -n {namespace} delete pod {name}: {error}")


def _await_running(api: Any, namespace: str, name: str, wait: float) -> None:
    until, said = time.monotonic() + wait, ""
    while True:
        status = api.read_namespaced_pod(name, namespace).status
        if status.phase == "Running" and all(s.ready for s in status.container_statuses or ()):
            return
        why = _why_not(status)
        if status.phase in {"Failed", "Succeeded"} or time.monotonic() > until:
            raise ClusterError(f"pod {name} does not run after {wait:.0f} s: {why}")
        if why != said:
            _say(f"waiting for pod {name}: {why}")
            said = why
        time.sleep(0.5)


def _why_not(status: Any) -> str:
    """The scheduler's or the kubelet's words."""
    for container in status.container_statuses or ():
        waiting = container.state.waiting
        if waiting is not None and waiting.message:
            return f"{waiting.reason}: {waiting.message}"
    for condition in status.conditions or ():
        if condition.status == "False" and condition.message:
            return str(condition.message)
    return str(status.message or status.phase)


def execute(
    api: Any, namespace: str, name: str, script: str, words: Sequence[str],
    stdin: bytes | Iterator[bytes],
) -> str:  # fmt: skip
    """Run a script in the pod; its standard output.

    Raises: ClusterError, for a full volume VolumeError, with what it printed on stderr;
    ClusterUnavailableError if the connection breaks.
    """
    from kubernetes.stream import stream
    from websocket import WebSocketException

    out: list[bytes] = []
    errors: list[bytes] = []
    try:
        with api_errors():
            socket = stream(
                api.connect_get_namespaced_pod_exec, name, namespace, container=CONTAINER,
                command=["sh", "-c", script, "sh", *words], stdin=True, stdout=True, stderr=True,
                tty=False, binary=True, _preload_content=False,
            )  # fmt: skip
        with contextlib.closing(socket):
            _write(socket, [stdin] if isinstance(stdin, bytes) else stdin)
            while socket.is_open():
                socket.update(timeout=5)
                out.append(socket.read_stdout(timeout=0))
                errors.append(socket.read_stderr(timeout=0))
            code = socket.returncode
    except (WebSocketException, OSError) as error:
        raise ClusterUnavailableError(f"the connection to pod {name} broke: {error}") from error
    if code is None:
        raise ClusterUnavailableError(f"the connection to pod {name} broke")
    if code:
        said = b"".join(errors).decode(errors="replace").strip() or f"exit code {code}"
        full = "No space left" in said or "Disk quota" in said
        raise (VolumeError if full else ClusterError)(f"in pod {name}: {said}")
    return b"".join(out).decode(errors="surrogateescape")


def _write(socket: Any, chunks: Iterable[bytes]) -> None:
    """Write what the other side takes; if it ends before, its last words say why."""
    from websocket import WebSocketException

    for chunk in filter(None, chunks):
        socket.update(timeout=0)
        if not socket.is_open():
            return
        try:
            socket.write_stdin(chunk)
        except (WebSocketException, OSError) as error:
            _say(f"the pod reads no more ({error})")
            return


# --- the cluster ----------------------------------------------------------------------------------


def _connect(context: str | None, namespace: str | None) -> tuple[Any, str]:
    """A client, and the namespace that is meant. Raises: ClusterError without a way in."""
    from kubernetes import client, config

    try:
        config.load_kube_config(context=context)  # type: ignore[no-untyped-call]
        contexts, active = config.list_kube_config_contexts()  # type: ignore[no-untyped-call]
        chosen = next((c for c in contexts if c["name"] == context), active)
        found = chosen["context"].get("namespace")
    except config.ConfigException as error:
        raise ClusterError(f"no access to a cluster: {error}") from error
    return client.CoreV1Api(), namespace or found or "default"


@contextlib.contextmanager
def api_errors() -> Iterator[None]:
    """Raises: ClusterError in the server's words; ClusterUnavailableError without an answer."""
    import json

    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # the client's exec wraps it
            raise KeyboardInterrupt from error
        try:
            said = json.loads(error.body or "")["message"]
        except (ValueError, TypeError, KeyError):
            said = str(error.reason)
        kind = ClusterUnavailableError if not error.status or error.status >= 500 else ClusterError
        raise kind(said, status=error.status or 0) from error
    except HTTPError as error:
        raise ClusterUnavailableError(f"the API server cannot be reached: {error}") from error


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _megabytes(items: Sequence[Item]) -> str:
    return f"{sum(item.size for item in items) / 1e6:.1f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  # progress, beside the answer

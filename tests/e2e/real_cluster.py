"""What an end-to-end test says to the cluster: plain objects in, plain objects out.

Reads go over one kept connection, so that a wait costs next to nothing; everything else is kubectl,
as users type it. Waits are on observed states and have a deadline.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Object = dict[str, Any]
T = TypeVar("T")

API_HOST, API_PORT = "10.90.0.1", 6443
CLUSTER_SCRIPT = Path(__file__).resolve().parents[1] / "testbed" / "cluster.py"
PATHS = {
    "configmap": "/api/v1/namespaces/{}/configmaps",
    "event": "/api/v1/namespaces/{}/events",
    "persistentvolumeclaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "pod": "/api/v1/namespaces/{}/pods",
    "deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "statefulset": "/apis/apps/v1/namespaces/{}/statefulsets",
    "job": "/apis/batch/v1/namespaces/{}/jobs",
    "lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "tuningrun": "/apis/quicktune.dev/v1alpha1/namespaces/{}/tuningruns",
    "namespace": "/api/v1/namespaces",
    "node": "/api/v1/nodes",
    "persistentvolume": "/api/v1/persistentvolumes",
}


class RefusedError(Exception):
    """kubectl ended with an error; the text is what it said."""


def command(*words: str, stdin: str | bytes | None = None) -> str:
    """Run a program of the cluster. Raises: RefusedError with its standard error."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    ended = subprocess.run(words, input=given, capture_output=True, check=False)
    if ended.returncode != 0:
        raise RefusedError(ended.stderr.decode().strip() or f"{words[0]} exit {ended.returncode}")
    return ended.stdout.decode()


def until(
    what: str, look: Callable[[], T | None], *, seconds: float = 60.0, every: float = 0.2
) -> T:
    """The first true value of `look`; an error of the connection counts as not yet.

    Raises: AssertionError naming what did not come, and the last value or error.
    """
    deadline = time.monotonic() + seconds
    while True:
        last: object
        try:
            found = look()
            if found:
                return found
            last = found
        except (OSError, http.client.HTTPException, RefusedError, LookupError) as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds:.0f} s: {what}; last: {last!r}")
        time.sleep(every)


class Api:
    """GET requests to the API server as the cluster's admin."""

    def __init__(self, folder: Path) -> None:
        pki = folder / "pki"
        self._context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._connection: http.client.HTTPSConnection | None = None

    def get(self, path: str) -> Object:
        """The object or list at a path. Raises: LookupError if it is not there, OSError."""
        try:
            status, body = self._ask(path)
        except (OSError, http.client.HTTPException):
            self.close()  # the server was restarted since: once more on a new connection
            status, body = self._ask(path)
        if status == http.client.NOT_FOUND:
            raise LookupError(path)
        if status != http.client.OK:
            raise OSError(f"{status} {path}: {body[:300]!r}")
        answer: Object = json.loads(body)
        return answer

    def _ask(self, path: str) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPSConnection(
                API_HOST, API_PORT, timeout=10, context=self._context
            )
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        """Drop the connection; the next call makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Testbed:
    """The cluster's programs and what they wrote. `folder`: `$TESTBED_DIR`."""

    __test__ = False  # the name begins like a test class
    folder: Path
    api: Api

    def restart(self, program: str, *, kill: str = "KILL", after: float = 0.0) -> None:
        """End (or with STOP freeze) a program, let it run again; returns when it serves."""
        words = ["restart", program, "--signal", kill, "--after", str(after)]
        command(str(CLUSTER_SCRIPT), *words)

    def kill(self, program: str, *, kill: str = "KILL") -> None:
        """Signal a program and leave it at that; `restart` brings it back or thaws it."""
        command(str(CLUSTER_SCRIPT), "kill", program, "--signal", kill)

    @contextmanager
    def frozen(self, program: str) -> Iterator[None]:
        """A program that neither answers nor works while the block runs."""
        self.kill(program, kill="STOP")
        try:
            yield
        finally:
            self.restart(program, kill="CONT")

    @contextmanager
    def away(self, program: str) -> Iterator[None]:
        """A program that is dead while the block runs."""
        self.kill(program)
        try:
            yield
        finally:
            self.restart(program)

    def signal_container(self, pod: Object, kill: str = "KILL") -> None:
        """Signal the main process of a pod's one container from outside: KILL, STOP, CONT."""
        socket = self.folder / pod["spec"]["nodeName"] / "containerd.sock"
        container = pod["status"]["containerStatuses"][0]["containerID"].partition("://")[2]
        words = ["--namespace", "k8s.io", "tasks", "kill", "--signal", f"SIG{kill}", container]
        command("ctr", "--address", str(socket), *words)

    def audit(self) -> list[Object]:
        """Every API request so far; whole lines only, the server is writing."""
        text = (self.folder / "log" / "audit.jsonl").read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def requests(self, namespace: str, resource: str) -> list[Object]:
        """The requests so far for a resource of a namespace."""
        wanted = {"namespace": namespace, "resource": resource}
        return [e for e in self.audit() if wanted.items() <= e.get("objectRef", {}).items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kube:
    """One namespace of the cluster."""

    namespace: str
    api: Api

    def kubectl(self, *words: str, stdin: str | bytes | None = None) -> str:
        """kubectl in this namespace. Raises: RefusedError."""
        return command("kubectl", "--namespace", self.namespace, *words, stdin=stdin)

    def create(self, *objects: Mapping[str, Any]) -> None:
        """Create objects; a field the server does not know is an error."""
        items = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.kubectl("create", "-f", "-", stdin=json.dumps(items))

    def refusal(self, item: Mapping[str, Any]) -> str:
        """What kubectl says to an object that must not be accepted."""
        try:
            self.create(item)
        except RefusedError as error:
            return str(error)
        raise AssertionError(f"{item['kind']} {item['metadata']['name']} was accepted")

    def apply(self, path: Path | None = None, *, text: str = "") -> None:
        """`kubectl apply` of a file, or of a text."""
        self.kubectl("apply", "-f", str(path or "-"), stdin=text or None)

    def delete(self, kind: str, name: str, *words: str) -> None:
        """Delete an object and, unless `--wait=false`, wait for its end."""
        self.kubectl("delete", kind, name, *words)

    def get(self, kind: str, name: str) -> Object:
        """Raises: LookupError if there is none."""
        return self.api.get(f"{PATHS[kind].format(self.namespace)}/{name}")

    def items(self, kind: str, selector: str = "") -> list[Object]:
        """Objects of a kind, of this namespace where the kind has one."""
        query = f"?labelSelector={selector.replace('=', '%3D')}" if selector else ""
        found: list[Object] = self.api.get(PATHS[kind].format(self.namespace) + query)["items"]
        return found

    def pod_of(self, job: str) -> Object:
        """The one pod of a Job. Raises: LookupError while there is none."""
        pods = self.items("pod", f"job-name={job}")
        if not pods:
            raise LookupError(f"no pod of {job}")
        assert len(pods) == 1, [pod["metadata"]["name"] for pod in pods]
        return pods[0]

    def logs(self, pod: str, *words: str) -> str:
        """What a container printed."""
        return self.kubectl("logs", pod, *words)

    def execute(self, pod: str, *words: str, stdin: bytes | None = None) -> str:
        """Run a program in a pod's container."""
        interactive = ["-i"] if stdin is not None else []
        return self.kubectl("exec", *interactive, pod, "--", *words, stdin=stdin)

    def container(self, pod: str) -> Object:
        """The status of a pod's one container. Raises: LookupError before there is one."""
        status: Object = self.get("pod", pod)["status"]["containerStatuses"][0]
        return status

    def wait_running(self, pod: str, *, seconds: float = 60.0) -> None:
        """Until a pod's container is ready."""
        until(f"pod {pod} ready", lambda: self.container(pod)["ready"], seconds=seconds)

    def ended_pod(self, pod: str, *, seconds: float = 60.0) -> Object:
        """The terminated state of a pod's one container."""
        return until(
            f"pod {pod} ended",
            lambda: self.container(pod)["state"].get("terminated"),
            seconds=seconds,
        )

    def ended_job(self, job: str, *, seconds: float = 60.0) -> Object:
        """The condition, Complete or Failed, that ends a Job."""
        return until(
            f"job {job} ended",
            lambda: self.condition("job", job, "Complete") or self.condition("job", job, "Failed"),
            seconds=seconds,
        )

    def condition(self, kind: str, name: str, condition: str) -> Object | None:
        """A condition that is True, or None."""
        status = self.get(kind, name).get("status", {})
        found = (c for c in status.get("conditions", ()) if c["type"] == condition)
        return next((c for c in found if c["status"] == "True"), None)


def connect() -> Testbed:
    """The cluster that this process runs in. Raises: KeyError outside of one."""
    folder = Path(os.environ["TESTBED_DIR"])
    return Testbed(folder=folder, api=Api(folder))

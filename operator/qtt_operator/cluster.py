"""The Kubernetes API as a few calls on plain JSON objects: the one place that talks to it.

Raw objects instead of the client's models: what others add to a Job must survive, and a list of a
thousand Jobs must not cost a second of CPU. Connection, credentials and their refresh are the
official client's. Every call passes one token bucket; writes are checked strictly by the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import client, config

from qtt_core.errors import ClusterError, ClusterUnavailableError

Object = dict[str, Any]
"""A Kubernetes object as JSON."""

REQUEST_SECONDS = 30.0
ATTEMPTS = 3
"""Of a call that the server asked to repeat (429, or 503 with Retry-After)."""

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
MERGE_PATCH = "application/merge-patch+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A kind by its place in the API."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str = "", name: str = "", sub: str = "") -> str:
        """`/apis/batch/v1/namespaces/x/jobs/y`; without a namespace, all of them."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, *(("namespaces", namespace) if namespace else ()), self.plural, name, sub]
        return "/".join(
            quote(part, safe="/") if i == 0 else quote(part) for i, part in enumerate(parts) if part
        )


RUNS = Resource(group="quicktune.dev", version="v1alpha1", plural="tuningruns")
JOBS = Resource(group="batch", version="v1", plural="jobs")
PODS = Resource(group="", version="v1", plural="pods")
CLAIMS = Resource(group="", version="v1", plural="persistentvolumeclaims")
CONFIG_MAPS = Resource(group="", version="v1", plural="configmaps")
EVENTS = Resource(group="", version="v1", plural="events")
LEASES = Resource(group="coordination.k8s.io", version="v1", plural="leases")


class Tokens:
    """A token bucket: `rate` calls a second in the long run, `burst` at once."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._now = rate, float(burst), now
        self._tokens, self._at = float(burst), now()

    def delay(self) -> float:
        """Take a token; seconds to wait before it may be used."""
        now = self._now()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        self._tokens -= 1.0
        return max(0.0, -self._tokens / self._rate)


Observer = Callable[[str, str, str, float], None]
"""Told of every call: verb, resource, status code, seconds."""


class Cluster:
    """Calls of one process. `guard` runs before every write; it may raise to forbid it."""

    def __init__(
        self,
        api: client.ApiClient,
        *,
        qps: float = 20.0,
        burst: int = 40,
        guard: Callable[[], None] = lambda: None,
        observer: Observer = lambda _verb, _resource, _code, _seconds: None,
    ) -> None:
        self._api = api
        self._tokens = Tokens(qps, burst)
        self.guard = guard
        self.observer = observer
        self.throttled_seconds = 0.0

    @classmethod
    async def connect(cls, **options: Any) -> Cluster:
        """With the pod's service account, else the kubeconfig. Raises: ClusterError."""
        configuration = client.Configuration()
        try:
            if SERVICE_ACCOUNT.is_file():
                config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
            else:
                await config.load_kube_config(  # type: ignore[no-untyped-call]
                    client_configuration=configuration
                )
        except (config.ConfigException, OSError) as error:
            raise ClusterError(f"no access to a cluster: {error}") from error
        return cls(client.ApiClient(configuration), **options)

    async def close(self) -> None:
        """End every connection."""
        await self._api.close()  # type: ignore[no-untyped-call]

    # --- calls -------------------------------------------------------------------------------

    async def get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """An object, None where there is none."""
        try:
            return await self._call("GET", resource, resource.path(namespace, name))
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    async def page(
        self, resource: Resource, namespace: str, *, selector: str, limit: int, token: str = ""
    ) -> Object:
        """One page of a list."""
        query = {"labelSelector": selector, "limit": str(limit), "continue": token}
        return await self._call("GET", resource, resource.path(namespace), query=query, verb="LIST")

    async def create(
        self, resource: Resource, namespace: str, body: Object, *, dry_run: bool = False
    ) -> Object:
        """The object as the server stored it; a dry run passes admission and stores nothing."""
        query = {"fieldValidation": "Strict", "dryRun": "All" if dry_run else ""}
        return await self._call("POST", resource, resource.path(namespace), query=query, body=body)

    async def replace(self, resource: Resource, namespace: str, body: Object) -> Object:
        """Write a whole object; its resourceVersion must be the present one (else 409)."""
        path = resource.path(namespace, body["metadata"]["name"])
        return await self._call("PUT", resource, path, body=body)

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Object, *, sub: str = ""
    ) -> Object | None:
        """Merge-patch an object or its subresource; None where the object is gone."""
        path = resource.path(namespace, name, sub)
        try:
            return await self._call("PATCH", resource, path, body=body)
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, foreground: bool
    ) -> None:
        """Ask for the end of one object; gone already, or another of that name, is well."""
        body: Object = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Foreground" if foreground else "Background",
        }
        try:
            await self._call("DELETE", resource, resource.path(namespace, name), body=body)
        except ClusterError as error:
            if error.status not in {404, 409}:
                raise

    @contextlib.asynccontextmanager
    async def watch(
        self, resource: Resource, namespace: str, *, selector: str, version: str, seconds: int
    ) -> AsyncIterator[AsyncIterator[Object]]:
        """Events behind a resource version, bookmarks included, until the server ends the stream.

        Raises: ClusterError (410: the version is too old), ClusterUnavailableError.
        """
        query = {
            "watch": "true", "labelSelector": selector, "resourceVersion": version,
            "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds),
        }  # fmt: skip
        timeout = aiohttp.ClientTimeout(total=seconds + 30, sock_read=seconds + 30)
        response = await self._send("GET", resource.path(namespace), query, None, timeout)
        try:
            if response.status >= 400:
                raise _refused(response.status, await response.read(), resource.plural)
            yield _lines(response)
        finally:
            response.response.close()

    # --- one call ----------------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        resource: Resource,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        verb: str = "",
    ) -> Object:
        """Raises: ClusterError, ClusterUnavailableError."""
        for attempt in range(ATTEMPTS):
            if method != "GET":
                self.guard()
            await self._take_token()
            began = time.monotonic()
            timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
            response = await self._send(method, path, query or {}, body, timeout)
            with _connection_errors():
                data = await response.read()
            seconds = time.monotonic() - began
            self.observer(verb or method, resource.plural, str(response.status), seconds)
            wait = response.getheader("Retry-After")
            if response.status in {429, 503} and wait and attempt + 1 < ATTEMPTS:
                await asyncio.sleep(_patience(wait))
                continue
            break
        if response.status >= 400:
            raise _refused(response.status, data, resource.plural)
        found: Object = json.loads(data)
        return found

    async def _take_token(self) -> None:
        delay = self._tokens.delay()
        if delay > 0:
            self.throttled_seconds += delay
            await asyncio.sleep(delay)

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Object | None,
        timeout: aiohttp.ClientTimeout,
    ) -> Any:
        headers = {"Accept": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = MERGE_PATCH
        with _connection_errors():
            await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            text = urlencode({name: value for name, value in query.items() if value})
            url = f"{self._api.configuration.host}{path}{'?' if text else ''}{text}"
            return await self._api.rest_client.request(  # type: ignore[no-untyped-call]
                method, url, headers=headers, body=body, _request_timeout=timeout
            )


def _patience(wait: str) -> float:
    """Seconds of a Retry-After header, which may also be a date; at most ten."""
    try:
        return min(10.0, max(0.0, float(wait)))
    except ValueError:
        return 1.0


@contextlib.contextmanager
def _connection_errors() -> Any:
    """Raises: ClusterUnavailableError for whatever kept the server's answer from us."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        text = str(error) or type(error).__name__
        raise ClusterUnavailableError(f"the API server cannot be reached: {text}") from error


async def _lines(response: Any) -> AsyncIterator[Object]:
    with _connection_errors():
        async for line in response.response.content:
            if line.strip():
                yield json.loads(line)


def _refused(status: int, data: bytes, what: str) -> ClusterError:
    """The server's own words; every answer of 500 and above may pass."""
    try:
        body = json.loads(data)
    except ValueError:
        body = {}
    body = body if isinstance(body, dict) else {}
    text = str(body.get("message") or data[:200].decode(errors="replace"))
    kind = ClusterUnavailableError if status >= 500 or status == 429 else ClusterError
    return kind(f"{what}: {text}", status=status, reason=str(body.get("reason") or ""))

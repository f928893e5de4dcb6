"""A `FakeCluster` behind a real HTTP port, for the real client in `qtt_operator.cluster`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from kubernetes.aio import client

from qtt_core.errors import ClusterError, ClusterUnavailableError
from qtt_operator.cluster import Cluster, Resource
from tests.cluster.fake_cluster import FakeCluster


class HttpCluster:
    """`answers`: (status, headers) of the next requests, instead of the cluster's own answer."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.requests: list[tuple[str, str]] = []

    @contextlib.asynccontextmanager
    async def serve(self, **options: Any) -> AsyncIterator[Cluster]:
        """A client of this server."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        api = Cluster(client.ApiClient(client.Configuration(host=host)), **options)
        try:
            yield api
        finally:
            await api.close()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        if self.answers:
            status, headers = self.answers.pop(0)
            return web.json_response({"message": "injected"}, status=status, headers=headers)
        resource, namespace, name, sub = _parse(request.path)
        try:
            return await self._answer(request, resource, namespace, name, sub)
        except ClusterUnavailableError as error:
            return web.json_response({"message": str(error)}, status=error.status or 503)
        except ClusterError as error:
            body = {"message": str(error), "reason": error.reason}
            return web.json_response(body, status=error.status)

    async def _answer(
        self, request: web.Request, resource: Resource, namespace: str, name: str, sub: str
    ) -> web.StreamResponse:
        fake, query = self.cluster, request.query
        selector = query.get("labelSelector", "")
        if query.get("watch"):
            return await self._watch(request, resource, namespace, selector)
        if request.method == "GET" and not name:
            page = await fake.page(
                resource, namespace, selector=selector, limit=int(query.get("limit", 500)),
                token=query.get("continue", ""),
            )  # fmt: skip
            return web.json_response(page)
        if request.method == "GET":
            return _found(await fake.get(resource, namespace, name))
        body = await request.json()
        if request.method == "POST":
            dry_run = query.get("dryRun") == "All"
            return web.json_response(await fake.create(resource, namespace, body, dry_run=dry_run))
        if request.method == "PUT":
            return web.json_response(await fake.replace(resource, namespace, body))
        if request.method == "PATCH":
            return _found(await fake.patch(resource, namespace, name, body, sub=sub))
        uid = body["preconditions"]["uid"]
        await fake.delete(resource, namespace, name, uid=uid, foreground=True)
        return web.json_response({})

    async def _watch(
        self, request: web.Request, resource: Resource, namespace: str, selector: str
    ) -> web.StreamResponse:
        version = request.query["resourceVersion"]
        async with self.cluster.watch(
            resource, namespace, selector=selector, version=version, seconds=1
        ) as events:
            stream = web.StreamResponse()
            await stream.prepare(request)
            async for event in events:
                await stream.write(json.dumps(event).encode() + b"\n")
        return stream


def _parse(path: str) -> tuple[Resource, str, str, str]:
    """Resource, namespace, name and subresource of `/apis/batch/v1/namespaces/x/jobs/y`."""
    parts = path.strip("/").split("/")
    group, version, rest = (
        ("", parts[1], parts[2:]) if parts[0] == "api" else (parts[1], parts[2], parts[3:])
    )
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    plural, name, sub = [*rest, "", ""][:3]
    return Resource(group=group, version=version, plural=plural), namespace, name, sub


def _found(found: object) -> web.Response:
    if found is None:
        return web.json_response({"message": "not found"}, status=404)
    return web.json_response(found)

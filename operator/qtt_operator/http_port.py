"""The operator's one HTTP port: /metrics, /healthz for the liveness probe, /readyz."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from qtt_operator.metrics import CONTENT_TYPE

Check = Callable[[], str]
"""What is wrong, empty when all is well."""


async def serve(
    port: int, *, metrics: Callable[[], bytes], healthy: Check, ready: Check
) -> web.AppRunner:
    """Start listening; the runner's `cleanup` ends it. Port 0 is a free one."""

    async def show(_request: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": CONTENT_TYPE})

    def answer(check: Check) -> Callable[[web.Request], object]:
        async def respond(_request: web.Request) -> web.Response:
            wrong = check()
            return web.Response(text=wrong or "ok", status=500 if wrong else 200)

        return respond

    app = web.Application()
    app.router.add_get("/metrics", show)
    app.router.add_get("/healthz", answer(healthy))  # type: ignore[arg-type]  # a handler
    app.router.add_get("/readyz", answer(ready))  # type: ignore[arg-type]
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner

"""How the cluster is: its status, its health, its metrics, and how to join it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from parallax.fabric.version import VERSION
from parallax.scheduler.http.guard import holder_of
from parallax.scheduler.http.keys import CLOSING, CLUSTER, METRICS
from parallax.scheduler.metrics import CONTENT_TYPE

STATUS_S = 1.0  # the reference's rhythm


def routes() -> list[web.RouteDef]:
    """The endpoints."""
    return [
        web.get("/cluster/status", stream),
        web.get("/cluster/status_json", once),
        web.get("/node/join/command", join_command),
        web.get("/health", health),
        web.get("/metrics", metrics),
    ]


async def stream(request: web.Request) -> web.StreamResponse:
    """One line of JSON each second, the first at once, until the client goes."""
    response = web.StreamResponse(
        headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-cache"}
    )
    await response.prepare(request)
    closing = request.app[CLOSING]
    holder = holder_of(request)
    while request.method != "HEAD" and not closing.is_set():
        if holder is not None and holder.revoked:
            break
        await response.write(_status(request) + b"\n")
        try:
            async with asyncio.timeout(STATUS_S):
                await closing.wait()
        except TimeoutError:
            continue
    await response.write_eof()
    return response


async def once(request: web.Request) -> web.Response:
    """The same object, once."""
    return web.Response(body=_status(request), content_type="application/json")


async def join_command(request: web.Request) -> web.Response:
    """What to type on a machine that should join."""
    return _json({"type": "node_join_command", "data": request.app[CLUSTER].join_command()})


async def health(request: web.Request) -> web.Response:
    """This process is well; ``ready`` says whether it can also answer chats."""
    cluster = request.app[CLUSTER]
    served, status = cluster.served(), cluster.status()
    return _json(
        {
            "status": "ok",
            "version": VERSION,
            "ready": status.get("status") == "available",
            "model": None if served is None else served.name,
        }
    )


async def metrics(request: web.Request) -> web.Response:
    """Prometheus."""
    return web.Response(body=request.app[METRICS].page(), headers={"Content-Type": CONTENT_TYPE})


def _status(request: web.Request) -> bytes:
    message = {"type": "cluster_status", "data": request.app[CLUSTER].status()}
    return json.dumps(message).encode()


def _json(value: Any) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), content_type="application/json")

"""Nodes that give up their layers: ``POST /admin/nodes/{id}/drain|undrain|remove``. For admins."""

from __future__ import annotations

import json

from aiohttp import web
from pydantic import BaseModel, ConfigDict

from parallax.scheduler.http.keys import DEPARTURES, LIMITS
from parallax.scheduler.http.requests import parse, read_json


class DepartureRequest(BaseModel):
    """``force``: even where nothing is served any more without the node."""

    model_config = ConfigDict(extra="forbid", strict=True)

    force: bool = False


def routes() -> list[web.RouteDef]:
    """The endpoints; a node is named by its id, its name, or how one of them begins."""
    return [
        web.post("/admin/nodes/{id}/drain", drain),
        web.post("/admin/nodes/{id}/undrain", undrain),
        web.post("/admin/nodes/{id}/resume", undrain),
        web.post("/admin/nodes/{id}/remove", remove),
    ]


async def drain(request: web.Request) -> web.Response:
    """Begins to move everything off a node, which stays a member."""
    force = await _force(request)
    node_id = await request.app[DEPARTURES].drain(request.match_info["id"], force=force)
    return _answer(request, node_id)


async def undrain(request: web.Request) -> web.Response:
    """Lets a node have layers again."""
    return _answer(request, await request.app[DEPARTURES].undrain(request.match_info["id"]))


async def remove(request: web.Request) -> web.Response:
    """Begins to move everything off a node, and sends it away then."""
    force = await _force(request)
    node_id = await request.app[DEPARTURES].remove(request.match_info["id"], force=force)
    return _answer(request, node_id)


async def _force(request: web.Request) -> bool:
    body = await read_json(request, request.app[LIMITS]) if request.can_read_body else {}
    return parse(DepartureRequest, body).force


def _answer(request: web.Request, node_id: str) -> web.Response:
    departures = request.app[DEPARTURES]
    data = {
        "node_id": node_id,
        "name": departures.name_of(node_id),
        "state": departures.state_of(node_id) or "ready",
    }
    body = json.dumps({"type": "node", "data": data}).encode()
    return web.Response(body=body, content_type="application/json")

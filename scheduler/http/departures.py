"""Nodes that give up their layers: ``POST /admin/nodes/{id}/drain|undrain|remove``. For admins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict

from parallax.scheduler.http.keys import DEPARTURES, GATE, LIMITS
from parallax.scheduler.http.requests import parse, read_json

T = TypeVar("T", bound=BaseModel)

MOST_SHOWN = 20  # of those that came in with the same token


class DepartureRequest(BaseModel):
    """``force``: even where nothing is served any more without the node."""

    model_config = ConfigDict(extra="forbid", strict=True)

    force: bool = False


class RemovalRequest(DepartureRequest):
    """``now``: cut off at once, whatever it does and whatever fits without it."""

    now: bool = False


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
    asked = await _asked(request, DepartureRequest)
    node_id = await request.app[DEPARTURES].drain(request.match_info["id"], force=asked.force)
    return _answer(request, node_id)


async def undrain(request: web.Request) -> web.Response:
    """Lets a node have layers again."""
    return _answer(request, await request.app[DEPARTURES].undrain(request.match_info["id"]))


async def remove(request: web.Request) -> web.Response:
    """Begins to move everything off a node, and sends it away then; or sends it away at once."""
    asked = await _asked(request, RemovalRequest)
    node_id = await request.app[DEPARTURES].remove(
        request.match_info["id"], force=asked.force, at_once=asked.now
    )
    came_with = _came_with(request, node_id)
    return _answer(request, node_id, came_with, done="removed")


def _came_with(request: web.Request, node_id: str) -> dict[str, object]:
    gate = request.app.get(GATE)
    others = gate.came_with(node_id) if gate is not None else []
    shown = [{"node_id": k.node_id, "name": k.name} for k in others[:MOST_SHOWN]]
    return {"same_token": shown, "same_token_count": len(others)}


async def _asked(request: web.Request, kind: type[T]) -> T:
    body = await read_json(request, request.app[LIMITS]) if request.can_read_body else {}
    return parse(kind, body)


def _answer(
    request: web.Request,
    node_id: str,
    more: Mapping[str, object] | None = None,
    done: str = "ready",
) -> web.Response:
    departures = request.app[DEPARTURES]
    data = {
        "node_id": node_id,
        "name": departures.name_of(node_id),
        "state": departures.state_of(node_id) or done,
        **(more or {}),
    }
    body = json.dumps({"type": "node", "data": data}).encode()
    return web.Response(body=body, content_type="application/json")

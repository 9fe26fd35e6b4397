"""``GET /v1/models`` and ``GET /v1/models/{id}``, in OpenAI's shapes."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from parallax.scheduler.generation import ServedModel
from parallax.scheduler.http.acceptance import find_model
from parallax.scheduler.http.keys import CLUSTER


def routes() -> list[web.RouteDef]:
    """The endpoints."""
    return [web.get("/v1/models", models), web.get("/v1/models/{id:.+}", model)]


async def models(request: web.Request) -> web.Response:
    """The model that is served, if there is one."""
    served = request.app[CLUSTER].served()
    return _json({"object": "list", "data": [] if served is None else [_entry(served)]})


async def model(request: web.Request) -> web.Response:
    """One model by its name, which may contain slashes."""
    return _json(_entry(find_model(request, request.match_info["id"])))


def _entry(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "parallax",
        "context_tokens": served.context_tokens,
    }


def _json(value: Any) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), content_type="application/json")

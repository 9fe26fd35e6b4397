"""Who may be a node: ``/admin/tokens`` and ``/admin/nodes``. For admins alone."""

from __future__ import annotations

import json
from typing import Annotated, Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from parallax.scheduler.admission_values import Known
from parallax.scheduler.http.keys import GATE, LIMITS
from parallax.scheduler.http.requests import parse, read_json
from parallax.scheduler.status import pending_of
from parallax.scheduler.tokens import Token, TokenState

DAY_S = 86_400.0


class TokenRequest(BaseModel):
    """``POST /admin/tokens``: its lifetime, how many nodes may come with it, and a note."""

    model_config = ConfigDict(extra="forbid", strict=True)

    expires_s: Annotated[float, Field(gt=0)] = DAY_S
    uses: Annotated[int, Field(ge=1)] | None = None
    note: Annotated[str, Field(max_length=200)] = ""


def routes() -> list[web.RouteDef]:
    """The endpoints."""
    return [
        web.get("/admin/tokens", tokens),
        web.post("/admin/tokens", create_token),
        web.delete("/admin/tokens/{id}", revoke_token),
        web.get("/admin/nodes/pending", pending),
        web.post("/admin/nodes/{id}/approve", approve),
        web.post("/admin/nodes/{id}/deny", deny),
    ]


async def tokens(request: web.Request) -> web.Response:
    """Every token that is remembered, without itself."""
    gate = request.app[GATE]
    return _json("tokens", [_token(token, state) for token, state in gate.tokens()])


async def create_token(request: web.Request) -> web.Response:
    """A new token; this answer is the only one that tells it."""
    wanted = parse(TokenRequest, await read_json(request, request.app[LIMITS]))
    gate = request.app[GATE]
    plain, token = await gate.create_token(wanted.expires_s, wanted.uses, wanted.note)
    made = _token(token, TokenState.GOOD)
    command = f"{gate.plain_join_command()} --token {plain}"
    return _json("token", {**made, "token": plain, "join_command": command}, 201)


async def revoke_token(request: web.Request) -> web.Response:
    """From now on it lets nobody in; who came with it stays."""
    token = await request.app[GATE].revoke_token(request.match_info["id"])
    return _json("token", _token(token, TokenState.REVOKED))


async def pending(request: web.Request) -> web.Response:
    """Who waits to be let in."""
    return _json("pending_nodes", [pending_of(p) for p in request.app[GATE].pending()])


async def approve(request: web.Request) -> web.Response:
    """Lets the node in that an id or a fingerprint names."""
    return _json("node", _known(await request.app[GATE].approve(request.match_info["id"])))


async def deny(request: web.Request) -> web.Response:
    """Refuses the node that an id or a fingerprint names."""
    return _json("node", _known(await request.app[GATE].deny(request.match_info["id"])))


def _token(token: Token, state: TokenState) -> dict[str, object]:
    return {
        "id": token.id,
        "state": state.value,
        "note": token.note,
        "created": token.created_s,
        "expires": token.expires_s,
        "uses": token.uses,
        "uses_limit": token.uses_limit,
    }


def _known(known: Known) -> dict[str, object]:
    return {
        "node_id": known.node_id,
        "name": known.name,
        "standing": known.standing.value,
        "since": known.since_s,
    }


def _json(kind: str, data: Any, status: int = 200) -> web.Response:
    body = json.dumps({"type": kind, "data": data}).encode()
    headers = {"Cache-Control": "no-store"}
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)

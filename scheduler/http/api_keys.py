"""``/admin/keys``: make, list and revoke API keys; and what they used, written down."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from parallax.fabric.errors import ParallaxError
from parallax.scheduler.api_keys import (
    MOST_A_MINUTE,
    MOST_AT_ONCE,
    Holder,
    KeyRecord,
    digest_of,
    new_id,
    new_secret,
)
from parallax.scheduler.http.keys import KEY_RING, KEY_STORE, LIMITS
from parallax.scheduler.http.requests import parse, read_json

WRITE_S = 5.0

_log = logging.getLogger(__name__)


class NewKey(BaseModel):
    """What a key is to be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=100)] = ""
    admin: bool = False
    rate: Annotated[int, Field(ge=1, le=MOST_A_MINUTE)] | None = None
    concurrent: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] | None = None


def routes() -> list[web.RouteDef]:
    """The endpoints."""
    return [
        web.get("/admin/keys", listed),
        web.post("/admin/keys", create),
        web.delete("/admin/keys/{id}", revoke),
    ]


async def listed(request: web.Request) -> web.Response:
    """Every key with its limits and its usage; no secret, which nobody has any more."""
    keys = [_shown(holder) for holder in request.app[KEY_RING].holders()]
    return _json({"type": "api_keys", "data": keys})


async def create(request: web.Request) -> web.Response:
    """A new key. This answer is the only place where it is ever seen."""
    wanted = parse(NewKey, await read_json(request, request.app[LIMITS]))
    secret = new_secret()
    record = KeyRecord(
        id=new_id(),
        name=wanted.name,
        digest=digest_of(secret),
        admin=wanted.admin,
        rate=wanted.rate,
        concurrent=wanted.concurrent,
        created=int(time.time()),
    )
    ring, store = request.app[KEY_RING], request.app[KEY_STORE]
    if store is not None:
        await store.add(record)
    ring.add(record)
    shown = _shown(ring.get(record.id))
    return _json({"type": "api_key", "data": {**shown, "key": secret}}, status=201)


async def revoke(request: web.Request) -> web.Response:
    """A key counts no more, from now on."""
    ring, store = request.app[KEY_RING], request.app[KEY_STORE]
    holder = ring.get(request.match_info["id"])
    if store is not None:
        await store.remove(holder.id)
    ring.revoke(holder.id)
    return _json({"type": "api_key_revoked", "data": {"id": holder.id}})


async def usage_written(app: web.Application) -> AsyncIterator[None]:
    """Usage goes to disk every few seconds, and at the end (a cleanup context)."""
    writing = asyncio.create_task(_write_on(app))
    yield
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    await _write(app)


async def _write_on(app: web.Application) -> None:
    while True:
        await asyncio.sleep(WRITE_S)
        await _write(app)


async def _write(app: web.Application) -> None:
    store = app[KEY_STORE]
    fresh = app[KEY_RING].take_fresh()
    if store is None or not fresh:
        return
    try:
        await store.write(fresh)
    except ParallaxError as error:  # what is lost is a count, and serving goes on
        _log.warning("The usage of API keys was not written: %s", error)


def _shown(holder: Holder) -> dict[str, Any]:
    record, usage = holder.record, holder.usage
    return {
        "id": record.id,
        "name": record.name,
        "admin": record.admin,
        "rate": record.rate,
        "concurrent": record.concurrent,
        "created": record.created,
        "running": holder.running,
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "last_used": usage.last_used,
    }


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=json.dumps(value).encode(),
        status=status,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )

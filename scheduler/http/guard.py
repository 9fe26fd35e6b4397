"""The first thing that every request meets: host, site, key, limits, kind of body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from parallax.fabric.errors import AdminOnly, KeyRefused, WrongMediaType
from parallax.fabric.hosts import host_of, is_loopback
from parallax.scheduler.api_keys import Holder
from parallax.scheduler.http.access import (
    Level,
    allowed_origin,
    check_direct,
    check_host,
    check_site,
    cors_headers,
    is_limited,
    key_in,
    level_of,
    preflight_headers,
)
from parallax.scheduler.http.connections import connection_of
from parallax.scheduler.http.keys import ACCESS, KEY_RING
from parallax.scheduler.http.page import paths

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HOLDER: web.RequestKey[Holder | None] = web.RequestKey("holder")
_PAGE = paths()
_BODIES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# For what is no page, should a browser show it.
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let a request through, or refuse it before anything of its body is read."""
    connection = connection_of(request)
    if connection is not None:
        connection.begun()
    try:
        return await _guarded(request, handler)
    finally:
        if connection is not None:
            connection.ended()


async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    access, headers = request.app[ACCESS], request.headers
    hosts = headers.getall("Host", [])
    check_host(access, hosts, may_lack=request.version < (1, 1))
    check_direct(access, headers)
    resource = request.match_info.route.resource
    place = None if resource is None else resource.canonical
    visits_page = place in _PAGE and request.method in ("GET", "HEAD")
    check_site(access, headers, hosts[0] if hosts else "", visits_page=visits_page)
    origin = allowed_origin(access, headers.get("Origin"))
    if origin and request.method == "OPTIONS" and "Access-Control-Request-Method" in headers:
        return web.Response(status=204, headers=preflight_headers(origin, headers))
    holder = _holder(request, level_of(place, _PAGE))
    request[HOLDER] = holder
    _check_kind(request)
    if holder is None or not is_limited(place):
        return await handler(request)
    holder.begin(asyncio.get_running_loop().time(), int(time.time()))
    try:
        return await handler(request)
    finally:
        holder.end()


def holder_of(request: web.Request) -> Holder | None:
    """Whose key came along; None where none was needed and none that counts did."""
    return request.get(HOLDER)


def _holder(request: web.Request, level: Level) -> Holder | None:
    """
    Raises:
        KeyRefused, AdminOnly.
    """
    required = request.app[ACCESS].keys_required
    try:
        holder = request.app[KEY_RING].find(key_in(request.headers))
    except KeyRefused:
        if required and level is not Level.FREE:
            raise
        return None
    if required and level is Level.ADMIN and not holder.admin:
        raise AdminOnly(
            "This needs an admin key",
            f"The key {holder.id} is not one",
            "'parallax keys create --admin' on the scheduler's machine makes one",
        )
    return holder


def _check_kind(request: web.Request) -> None:
    """A form of another site's page can post text and forms without asking first, but no JSON.

    Raises:
        WrongMediaType: a body comes along that is said to be no JSON.
    """
    if request.method in _BODIES and request.can_read_body:
        kind = request.content_type.lower()
        if "Content-Type" not in request.headers or kind != "application/json":
            raise WrongMediaType(
                "The body must be JSON, and be called so",
                f"Its Content-Type is {request.headers.get('Content-Type', 'missing')[:100]!r}",
                "Send 'Content-Type: application/json'",
            )


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """What every answer carries (a signal of the application)."""
    headers = response.headers
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("Content-Security-Policy", _POLICY)
    headers["Server"] = "Parallax"  # and not which versions of what
    access = request.app[ACCESS]
    # Browsers take it over TLS or from loopback, and complain of it elsewhere.
    if access.secure or is_loopback(host_of(request.headers.get("Host", "")) or ""):
        headers["Cross-Origin-Opener-Policy"] = "same-origin"
    if access.origins:
        headers["Vary"] = "Origin"
        origin = allowed_origin(access, request.headers.get("Origin"))
        if origin:
            headers.update(cors_headers(origin))

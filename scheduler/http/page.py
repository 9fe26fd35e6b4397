"""``GET /``: the page and its files, from the package ``parallax.web``."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable

from aiohttp import web

_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}

_HEADERS = {
    # Nothing from elsewhere, nothing inline.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # ask again each time; the ETag makes that cheap
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def routes() -> list[web.RouteDef]:
    """One route for each file: ``index.html`` at ``/``, ``app.js`` at ``/app.js``."""
    found = []
    for path, content in _files(resources.files("parallax.web"), ""):
        handler = _serve(content, _KINDS[path[path.rindex(".") :]])
        found.append(web.get("/" + path, handler))
        if path == "index.html":
            found.append(web.get("/", handler))
    return found


def paths() -> frozenset[str]:
    """Where they are."""
    return frozenset(route.path for route in routes())


def _files(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith(("_", ".")):
            yield from _files(entry, f"{prefix}{entry.name}/")
        elif entry.is_file() and entry.name.endswith(tuple(_KINDS)):
            yield prefix + entry.name, entry.read_bytes()


def _serve(content: bytes, kind: str) -> Handler:
    etag = hashlib.sha256(content).hexdigest()[:32]

    async def handler(request: web.Request) -> web.StreamResponse:
        known = request.if_none_match or ()
        if any(tag.value in (etag, "*") for tag in known):
            response = web.Response(status=304, headers=_HEADERS)
        else:
            response = web.Response(
                body=content, content_type=kind, headers=_HEADERS, charset=_charset(kind)
            )
        response.etag = etag
        return response

    return handler


def _charset(kind: str) -> str | None:
    return "utf-8" if kind.startswith("text/") else None

"""The HTTP application and its listener."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from parallax.fabric.errors import BadSetting, PortInUse
from parallax.fabric.limits import Limits
from parallax.scheduler.api_keys import KeyRing
from parallax.scheduler.departures import Departures
from parallax.scheduler.gate import Gate
from parallax.scheduler.generation import Cluster, ServedModel
from parallax.scheduler.http import admin, api_keys, chat, models, page, setup, status
from parallax.scheduler.http import departures as admin_departures
from parallax.scheduler.http.access import Access
from parallax.scheduler.http.bodies import Bodies
from parallax.scheduler.http.connections import Site
from parallax.scheduler.http.errors import errors
from parallax.scheduler.http.guard import add_headers, guard
from parallax.scheduler.http.keys import (
    ACCESS,
    BODIES,
    CLOSING,
    CLUSTER,
    DEPARTURES,
    GATE,
    KEY_RING,
    KEY_STORE,
    LIMITS,
    METRICS,
    TASKS,
    TOKENIZERS,
)
from parallax.scheduler.key_store import KeyStore
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.text.tokenizer import Tokenizers

_FOLLOW_S = 0.5
_SOON_S = 0.1  # a scheduler that was started again should answer soon
_protocol_log = logging.getLogger(__name__ + ".protocol")


def make_app(
    cluster: Cluster,
    *,
    limits: Limits,
    metrics: Metrics,
    access: Access | None = None,
    keys: KeyRing | None = None,
    key_store: KeyStore | None = None,
    gate: Gate | None = None,
    departures: Departures | None = None,
) -> web.Application:
    """Every endpoint over this cluster.

    Args:
        access: who may reach it; None: as on loopback, without keys.
        keys: those that count already; None: none do.
        key_store: where keys and their usage are kept; None: in memory alone.
        gate: who decides about nodes; None: nothing is served that does.
        departures: how nodes give up their layers; None: nothing is served for that.
    """
    app = web.Application(middlewares=[errors, guard], client_max_size=limits.body_bytes)
    app[ACCESS] = access or Access()
    app[KEY_RING] = keys or KeyRing()
    app[KEY_STORE] = key_store
    app[BODIES] = Bodies(limits.bodies_bytes)
    app[CLUSTER] = cluster
    app[LIMITS] = limits
    app[METRICS] = metrics
    app[TOKENIZERS] = Tokenizers()
    app[TASKS] = set()
    app[CLOSING] = asyncio.Event()
    for group in (chat, models, status, setup, api_keys, page):
        app.add_routes(group.routes())
    if gate is not None:
        app[GATE] = gate
        app.add_routes(admin.routes())
    if departures is not None:
        app[DEPARTURES] = departures
        app.add_routes(admin_departures.routes())
    app.cleanup_ctx.append(_text)
    app.cleanup_ctx.append(api_keys.usage_written)
    app.on_response_prepare.append(add_headers)
    app.on_shutdown.append(_close_streams)
    return app


async def serve(
    app: web.Application, host: str, port: int, tls: ssl.SSLContext | None = None
) -> tuple[web.AppRunner, int]:
    """Listen, and say at which port; 0 takes a free one. ``runner.cleanup()`` ends it.

    Raises:
        PortInUse: another program has the port.
        BadSetting: this machine has no such address, or will not give the port.
    """
    limits = app[LIMITS]
    _protocol_log.addFilter(_quiet)
    # A client that goes cancels its handler, which closes its generators.
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        logger=_protocol_log,
        shutdown_timeout=limits.drain_s,
        lingering_time=limits.linger_s,
        keepalive_timeout=limits.keepalive_s,
        max_line_size=limits.header_line_bytes,
        max_field_size=limits.header_line_bytes,
        max_headers=limits.header_lines,
    )
    await runner.setup()
    try:
        await Site(runner, host, port, limits=limits, metrics=app[METRICS], tls=tls).start()
    except OSError as error:
        await runner.cleanup()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Port {port} of {host} is taken",
                "Another program listens there, perhaps another Parallax",
                "End it, or choose another port with --port (0 takes a free one)",
                port=port,
            ) from error
        raise BadSetting(
            f"HTTP cannot listen on port {port} of {host!r}",
            error.strerror or str(error),
            "Choose an address of this machine with --host, and a port above 1023 with --port",
            setting="host" if isinstance(error, socket.gaierror) else "port",
        ) from error
    actual: int = runner.addresses[0][1]
    return runner, actual


def _quiet(record: logging.LogRecord) -> bool:
    """Bytes that are no HTTP are answered with 400 and are no concern of ours."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, web.RequestPayloadError))


async def _text(app: web.Application) -> AsyncIterator[None]:
    """Load the tokenizer of each model that comes to be served, before anybody waits for it."""
    tasks = app[TASKS]
    tasks.add(asyncio.create_task(_follow(app[CLUSTER], app[TOKENIZERS])))
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    app[TOKENIZERS].close()


async def _follow(cluster: Cluster, tokenizers: Tokenizers) -> None:
    known: ServedModel | None = None
    while True:
        served = cluster.served()
        if served is not None and served != known:
            tokenizers.warm(served)
        known = served
        await asyncio.sleep(_FOLLOW_S if served else _SOON_S)


async def _close_streams(app: web.Application) -> None:
    app[CLOSING].set()

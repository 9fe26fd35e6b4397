"""The HTTP application and its listener."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator

from aiohttp import web

from parallax.fabric.errors import ParallaxError, PortInUse
from parallax.fabric.limits import Limits
from parallax.scheduler.generation import Cluster
from parallax.scheduler.http import chat, models, page, setup, status
from parallax.scheduler.http.errors import errors
from parallax.scheduler.http.keys import CLOSING, CLUSTER, LIMITS, METRICS, TOKENIZERS
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.text.tokenizer import Tokenizers

_log = logging.getLogger(__name__)


def make_app(cluster: Cluster, *, limits: Limits, metrics: Metrics) -> web.Application:
    """Every endpoint over this cluster."""
    app = web.Application(middlewares=[errors], client_max_size=limits.body_bytes)
    app[CLUSTER] = cluster
    app[LIMITS] = limits
    app[METRICS] = metrics
    app[TOKENIZERS] = Tokenizers()
    app[CLOSING] = asyncio.Event()
    for group in (chat, models, status, setup, page):
        app.add_routes(group.routes())
    app.cleanup_ctx.append(_text)
    app.on_shutdown.append(_close_streams)
    return app


async def serve(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Listen, and say at which port; 0 takes a free one. ``runner.cleanup()`` ends it.

    Raises:
        PortInUse: another program has the port.
    """
    limits = app[LIMITS]
    # A client that goes cancels its handler, which closes its generators.
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=limits.drain_s
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Port {port} of {host} is taken",
                "Another program listens there, perhaps another Parallax",
                "End it, or choose another port with --port (0 takes a free one)",
                port=port,
            ) from error
        raise
    actual: int = runner.addresses[0][1]
    return runner, actual


async def _text(app: web.Application) -> AsyncIterator[None]:
    """Load the tokenizer of a model that is served already, so that nobody waits for it."""
    warming = asyncio.create_task(_warm(app))
    yield
    warming.cancel()
    await asyncio.gather(warming, return_exceptions=True)
    app[TOKENIZERS].close()


async def _warm(app: web.Application) -> None:
    served = app[CLUSTER].served()
    if served is None:
        return
    try:
        await app[TOKENIZERS].of(served)
    except ParallaxError as error:
        _log.warning("%s", error)


async def _close_streams(app: web.Application) -> None:
    app[CLOSING].set()

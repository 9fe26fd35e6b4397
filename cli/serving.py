"""Runs a scheduler or a node in this process until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Protocol

from parallax.cli.awake import awake
from parallax.cli.reporter import Reporter
from parallax.fabric.events import Event
from parallax.fabric.settings import Settings

GRACE_S = 5.0  # beyond the draining of answers in flight
MOST_FILES = 10_240  # more macOS does not give a process (OPEN_MAX)


class Service(Protocol):
    """``serve_scheduler`` or ``serve_node`` with its settings filled in."""

    async def __call__(
        self, *, on_event: Callable[[Event], None], stop: asyncio.Event | None
    ) -> None: ...


def serve(service: Service, settings: Settings, *, with_parent: bool) -> None:
    """Blocks until the service ends.

    The first SIGINT or SIGTERM asks it to stop, a second one, or too long a
    stop, cuts it short.

    Args:
        with_parent: end too when standard input does, which is when the process that
            started this one is gone, however it went.

    Raises:
        ParallaxError: the service's own.
    """
    _take_files()
    holding = awake() if sys.platform == "darwin" else contextlib.nullcontext()
    with holding, contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt):
        asyncio.run(_serve(service, settings, with_parent=with_parent))


def _take_files() -> None:
    """Raises the limit on open files, which is 256 on macOS: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard < 0 else min(MOST_FILES, hard)
    if 0 <= soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def _serve(service: Service, settings: Settings, *, with_parent: bool) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    reporter = Reporter()
    running = asyncio.ensure_future(service(on_event=reporter, stop=stop))

    def ask() -> None:
        if stop.is_set():
            running.cancel()
        else:
            stop.set()
            loop.call_later(settings.limits.drain_s + GRACE_S, running.cancel)

    def parent_wrote() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin.fileno())
            ask()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    if with_parent:
        loop.add_reader(sys.stdin.fileno(), parent_wrote)
    try:
        await running
    finally:
        reporter.close()

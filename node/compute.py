"""The one MLX thread of a node.

MLX arrays belong to the thread that made them until they are evaluated, so
loading, running, cache operations and evaluation all happen here, one job after
the other; only bytes cross to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")

log = logging.getLogger(__name__)


class Compute:
    """Runs jobs in order on its own thread and hands results to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str = "mlx") -> None:
        self._loop = loop
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._since: float | None = None
        self._stopped = False
        self.on_death: Callable[[], None] | None = None  # told on the event loop
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """Queues a job that tells its result itself; what it raises is logged."""
        self._jobs.put(job)

    async def call(self, function: Callable[[], T], *, loads: bool = False) -> T:
        """Runs ``function`` on the thread and returns, or raises, what it does.

        A job that ``loads`` may take minutes and does not count as busy.
        """
        future: asyncio.Future[T] = self._loop.create_future()

        def job() -> None:
            if loads:
                self._since = None
            try:
                result = function()
            except BaseException as error:
                self.tell(_fail, future, error)
            else:
                self.tell(_fulfil, future, result)

        self.post(job)
        return await future

    def tell(self, callback: Callable[..., None], *args: object) -> None:
        """Calls back on the event loop; after the loop's end, nobody is told."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback, *args)

    @property
    def waiting(self) -> int:
        """Jobs not yet begun."""
        return self._jobs.qsize()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def busy_s(self, now: float) -> float:
        """How long the present job has run; 0 between jobs and while loading.

        ``now`` is ``time.monotonic()``.
        """
        since = self._since
        return max(0.0, now - since) if since is not None else 0.0  # it may have begun since

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after the jobs already queued, or gives up after ``timeout_s``."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        try:
            self._run()
            self._stopped = True
        finally:
            # Streams that outlive their thread abort the process when it exits.
            mx.clear_streams()
            if not self._stopped:  # nothing will ever be computed here again
                self.tell(self._died)

    def _died(self) -> None:
        if self.on_death is not None:
            self.on_death()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._since = time.monotonic()
            try:
                job()
            except Exception:  # the thread must live: every later job is somebody else's
                log.exception("a job of the MLX thread failed")
            finally:
                self._since = None


def _fulfil(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)

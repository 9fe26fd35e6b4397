"""Work beside the main flow: its failures are logged, and its threads hold up no end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from parallax.fabric.errors import ParallaxError

T = TypeVar("T")

log = logging.getLogger(__name__)


class Tasks:
    """The background tasks of one shell. A failure that nobody awaits is logged."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], *, awaited: bool = False) -> asyncio.Task[T]:
        """Runs ``work`` beside the caller, who sees to its failure if it is ``awaited``."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard if awaited else self._ended)
        return task

    async def stop(self) -> None:
        """Cancels every task and waits until each has let go."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ParallaxError):
            log.warning("%s", error.sentence)
        elif error is not None:
            log.error("A task in the background failed", exc_info=error)


async def in_thread(function: Callable[[], T]) -> T:
    """Runs ``function`` on a thread of its own and returns, or raises, what it does.

    Unlike asyncio's executor, which is waited for, the thread ends with the
    process: a fetch of many gigabytes must not hold up Ctrl-C.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def tell(result: T | None, error: BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            return  # the loop has ended: nobody waits any more

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            tell(None, error)
        else:
            tell(result, None)

    threading.Thread(target=run, name=f"in_thread {function!r:.40}", daemon=True).start()
    return await future

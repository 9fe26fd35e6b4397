"""Finding a scheduler again that was there a moment ago."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from parallax.fabric.discovery import Target
from parallax.fabric.errors import ParallaxError

T = TypeVar("T")

RETRY_FIRST_S = 0.25
RETRY_SOON_S = 1.0  # at most, while the scheduler was there a moment ago
RETRY_MOST_S = 5.0
SOON_S = 120.0  # a scheduler that is started again is back by then


class Patience:
    """How long to pause before the next try. Pure."""

    def __init__(self) -> None:
        self._pause_s = RETRY_FIRST_S
        self._lost_s: float | None = None  # when the scheduler was first missed

    def met(self) -> None:
        """The scheduler is there."""
        self._pause_s = RETRY_FIRST_S
        self._lost_s = None

    def pause_s(self, now: float) -> float:
        """The next pause, longer than the one before."""
        if self._lost_s is None:
            self._lost_s = now
        pause_s = self._pause_s
        most_s = RETRY_SOON_S if now - self._lost_s < SOON_S else RETRY_MOST_S
        self._pause_s = min(most_s, pause_s * 2)
        return pause_s


async def meet_again(
    met: Target,
    enrol: Callable[[Target], Awaitable[T]],
    search: Callable[[], Awaitable[Target]],
    pause_s: Callable[[], float],
) -> T:
    """Tries the address that was good a moment ago again and again, and searches beside it.

    Raises:
        ParallaxError: the search found nothing, or what it found does not answer.
    """
    searching = asyncio.ensure_future(search())
    try:
        while True:
            try:
                return await enrol(met)
            except ParallaxError:
                if searching.done():  # it may have moved to another address
                    return await enrol(searching.result())
            await asyncio.wait({searching}, timeout=pause_s())
    finally:
        searching.cancel()
        await asyncio.gather(searching, return_exceptions=True)

"""The events of one request's choices, brought together for whoever writes them out."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from time import perf_counter

from parallax.scheduler.generation import Finish, Token

_log = logging.getLogger(__name__)

Event = Token | Finish
Arrival = tuple[int, Event, float]  # choice, event, when it came (perf_counter)


class Flow:
    """Reads one generator per choice and hands over what is ready, all of it at once.

    At most ``bound`` events wait here; beyond that the generators are not read, so that
    a client who reads slowly holds up nothing but its own answer.
    """

    def __init__(self, generators: Sequence[AsyncGenerator[Event, None]], bound: int) -> None:
        self._events: deque[Arrival] = deque()
        self._bound = bound
        self._open = len(generators)
        self._error: Exception | None = None
        self._nudged = False
        self._ready: asyncio.Future[None] | None = None
        self._space = asyncio.Event()
        self._generators = generators
        self._pumps = [
            asyncio.create_task(self._pump(choice, generator))
            for choice, generator in enumerate(generators)
        ]

    async def ready(self) -> list[Arrival]:
        """All events that wait now; none after a nudge, or when all generators have ended.

        What a generator raised is raised here, once the events before it are handed over.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._nudged or not self._open:
                self._nudged = False
                return []
            self._ready = asyncio.get_running_loop().create_future()
            await self._ready
        batch = list(self._events)
        self._events.clear()
        self._space.set()
        return batch

    @property
    def ended(self) -> bool:
        """Whether every generator has ended and all it gave has been handed over."""
        return not self._open and not self._events and self._error is None

    def nudge(self) -> None:
        """Make :meth:`ready` return even though nothing is there."""
        self._nudged = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """Ends it at once: :meth:`ready` raises this, and what waits is not handed over."""
        self._error = self._error or error
        for pump in self._pumps:
            pump.cancel()
        self._events.clear()
        self._wake()

    def drop(self, choice: int) -> None:
        """This choice needs no more events: close its generator."""
        self._pumps[choice].cancel()

    async def close(self) -> None:
        """Close every generator and wait until each has let go."""
        # A task that was cancelled holds the frame that it was cancelled in, and that this flow:
        # if it held the task as well, prompt and answer would stay until garbage is collected.
        pumps, self._pumps = self._pumps, []
        for pump in pumps:
            pump.cancel()
        for outcome in await asyncio.gather(*pumps, return_exceptions=True):
            if isinstance(outcome, Exception):
                _log.error("A generator failed while it was closed", exc_info=outcome)
        for generator in self._generators:  # those whose pump had not begun
            await generator.aclose()

    async def _pump(self, choice: int, generator: AsyncGenerator[Event, None]) -> None:
        events = self._events
        try:
            async for event in generator:
                events.append((choice, event, perf_counter()))
                self._wake()
                if len(events) >= self._bound:
                    self._space.clear()
                    await self._space.wait()
        except Exception as error:
            self._error = self._error or error
        finally:
            self._open -= 1
            self._wake()
            await generator.aclose()

    def _wake(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

"""Models that people choose: looked up, fetched if they must be, the newest choice wins."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from parallax.fabric.errors import ParallaxError
from parallax.fabric.models import ModelFolder
from parallax.fabric.tasks import Tasks, in_thread
from parallax.scheduler.model_facts import ModelFacts, read_facts
from parallax.scheduler.outline import resolve

log = logging.getLogger(__name__)

ACCEPT_S = 20.0  # a model that takes longer to fetch is accepted, and fetched on

Take = Callable[[ModelFolder, ModelFacts, int], Awaitable[None]]


class Choosing:
    """From a model's name to its folder and facts.

    Args:
        state_dir: where fetched models are.
        take: makes a model the cluster's; called for one at a time.
        trouble: is told what goes wrong after a choice was accepted.
    """

    def __init__(
        self, state_dir: Path, take: Take, trouble: Callable[[ParallaxError], None]
    ) -> None:
        self._state_dir = state_dir
        self._take = take
        self._trouble = trouble
        self.model: str | None = None  # being looked up or fetched
        self._tasks = Tasks()
        self._turn = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._newest = 0  # of those that could be looked up

    async def choose(self, model: str, nodes: int) -> None:
        """Returns when the model is taken, or after a while when it must be fetched first.

        Raises:
            ModelNotFound, ModelBroken, UnknownArchitecture.
        """
        task = self._tasks.start(self._choose(model, nodes), awaited=True)
        done, _ = await asyncio.wait({task}, timeout=ACCEPT_S)
        if done:
            await task
        else:
            task.add_done_callback(self._late)

    async def stop(self) -> None:
        """Gives up what is being looked up."""
        await self._tasks.stop()

    async def _choose(self, model: str, nodes: int) -> None:
        number = next(self._numbers)
        self.model = model
        try:
            folder = await in_thread(lambda: resolve(model, state_dir=self._state_dir))
            facts = await in_thread(lambda: read_facts(folder))
        finally:
            if self.model == model:
                self.model = None
        if number < self._newest:  # it took long to fetch, and people decided anew
            return
        self._newest = number
        async with self._turn:
            if number == self._newest:
                await self._take(folder, facts, nodes)

    def _late(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ParallaxError):
            self._trouble(error)
        elif error is not None:
            log.error("a model could not be chosen", exc_info=error)

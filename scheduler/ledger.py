"""The cluster's totals on disk."""

from __future__ import annotations

import logging
import math

from parallax.fabric.errors import ParallaxError
from parallax.scheduler.store import Store
from parallax.scheduler.totals import Totals

log = logging.getLogger(__name__)

NOTE = "totals"
PAUSE_S = 10.0  # between two times of writing; a killed process loses what was counted since


class Ledger:
    """Writes totals down, now and then and at the end."""

    def __init__(self, store: Store, totals: Totals) -> None:
        self._store = store
        self._totals = totals
        self._written: object = None
        self._due = 0.0

    async def recall(self) -> None:
        """Goes on from what earlier processes counted."""
        self._totals.recall(await self._store.note(NOTE))

    async def write(self, now: float = math.inf) -> None:
        """Writes, if there is news and the last time is long enough ago."""
        told = self._totals.told()
        if told == self._written or now < self._due:
            return
        self._due = now + PAUSE_S
        try:
            await self._store.keep(NOTE, told)
        except ParallaxError as error:  # a full disk, say: statistics are not worth more
            log.warning("totals are not written: %s", error.sentence)
            return
        self._written = told

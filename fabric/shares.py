"""Shares: places for calls at once, so many in all and so many for one caller.

With a bound for all alone, one member that holds every place shuts the others out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Shares:
    """Places, and who has them.

    Args:
        most: places in all.
        each: places that one peer may have.
    """

    def __init__(self, most: int, each: int) -> None:
        self._most = most
        self._each = each
        self._taken: Counter[str | None] = Counter()

    @property
    def taken(self) -> int:
        """Places that are taken now."""
        return self._taken.total()

    @contextmanager
    def place(self, peer: str | None) -> Iterator[bool]:
        """A place for a peer until the block ends; False if there is none for it."""
        if self.taken >= self._most or self._taken[peer] >= self._each:
            yield False
            return
        self._taken[peer] += 1
        try:
            yield True
        finally:
            self._taken[peer] -= 1
            if not self._taken[peer]:
                del self._taken[peer]

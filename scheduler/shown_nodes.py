"""Which nodes have figures of their own among the metrics. Pure."""

from __future__ import annotations

from collections import OrderedDict

MOST_SHOWN = 2048  # of about 5 KB each


class ShownNodes:
    """Names of nodes, the one heard of last at the end.

    A node that left keeps its counters, so that what it did is not lost with it; but nodes come
    under new names for ever, and each has a dozen series.
    """

    def __init__(self, most: int = MOST_SHOWN) -> None:
        self._most = most
        self._names: OrderedDict[str, None] = OrderedDict()

    def heard(self, name: str) -> str | None:
        """A node says something of itself; returns who makes room for it."""
        self._names[name] = None
        self._names.move_to_end(name)
        if len(self._names) <= self._most:
            return None
        return self._names.popitem(last=False)[0]

"""How many wrong tokens came from where lately (pure).

Nobody guesses 160 random bits, so this protects no token: it keeps logs and counters
from being flooded. A right token is taken whatever else comes from its address, or
whoever shares that address could keep others out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_FAILURES = 10  # of one address in one window; what comes beyond is not even looked into
WINDOW_S = 60.0
MOST_ADDRESSES = 1024


@dataclass(slots=True)
class _Window:
    since_s: float
    count: int = 0


@dataclass(slots=True)
class WrongTokens:
    """Counts by address, in windows that begin with the first wrong token."""

    _windows: dict[str, _Window] = field(default_factory=dict)

    def count(self, address: str, now: float) -> float | None:
        """One more from ``address``; when that is one too many, for how long it should pause."""
        window = self._windows.get(address)
        if window is not None and not 0 <= now - window.since_s < WINDOW_S:
            del self._windows[address]
            window = None
        if window is None:
            if len(self._windows) >= MOST_ADDRESSES:
                del self._windows[next(iter(self._windows))]  # the one that began first
            window = self._windows[address] = _Window(now)
        window.count += 1
        if window.count <= MOST_FAILURES:
            return None
        return window.since_s + WINDOW_S - now

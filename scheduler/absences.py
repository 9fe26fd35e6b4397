"""How long nodes have been out of rings, and what their figures are still worth. Pure.

A node that is left out because it was slow shows nothing any more, so what is known of it fades,
until it is worth a try. One that turns out to be slow again fades half as fast from then on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AWAY_S = 60.0  # without a report; less is a ring that forms anew
HALF_LIFE_S = 300.0
MOST_DOUBLINGS = 6  # of the half-life: above five hours
FORGIVEN_S = 3600.0  # in rings and not slow
FADED = 0.02  # what is worth less is worth nothing
TICK_S = 60.0  # figures of all nodes fade at the same moments: each is a reason to plan


@dataclass(slots=True)
class _Stay:
    since: float
    seen: float
    failures: int = 0
    failed: bool = False


class Absences:
    """When each node was last heard of as part of a ring."""

    def __init__(self) -> None:
        self._stays: dict[str, _Stay] = {}

    def seen(self, node_id: str, now: float) -> bool:
        """A node's stage reports. Returns whether the node is back from an absence."""
        stay = self._stays.get(node_id)
        if stay is None:
            self._stays[node_id] = _Stay(now, now)
            return False
        is_back = now - stay.seen >= AWAY_S
        if is_back:
            stay.since, stay.failed = now, False
        elif now - stay.since >= FORGIVEN_S and not stay.failed:
            stay.failures = 0
        stay.seen = now
        return is_back

    def weight(self, node_id: str, now: float) -> float:
        """What figures of the node are worth, from 1 (it is in a ring) down to 0."""
        stay = self._stays.get(node_id)
        if stay is None:
            return 1.0
        away_s = math.floor(now / TICK_S) * TICK_S - stay.seen
        if away_s < AWAY_S:
            return 1.0
        doubled = 2.0 ** min(stay.failures, MOST_DOUBLINGS)
        weight = float(0.5 ** (away_s / (HALF_LIFE_S * doubled)))
        return weight if weight >= FADED else 0.0

    def failed(self, node_id: str) -> None:
        """A node that was back is as slow as it was before, or nearly so."""
        stay = self._stays.get(node_id)
        if stay is not None and not stay.failed:
            stay.failed = True
            stay.failures += 1

    def has_failed(self, node_id: str) -> bool:
        """Whether it has since it was last back."""
        stay = self._stays.get(node_id)
        return stay is not None and stay.failed

    def forget(self, node_id: str) -> None:
        """A node is gone."""
        self._stays.pop(node_id, None)

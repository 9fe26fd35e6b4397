"""Which blocks are asked for of whom: pure.

Parcels are runs of neighbouring blocks that a stage lacks. Every source that holds a parcel may be
asked for it, and each is asked for the next one as soon as it has delivered the last: a source that
is twice as fast delivers twice as much. What a source did not deliver goes back, to be asked of
another; one that delivered bytes with a wrong sum is never asked again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

PAUSE_FIRST_S = 0.25  # after a source was lost; doubled each time
PAUSE_MOST_S = 5.0
AWAIT_S = 0.5  # until a scheduler that waits for its hub is asked again

Has = Callable[[str, int], bool]  # a file's block


@dataclass(frozen=True, slots=True)
class Parcel:
    """Neighbouring blocks of one file."""

    file: str
    blocks: range


@dataclass(slots=True)
class _Source:
    has: Has
    banned: bool = False
    failures: int = 0
    again_at: float = 0.0
    flying: list[Parcel] = field(default_factory=list)


class FetchPlan:
    """What is still to be fetched, and who delivers it.

    Args:
        parcels: everything that is lacking, in the order in which it is best asked for.
        patience_s: how long nothing may come before it is given up.
        now: monotonic seconds.
    """

    def __init__(self, parcels: Iterable[Parcel], *, patience_s: float, now: float) -> None:
        self._left = deque(parcels)
        self._patience_s = patience_s
        self._sources: dict[str, _Source] = {}
        self._moved_at = now

    @property
    def finished(self) -> bool:
        """Whether everything has come."""
        return not self._left and not any(s.flying for s in self._sources.values())

    @property
    def banned(self) -> list[str]:
        """Sources that delivered wrong bytes."""
        return [name for name, source in self._sources.items() if source.banned]

    def offer(self, source: str, has: Has) -> None:
        """A source is there; ``has`` says what it holds now."""
        known = self._sources.get(source)
        if known is None:
            self._sources[source] = _Source(has)
        else:
            known.has = has

    def next(self, source: str, now: float) -> Parcel | None:
        """What to ask of a source now, if anything; it flies until one of the verbs below."""
        known = self._sources[source]
        if known.banned or now < known.again_at:
            return None
        for place, parcel in enumerate(self._left):
            if all(known.has(parcel.file, block) for block in parcel.blocks):
                del self._left[place]
                known.flying.append(parcel)
                return parcel
        return None

    def arrived(self, source: str, parcel: Parcel, now: float) -> None:
        """All of a parcel has come, and was right."""
        known = self._sources[source]
        known.flying.remove(parcel)
        known.failures = 0
        self._moved_at = now

    def stopped(self, source: str, parcel: Parcel, good: int, now: float) -> None:
        """A source went away after so many good blocks of a parcel: it rests for a while."""
        known = self._sources[source]
        self._back(known, parcel, good, now)
        if now >= known.again_at:  # what flew beside it is the same failure
            pause_s = min(PAUSE_MOST_S, PAUSE_FIRST_S * 2**known.failures)
            known.failures += 1
            known.again_at = now + pause_s

    def wrong(self, source: str, parcel: Parcel, good: int, now: float) -> None:
        """After so many good blocks came one with a wrong sum: never again from there."""
        known = self._sources[source]
        self._back(known, parcel, good, now)
        known.banned = True

    def returned(self, source: str, parcel: Parcel, good: int, now: float) -> None:
        """The rest of a parcel was not asked for after all, through no fault of the source."""
        self._back(self._sources[source], parcel, good, now)

    def awaited(self, source: str, parcel: Parcel, now: float) -> None:
        """A parcel is on its way to where it comes from: patience begins anew."""
        known = self._sources[source]
        self._back(known, parcel, 0, now)
        known.again_at = now + AWAIT_S
        self._moved_at = now

    def hopeless(self, now: float) -> bool:
        """Whether waiting will not help: nothing came for long, or nobody is left to ask."""
        if self.finished:
            return False
        alive = [s for s in self._sources.values() if not s.banned]
        return not alive or now - self._moved_at > self._patience_s

    def _back(self, known: _Source, parcel: Parcel, good: int, now: float) -> None:
        known.flying.remove(parcel)
        rest = parcel.blocks[good:]
        if rest:
            self._left.appendleft(Parcel(parcel.file, rest))
        if good:
            self._moved_at = now

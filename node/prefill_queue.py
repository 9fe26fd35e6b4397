"""Prompts that are still to enter the ring, and whose turn it is. Pure.

They go in the order of their arrival, but short ones pass a long one: they hold up nobody for long.
Others of which not half as much is left as of the first one share the ring with it, so that they do
not wait for all of a very long one. (Those that are alike may begin alike: the second then goes on
from what the first leaves.) What passes it between two of its chunks is bounded by what it gets
itself, so that it keeps a share of the ring however many come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from parallax.node.sequences import Sequence, is_short, remaining
from parallax.proto import wire_pb2 as wire

MOST_OVERTAKING = 4  # times the tokens of the first one's last chunk
LONGER_TIMES = 2  # what is longer by so much lets others share the ring with it


class PrefillQueue:
    """Sequences whose prompts are not all on their way, in the order in which they came."""

    def __init__(self, shape: wire.RingShape) -> None:
        self._shape = shape
        self._waiting: deque[Sequence] = deque()
        self._overtaking = 0  # tokens that passed the first since its last chunk
        self._bearable = self._grid = max(1, shape.chunk_tokens)  # how many of these it bears
        self._equal = 0  # how many it has itself: its last chunk's

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def append(self, sequence: Sequence) -> None:
        """A new one, behind the others."""
        self._waiting.append(sequence)

    def discard(self, sequence: Sequence) -> None:
        """One that has entered the ring, or is not wanted any more; perhaps it is not here."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)

    def next(self) -> Sequence:
        """Whose chunk is the next; there is one."""
        first = self._waiting[0]
        if self._overtaking >= self._bearable:
            return first
        short = next((s for s in self._waiting if is_short(s, self._shape)), None)
        if short is not None or self._overtaking >= self._equal:
            return short or first
        least = min(self._waiting, key=remaining)
        return least if LONGER_TIMES * remaining(least) <= remaining(first) else first

    def taken(self, sequence: Sequence, tokens: int) -> None:
        """A chunk of so many tokens of one of them enters the ring."""
        if sequence is self._waiting[0]:
            self._overtaking = 0
            self._bearable = max(self._grid, MOST_OVERTAKING * tokens)
            self._equal = tokens
        else:
            self._overtaking += tokens

    @property
    def tokens(self) -> int:
        """Of all prompts, those that are still to enter the ring."""
        return sum(sequence.left for sequence in self._waiting)

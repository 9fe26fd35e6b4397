"""One answer in the making, and the lane that it is decoded in, as the conductor sees them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate

from parallax.proto import wire_pb2 as wire

# Of a row that joins a lane. Decoding beside a row of 2,048 tokens, four rows of 100 took three
# times as long (8 layers, 256 wide, float32 on the CPU backend); a step of its own costs a third.
MUCH_PADDING_TOKENS = 2048
SHORT_CHUNKS = 2  # of the prefill grid
MOST_JOINING_TOKENS = 1 << 20  # of the histories that travel in one frame: a message has a bound


class Phase(Enum):
    """Where a sequence is."""

    PREFILL = "prefill"  # in its own cache, chunks still to be injected
    READY = "ready"  # every chunk injected; waits for its lane's next step
    DECODE = "decode"  # a row of a lane


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making. ``history`` is prompt and answer so far."""

    id: int
    request: int
    attempt: int
    prompt: list[int]
    generated: list[int]
    sampling: wire.Sampling
    max_tokens: int
    end_tokens: frozenset[int]
    phase: Phase = Phase.PREFILL
    cached: int = 0  # tokens in its caches once the frames injected so far have run
    known: int = 0  # tokens of a kept prefix that it will probably begin with
    begun: bool = False  # its prefill, perhaps with a kept prefix
    left_at_begin: int = 0  # tokens to prefill then
    forked: int = 0  # tokens of that prefix, until they are reported
    boundaries: set[int] | None = None  # where its caches are kept, if they cannot be cut later
    lane: Lane | None = None
    alive: bool = True

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt) + len(self.generated)

    @property
    def prefill_length(self) -> int:
        """All but the last token: that one is the first decode step's input."""
        return self.length - 1

    @property
    def left(self) -> int:
        """Tokens that are still to be prefilled."""
        return self.prefill_length - self.cached

    def expected_length(self, more: int, context_tokens: int) -> int:
        """Its length ``more`` tokens from now, or at its end if that comes first."""
        end = len(self.prompt) + self.max_tokens
        return min(self.length + more, end, context_tokens or end)

    def slice(self, start: int, end: int) -> list[int]:
        """Tokens ``[start, end)`` of the history."""
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        if start >= split:
            return self.generated[start - split : end - split]
        return self.prompt[start:] + self.generated[: end - split]

    @property
    def last_token(self) -> int:
        """The input of the next decode step."""
        return self.generated[-1] if self.generated else self.prompt[-1]


@dataclass(slots=True, eq=False)
class Lane:
    """One decode batch. ``rows`` in the stages' row order."""

    id: int
    rows: list[Sequence] = field(default_factory=list)
    joining: list[Sequence] = field(default_factory=list)
    in_flight: bool = False

    @property
    def members(self) -> int:
        return len(self.rows) + len(self.joining)

    def take_joining(self) -> list[Sequence]:
        """Those that join with the next frame: as many as it takes, and one if any waits."""
        totals = accumulate(sequence.length for sequence in self.joining)
        count = max(1, sum(total <= MOST_JOINING_TOKENS for total in totals))
        joining, self.joining = self.joining[:count], self.joining[count:]
        return joining

    @property
    def longest(self) -> int:
        return max((s.length for s in (*self.rows, *self.joining)), default=0)


def forecast(
    lanes: Iterable[Lane], joining: Iterable[Sequence], more: int, shape: wire.RingShape
) -> list[tuple[int, int]]:
    """Rows and length of each lane once all have joined one and have grown by ``more`` tokens."""
    shapes = []
    for lane in lanes:
        rows = (*lane.rows, *lane.joining)
        lengths = (s.expected_length(more, shape.context_tokens) for s in rows)
        shapes.append((len(rows), max(lengths, default=0)))
    for sequence in joining:
        length = sequence.expected_length(more, shape.context_tokens)
        chosen = least_padding(shapes, length, shape)
        members, longest = shapes[chosen]
        shapes[chosen] = members + 1, max(longest, length)
    return shapes


def remaining(sequence: Sequence) -> int:
    """Tokens that are probably still to be prefilled."""
    return sequence.left if sequence.begun else sequence.left - sequence.known


def is_short(sequence: Sequence, shape: wire.RingShape) -> bool:
    """Whether its prefill is a hiccup for running answers, not worth a slower start."""
    tokens = sequence.left_at_begin if sequence.begun else sequence.left - sequence.known
    return tokens <= SHORT_CHUNKS * max(1, shape.chunk_tokens)


def least_padding(shapes: list[tuple[int, int]], length: int, shape: wire.RingShape) -> int:
    """The lane to join: fewest members, so that every stage has a batch; then least padding.

    Every row of a lane is padded to the longest, in memory and at each step. A row that would mean
    much of that goes to a spare lane, at the cost of a step of its own; where it would mean much
    everywhere, to the lane where it means least.

    ``shapes``: members and longest of each lane; where all are full, any will do.
    """
    most = max(1, shape.lane_rows)
    usual = max(1, shape.lanes)

    def padding(number: int) -> int:
        members, longest = shapes[number]
        rows = members if length > longest else 1
        return rows * abs(longest - length) if members else 0

    def cost(number: int) -> tuple[bool, int, int, int]:
        members, longest = shapes[number]
        return members >= most, members, abs(longest - length) if members else 0, number

    chosen = min(range(usual), key=cost)
    if padding(chosen) <= MUCH_PADDING_TOKENS:
        return chosen
    spare = [number for number in range(usual, len(shapes)) if shapes[number][0] < most]
    better = min(spare, key=lambda number: (padding(number), number), default=chosen)
    if padding(better) <= MUCH_PADDING_TOKENS:
        return better
    free = [number for number in range(len(shapes)) if shapes[number][0] < most]
    return min(free, key=lambda number: (padding(number), number), default=chosen)

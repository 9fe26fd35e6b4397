"""How much of a prompt enters the ring beside running answers, and when. Pure.

A decode step waits behind all the chunks that entered before it. Say that a burst has m of them,
each of which takes a stage t, on a ring of s stages with as many lanes, and that those of the burst
before took t': then the step waits for m t + (s - 1) (t - t'), what it costs a stage and what it
costs more than before to follow the last of them through the others. With fewer lanes stages idle,
and the burst has a head start of a step's time in each that does; from there the step gains on it,
stage by stage, what a chunk takes longer than a step. So while answers run, a burst comes only
after every lane has taken a step, and it is the largest for which an answer waits less than a share
of what its own steps take; at the least it is one chunk of the smallest size. That share follows
from what is seen: it grows a little with each step around the ring that took less than
``MOST_CALM_TIMES`` as long as without chunks, and shrinks by 99 times as much with each that took
longer, so that one in a hundred does (the stochastic approximation of a quantile, by Robbins and
Monro, 1951). While none run, chunks are as ``node/chunk_sizes.py`` says, which knows what chunks
cost. Sizes lie on a grid of halves, and boundaries at their multiples; where a model's results
depend on the grid (the self-check tells), there is one size only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from parallax.node.chunk_sizes import ChunkSizes
from parallax.proto import wire_pb2 as wire

SMALLEST_TOKENS = 4  # beside running answers, and of the grid's size one part of so many:
SMALLEST_SHARE = 64  # smaller ones are mostly what a chunk costs whatever its size
SMALLEST_LONE_TOKENS = 8
FIRST_SHARE = 1.4  # what a burst may add to the time that one step of every lane takes
LEAST_SHARE, MOST_SHARE = 0.4, 1.8
SHARE_STEP = 0.04
MOST_CALM_TIMES = 2.8
ODDS = 0.01  # of more than that
TRY_EVERY = 128  # bursts, while fixed costs are in doubt: fewer than one gap in a hundred
_WEIGHT = 0.2  # of a new measurement


class PrefillPace:
    """The pace of one ring's prefill.

    Args:
        shape: its chunk size, and whether several tokens at once give what one by one does.
        costs: of each stage; whether the same holds for what its caches keep.
    """

    def __init__(self, shape: wire.RingShape, costs: Sequence[wire.CacheCost]) -> None:
        self._stages = len(costs)
        self._burst = self._stages  # chunks of a burst
        self._chunk_s = 0.0  # what one of the last burst was expected to take
        self._left = 0  # of this one, still to come
        self._planned_for: set[int] = set()  # lanes that were in the ring when it was planned
        self._doubts = 0  # bursts planned while fixed costs were in doubt
        size = max(1, shape.chunk_tokens)
        self._sizes = [size]
        any_size = shape.block_tokens > 1 and all(cost.answers for cost in costs)
        smallest = max(SMALLEST_TOKENS, size // SMALLEST_SHARE)
        while any_size and size % 2 == 0 and size // 2 >= smallest:
            size //= 2
            self._sizes.append(size)
        self._size = self._sizes[0]
        lone = [s for s in self._sizes if s >= SMALLEST_LONE_TOKENS] or self._sizes
        self._lone = ChunkSizes(self._stages, lone)
        self._stepped: set[int] = set()  # lanes, since this burst began
        self._token_s = 0.0  # of prefill on the slowest stage, fixed costs apart; 0: not measured
        self._step_s: dict[int, float] = {}  # of each lane there
        self._share = FIRST_SHARE
        self._calm_s: dict[int, float] = {}  # of each lane, around the ring without chunks
        self._paced: set[int] = set()  # lanes that a paced chunk was sent beside since they entered
        self._unpaced: set[int] = set()

    def measured_chunk(self, tokens: int, slowest_s: float, last_s: float) -> None:
        """A chunk came back; what the slowest stage took for it, and the last one."""
        if tokens and slowest_s:
            self._lone.measured(tokens, slowest_s, last_s)
            self._token_s = _mean(self._token_s, slowest_s / (self._lone.fixed_tokens + tokens))

    def measured_step(self, lane: int, slowest_s: float, around_s: float | None) -> None:
        """A lane's decode step came back.

        Args:
            lane: which.
            slowest_s: what the slowest stage took for it.
            around_s: how long it was in the ring; None if that is not known.
        """
        if slowest_s:
            self._step_s[lane] = _mean(self._step_s.get(lane, 0.0), slowest_s)
        calm_s = self._calm_s.get(lane, 0.0)
        if around_s is None or lane in self._unpaced:
            return
        if lane not in self._paced:
            self._calm_s[lane] = _mean(calm_s, around_s)
        elif calm_s:
            late = around_s > MOST_CALM_TIMES * calm_s
            share = self._share + SHARE_STEP * (ODDS - late)
            self._share = min(MOST_SHARE, max(LEAST_SHARE, share))

    def stepped(self, lane: int) -> None:
        """A lane's step entered the ring."""
        self._stepped.add(lane)
        self._paced.discard(lane)
        self._unpaced.discard(lane)

    def chunked(self) -> None:
        """A chunk entered the ring."""
        if not self._left:
            self._left = self._burst
            self._stepped.clear()
        self._left -= 1

    def due(self, lanes: Iterable[int]) -> bool:
        """Whether a chunk may go, with these lanes in the ring."""
        lanes = set(lanes)
        if not lanes <= self._planned_for:
            self._left = 0  # of a burst for which nobody who came since was asked
        return self._left > 0 or self._stepped.issuperset(lanes)

    def next_chunk(self, lanes: Collection[int], chunks: int, waiting: int, *, short: bool) -> int:
        """The size of the chunk that enters the ring now.

        Args:
            lanes: in the ring.
            chunks: in the ring.
            waiting: tokens that are still to enter it.
            short: its prompt holds nobody up for long, and need not keep the pace.
        """
        size = self._sizes[0]
        (self._unpaced if short else self._paced).update(lanes)
        if not short:
            size = self.chunk_tokens(lanes, chunks)
            self.chunked()
        return size if lanes else self._lone.next(waiting)

    def chunk_tokens(self, lanes: Collection[int], chunks: int = 0) -> int:
        """The size of the next chunk, with these lanes and so many chunks in the ring."""
        if not self._left:
            if not chunks:
                self._chunk_s = 0.0
            self._planned_for = set(lanes)
            self._burst, self._size = self._plan(lanes)
            if lanes and self._lone.doubtful:
                self._try_larger()
            self._chunk_s = self._expected_s(self._size)
        return self._size

    def _plan(self, lanes: Collection[int]) -> tuple[int, int]:
        """How many chunks the next burst has, and of which size."""
        steps = [self._step_s.get(lane, 0.0) for lane in lanes]
        # Steps of few lanes leave stages idle: each goes once around the ring all the same.
        round_s = max(sum(steps), self._stages * max(steps, default=0.0))
        if not round_s or not self._token_s:
            return self._stages, self._sizes[0]
        bursts = [
            (count, size)
            for size in self._sizes
            for count in range(1, self._stages + 1)
            if self._wait_s(count, self._expected_s(size), steps) <= self._share * round_s
        ]
        # Of bursts that bring as much, the one with the fewest chunks costs least.
        return max(bursts, key=lambda b: (b[0] * b[1], b[1]), default=(1, self._sizes[-1]))

    def _wait_s(self, count: int, chunk_s: float, steps: Sequence[float]) -> float:
        """How long a step waits behind a burst that enters right behind the last of them."""
        behind = self._stages - 1
        if len(steps) > behind:
            return count * chunk_s + behind * max(0.0, chunk_s - self._chunk_s)
        idle_s = (self._stages - len(steps)) * max(steps)
        first_s = count * chunk_s - idle_s
        last_s = first_s + behind * (chunk_s - max(steps))
        return max(first_s, last_s)

    def _try_larger(self) -> None:
        """Now and then another size, or nobody would learn that it is better."""
        self._doubts += 1
        if self._doubts % TRY_EVERY == 0 and self._size < self._sizes[0]:
            self._burst, self._size = 1, self._sizes[self._sizes.index(self._size) - 1]

    def _expected_s(self, tokens: int) -> float:
        return self._token_s * (self._lone.fixed_tokens + tokens)


def _mean(before: float, now: float) -> float:
    """A running mean; frames that stood still for reasons of the machine's own move it little."""
    return before + _WEIGHT * (min(now, 2 * before) - before) if before else now

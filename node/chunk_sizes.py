"""How large the chunks of prompts are while no answer runs, from the times that stages took. Pure.

Chunks pass s stages one behind the other. Say that one of c tokens takes a stage as long as a + c
tokens more would, and the last stage r times that: it is quicker, because of its last layer only
keys and values are wanted. R tokens are through after about (R / c) (a + c), what the slowest
stage does, and (s - 2) (a + c) + r (a + c) until the pipeline has filled and drained. Two
consequences:

- A prompt in chunks of c is quicker than in chunks of c / 2 where a R / c > (s - 2) c / 2.
- The last stage catches up, so only the size of the last chunks matters to it: they get smaller
  by halves, each size for the r / (1 - r) chunks that the last stage needs to be through with the
  size before. One more half gains r c / 2 and costs a / 2 for each of these chunks. Where the last
  stage is not quicker, it counts as one more of the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from parallax.node.times import Times

# a, until two sizes have been measured, of the largest size: 1 of 32 on MLX's CPU backend; on GPUs
# reading the weights takes as long as computing some tens of tokens.
FIXED_SHARE = 32
LEAST_FIXED = 0.5  # what is believed of measurements
FRESH_CHUNKS = 1024  # for how many a measurement counts
REVIEW_CHUNKS = 4  # how often fixed costs are worked out anew
MOST_FIXED_SHARE = 2  # of the largest size, one part of so many: it is chosen to be large


class ChunkSizes:
    """The sizes of one ring's chunks.

    Args:
        stages: how many the ring has.
        sizes: that chunks may have, each half of the one before.
    """

    def __init__(self, stages: int, sizes: Sequence[int]) -> None:
        self._stages = stages
        self._sizes = sizes
        # By the largest power of two that is no larger than a chunk: its tokens, the slowest
        # stage's time, and the share of that which the last stage takes.
        self._tokens, self._stage_s, self._shares = (Times(FRESH_CHUNKS) for _ in range(3))
        self._chunks = 0
        self._fixed = sizes[0] / FIXED_SHARE
        self._most_fixed = max(4.0, sizes[0] / MOST_FIXED_SHARE)
        self._doubtful = True
        self._share = 1.0
        self._first = sizes[0]  # the size that the chunks now on their way began with
        self._left = 0  # tokens behind the chunk that was asked for last

    @property
    def fixed_tokens(self) -> float:
        """How many tokens more a chunk would have to have to take as long without fixed costs."""
        return self._fixed

    @property
    def doubtful(self) -> bool:
        """Whether too few sizes were sent lately to tell fixed costs from others."""
        return self._doubtful

    def measured(self, tokens: int, slowest_s: float, last_s: float) -> None:
        """A chunk came back: what the slowest and the last stage took for it."""
        if tokens < 1 or not 0 < last_s <= slowest_s:
            return
        self._chunks += 1
        size = 1 << (tokens.bit_length() - 1)
        self._tokens.add(size, tokens, self._chunks)
        self._stage_s.add(size, slowest_s, self._chunks)
        enough = self._shares.add(size, last_s / slowest_s, self._chunks)
        if enough or self._chunks % REVIEW_CHUNKS == 0:
            self._work_out()

    def _work_out(self) -> None:
        shares = self._shares.known(self._chunks)
        if shares:
            self._share = statistics.fmean(shares.values())
        tokens = list(self._tokens.known(self._chunks).values())
        stage_s = list(self._stage_s.known(self._chunks).values())
        self._doubtful = len(stage_s) < 2
        if not self._doubtful:
            line = statistics.linear_regression(tokens, stage_s)
            fixed = line.intercept / line.slope if line.slope > 0 else self._most_fixed
            self._fixed = min(self._most_fixed, max(LEAST_FIXED, fixed))

    def next(self, tokens: int) -> int:
        """The size of the next chunk, when so many tokens are still to enter the ring."""
        if tokens > self._left:  # not those that were left: others came
            self._first = self._uniform(tokens)
        size = self._first
        for smaller in self._sizes[self._sizes.index(size) + 1 :]:
            if tokens > self._tail(smaller):
                break
            size = smaller
        self._left = max(0, tokens - size)
        return size

    def _uniform(self, tokens: int) -> int:
        """The best of sizes for so many tokens, but for those at the end."""
        for size in self._sizes[:-1]:
            others = self._stages - 2 + (0 if self._drains(size) else self._share)
            if self._fixed * tokens / size >= others * size / 2:
                return size
        return self._sizes[-1]

    def _drains(self, size: int) -> bool:
        """Whether half of this size, at the end, is worth the chunks that it costs."""
        return self._stages > 1 and size * (1 - self._share) > self._fixed

    def _tail(self, size: int) -> float:
        """How many tokens at the end go in chunks of this size and of smaller ones."""
        tokens = 0.0
        for number, larger in enumerate(self._sizes[:-1]):
            half = self._sizes[number + 1]
            if half <= size and self._drains(larger):
                tokens += half * self._share / (1 - self._share)
        return tokens

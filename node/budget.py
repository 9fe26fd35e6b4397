"""What caches cost against what the tightest stage may hold. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parallax.proto import wire_pb2 as wire

GROWTH_TOKENS = 256  # caches grow by this many tokens (mlx-lm's KVCache.step)


@dataclass(frozen=True, slots=True)
class _Cost:
    """A stage's ``wire.CacheCost``: plain numbers, because they are asked for at every step."""

    fixed: int
    per_token: int
    window_per_token: int
    window: int

    def row(self, tokens: int, beyond: int = 0) -> int:
        """Bytes of a row so long; a window may hold ``beyond`` more tokens than its size."""
        return self._of(_padded(tokens), beyond)

    def lane(self, rows: int, longest: int) -> int:
        """Bytes of a lane. Merged rows may have begun to grow at any length, a lone one at none.

        mlx-lm's caches are as long as their tokens when rows are merged, and grow from there.
        """
        more = GROWTH_TOKENS - 1 if rows > 1 else 0
        return rows * self._of(_padded(longest) + more, 0)

    def _of(self, tokens: int, beyond: int) -> int:
        windowed = min(tokens, self.window + beyond) if self.window else 0
        return self.fixed + self.per_token * tokens + self.window_per_token * windowed


class Budget:
    """At most ``limit_bytes`` of caches on each stage (0: no limit), and what they cost there.

    Args:
        limit_bytes: of the tightest stage.
        chunk_tokens: the prefill grid; while a window is prefilled it holds a chunk besides.
        costs: one for each stage.
    """

    def __init__(
        self, limit_bytes: int, chunk_tokens: int, costs: Iterable[wire.CacheCost]
    ) -> None:
        self.limit_bytes = limit_bytes
        self._chunk_tokens = chunk_tokens
        self._costs = [
            _Cost(c.fixed_bytes, c.bytes_per_token, c.window_bytes_per_token, c.window_tokens)
            for c in costs
        ]

    def charge(
        self,
        lanes: Iterable[tuple[int, int]],
        alone: Iterable[int],
        kept_bytes: Sequence[int] = (),
    ) -> int:
        """Bytes on the dearest stage: rows by padded length, and a copy of the largest lane.

        Args:
            lanes: rows, and tokens of the longest of them, of each lane.
            alone: tokens of each sequence that is in no lane.
            kept_bytes: of kept prefixes, on each stage.
        """
        lanes, alone = list(lanes), list(alone)
        most = 0
        for stage, cost in enumerate(self._costs):
            held = [cost.lane(rows, longest) for rows, longest in lanes]
            total = sum(held) + max(held, default=0)
            total += sum(cost.row(tokens, self._chunk_tokens) for tokens in alone)
            if kept_bytes:
                total += kept_bytes[stage]
            most = max(most, total)
        return most

    def kept(self, tokens: int) -> list[int]:
        """Bytes of a kept prefix of so many tokens, on each stage."""
        return [cost.row(tokens, self._chunk_tokens) for cost in self._costs]


def _padded(tokens: int) -> int:
    return -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS

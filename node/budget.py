"""What caches cost against what the tightest stage may hold. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallax.proto import wire_pb2 as wire

GROWTH_TOKENS = 256  # caches grow by this many tokens (mlx-lm's KVCache.step)


@dataclass(frozen=True, slots=True)
class Budget:
    """``limit_bytes`` of caches on each stage (0: no limit), and what they cost there."""

    limit_bytes: int
    costs: list[wire.CacheCost]

    def charge(self, lanes: Iterable[tuple[int, int]], alone: Iterable[int]) -> int:
        """Bytes on the dearest stage: rows by padded length, and a copy of the largest lane.

        Args:
            lanes: rows, and tokens of the longest of them, of each lane.
            alone: tokens of each sequence that is in no lane.
        """
        lanes, alone = list(lanes), list(alone)
        most = 0
        for cost in self.costs:
            held = [rows * row_bytes(cost, longest) for rows, longest in lanes]
            prefilling = sum(row_bytes(cost, length) for length in alone)
            most = max(most, sum(held) + prefilling + max(held, default=0))
        return most


def row_bytes(cost: wire.CacheCost, length: int) -> int:
    """Cache bytes of one row of a lane this long, on one stage."""
    padded = -(-length // GROWTH_TOKENS) * GROWTH_TOKENS
    windowed = min(padded, cost.window_tokens)
    return cost.fixed_bytes + cost.bytes_per_token * padded + cost.window_bytes_per_token * windowed

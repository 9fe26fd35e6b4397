"""What a request costs the caches of a ring's stages, as the ring's head charges it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from parallax.proto import wire_pb2 as wire

GROWTH_TOKENS = 256  # caches grow by this many tokens (mlx-lm's KVCache.step)


def row_bytes(costs: Sequence[wire.CacheCost]) -> Callable[[int], int]:
    """What one sequence of so many tokens costs the dearest of these stages' caches.

    As a ring's head charges it (`node/budget.py`), padding to its lane's longest left out.
    """
    plain = [
        (c.fixed_bytes, c.bytes_per_token, c.window_bytes_per_token, c.window_tokens) for c in costs
    ]

    def cost(tokens: int) -> int:
        padded = -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS
        rows = (
            fixed + each * padded + windowed * min(padded, window)
            for fixed, each, windowed, window in plain
        )
        return max(rows, default=0)

    return cost

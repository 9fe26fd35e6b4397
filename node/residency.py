"""Memory that stays where it is while a node computes, on GPUs that share it with the system."""

from __future__ import annotations

import logging

import mlx.core as mx

from parallax.node.facts import DeviceInfo

log = logging.getLogger(__name__)

CACHE_SHARE = 16  # of the budget's bytes, one in so many for buffers that MLX keeps for later
LEAST_CACHE_BYTES = 256 << 20


def keep_resident(info: DeviceInfo, budget_bytes: int) -> None:
    """Has the system keep wired whatever MLX holds, and bounds what MLX keeps without using it.

    Without a wired limit macOS may compress or move weights between two steps, which costs large
    models most of their speed: a 70B model on an M2 Ultra makes 0.23 tokens a second with the
    limit at 0, MLX's default, and 4.7 with one (measured in ml-explore/mlx-examples#1061). The
    limit is a cap, not a reservation: only buffers that exist are wired, MLX's cache included.

    Elsewhere there is no such limit, and nothing is done. On the MLX thread, before weights are
    read.

    Args:
        info: what ``mx.device_info()`` tells.
        budget_bytes: what this node may hold, as :func:`parallax.node.facts.budget` has it.
    """
    recommended = info.get("max_recommended_working_set_size")
    if not recommended:
        return
    mx.set_wired_limit(int(recommended))  # more is an error
    mx.set_cache_limit(max(LEAST_CACHE_BYTES, budget_bytes // CACHE_SHARE))
    log.debug("Up to %d bytes stay wired", int(recommended))

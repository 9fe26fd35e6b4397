"""Bounds on the memory that MLX holds. Whether macOS keeps it wired, only a Mac can show."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from parallax.node.residency import LEAST_CACHE_BYTES, keep_resident

BEFORE = 123 << 20


@pytest.fixture(autouse=True)
def cache_limit() -> Iterator[None]:
    """A limit that can be told from others; afterwards the one that was there."""
    kept = mx.set_cache_limit(BEFORE)
    yield
    mx.set_cache_limit(kept)


def limit() -> int:
    """The limit on MLX's cache, in bytes."""
    now = mx.set_cache_limit(0)
    mx.set_cache_limit(now)
    return now


def test_where_memory_can_be_wired_the_cache_is_a_small_share_of_the_budget() -> None:
    keep_resident({"max_recommended_working_set_size": 96 << 30}, 80 << 30)
    assert limit() == 5 << 30


def test_a_small_budget_leaves_room_for_what_one_step_uses_again_in_the_next() -> None:
    keep_resident({"max_recommended_working_set_size": 8 << 30}, 1 << 30)
    assert limit() == LEAST_CACHE_BYTES


def test_elsewhere_nothing_is_bounded_anew() -> None:
    keep_resident(mx.device_info() if not mx.metal.is_available() else {}, 80 << 30)
    assert limit() == BEFORE

"""Sizes of chunks, in rings whose stages take exact times."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

import pytest

from parallax.node.chunk_sizes import FRESH_CHUNKS, ChunkSizes

SIZES = (32, 16, 8)
TOKEN_S = 0.002


def through(stages: int, fixed: float, share: float, chunks: list[int]) -> float:
    """When the last of these chunks leaves the ring; the last stage takes ``share`` of a time."""
    free_at = [0.0] * stages
    for tokens in chunks:
        at = 0.0
        for stage in range(stages):
            last = stage == stages - 1 and stages > 1
            seconds = TOKEN_S * (fixed + tokens) * (share if last else 1.0)
            at = free_at[stage] = max(at, free_at[stage]) + seconds
    return free_at[-1]


def learned(stages: int, fixed: float, share: float) -> ChunkSizes:
    """Sizes after some prompts in such a ring."""
    sizes = ChunkSizes(stages, SIZES)
    for tokens in (*repeat(32, 20), *repeat(16, 20), *repeat(8, 20)):
        seconds = TOKEN_S * (fixed + tokens)
        sizes.measured(tokens, seconds, seconds * (share if stages > 1 else 1.0))
    return sizes


def cut(prompt: int, size: Callable[[int], int]) -> list[int]:
    """The chunks of a prompt."""
    chunks: list[int] = []
    while left := prompt - sum(chunks):
        here = prompt - left
        grid = size(left)
        chunks.append(min(left, grid - here % grid))
    return chunks


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("fixed", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("share", [0.7, 0.8, 0.9, 1.0])
def test_no_size_alone_would_be_much_quicker(stages: int, fixed: float, share: float) -> None:
    for prompt, more in ((40, 1.1), (128, 1.05), (512, 1.03), (1000, 1.02), (2048, 1.02)):
        sizes = learned(stages, fixed, share)
        ours = through(stages, fixed, share, cut(prompt, sizes.next))
        each = [
            through(stages, fixed, share, cut(prompt, lambda _, size=size: size)) for size in SIZES
        ]
        assert ours <= more * min(each), (prompt, ours, each)


def test_a_last_stage_that_is_quicker_drains_with_small_chunks() -> None:
    sizes = learned(2, 0.8, 0.81)
    chunks = cut(512, sizes.next)
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] == 32
    assert chunks[-1] == 8
    whole = through(2, 0.8, 0.81, [32] * 16)
    assert through(2, 0.8, 0.81, chunks) < 0.98 * whole


def test_many_stages_fill_with_small_chunks() -> None:
    chunks = cut(512, learned(6, 0.8, 1.0).next)
    assert chunks[0] < 32
    assert through(6, 0.8, 1.0, chunks) < 0.92 * through(6, 0.8, 1.0, [32] * 16)


def test_one_stage_takes_the_largest() -> None:
    assert cut(100, learned(1, 1.0, 1.0).next) == [32, 32, 32, 4]


def test_prompts_that_wait_behind_are_no_end() -> None:
    sizes = learned(2, 0.8, 0.81)
    assert sizes.next(40 + 2000) == 32
    assert sizes.next(40) < 32


def test_what_cannot_have_been_measured_changes_nothing() -> None:
    sizes = ChunkSizes(2, SIZES)
    for slowest_s, last_s in ((0.0, 0.0), (1.0, 2.0), (1.0, -1.0), (float("nan"), 0.5)):
        sizes.measured(16, slowest_s, last_s)
    sizes.measured(31, 0.001, 0.0001)
    assert cut(2048, sizes.next) == cut(2048, ChunkSizes(2, SIZES).next)


def test_where_there_is_one_size_it_is_taken() -> None:
    assert cut(100, ChunkSizes(4, (32,)).next) == [32, 32, 32, 4]


def test_a_chunk_that_was_late_changes_nothing() -> None:
    sizes = learned(2, 4.0, 0.9)
    before = sizes.fixed_tokens
    late_s = 50 * TOKEN_S * (4.0 + 32)
    for _ in range(4):  # until what is known is worked out anew
        sizes.measured(32, late_s, late_s)
    assert sizes.fixed_tokens == pytest.approx(before)


def test_a_size_that_is_not_sent_any_more_does_not_count_for_ever() -> None:
    sizes = ChunkSizes(2, SIZES)
    for tokens, seconds in ((32, 0.9), (16, 0.04), (8, 0.024)):
        for _ in range(9):
            sizes.measured(tokens, seconds, seconds)
    assert sizes.fixed_tokens < 1, "the largest was slow: the machine slept"
    for _ in range(FRESH_CHUNKS // 2):
        sizes.measured(16, 0.04, 0.04)
        sizes.measured(8, 0.024, 0.024)
    assert sizes.fixed_tokens == pytest.approx(4.0)
    assert not sizes.doubtful

"""What caches are charged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from parallax.node.budget import Budget
from parallax.node.lanes import Lanes
from parallax.node.mlx_lm_seam import Caches
from parallax.proto import wire_pb2 as wire
from tests.node.rings import TEXTS, load_stages

DENSE = wire.CacheCost(bytes_per_token=2, fixed_bytes=5)
WINDOW = wire.CacheCost(window_bytes_per_token=3, window_tokens=100)


def test_rows_are_charged_by_padded_length_with_a_copy_of_the_largest_lane() -> None:
    budget = Budget(0, 32, [DENSE])
    row = 5 + 2 * 512
    merged = row + 2 * 255  # caches that are merged grow from any length
    assert budget.charge([(3, 257), (1, 10)], []) == 3 * merged + (5 + 512) + 3 * merged
    assert budget.charge([], [257, 10]) == row + 5 + 512
    assert budget.charge([], []) == 0


def test_the_dearest_stage_counts_with_what_is_kept_there() -> None:
    budget = Budget(0, 32, [DENSE, wire.CacheCost(bytes_per_token=3)])
    assert budget.charge([(1, 256)], []) == 2 * 3 * 256
    assert budget.charge([(1, 256)], [], [1000, 0]) == 2 * (5 + 512) + 1000
    assert budget.kept(300) == [5 + 2 * 512, 3 * 512]


def test_a_window_holds_a_chunk_more_until_its_row_is_in_a_lane() -> None:
    budget = Budget(0, 32, [WINDOW])
    assert budget.charge([(1, 1000)], []) == 2 * 3 * 100
    assert budget.charge([], [1000]) == 3 * 132
    assert budget.kept(1000) == [3 * 132], "kept as it was prefilled"


@pytest.mark.parametrize("length", [200, 239, 255, 256, 257])
def test_rows_that_are_merged_at_any_length_take_no_more_than_is_charged(length: int) -> None:
    budget = Budget(0, 32, [wire.CacheCost(bytes_per_token=16)])
    alone = [KVCache(), KVCache()]
    for cache in alone:
        rows = mx.zeros((1, 1, length, 2))
        cache.update_and_fetch(rows, rows)
    lane = alone[0].merge(alone)
    for longest in range(length + 1, length + 600):
        rows = mx.zeros((2, 1, 1, 2))
        lane.update_and_fetch(rows, rows)
        assert lane.nbytes <= budget.charge([(2, longest)], []) // 2


@pytest.mark.parametrize("kind", ["qwen3", "llama_sliding", "gemma3_text", "mamba2", "qwen3_next"])
def test_no_cache_of_a_real_stage_takes_more_than_is_charged(
    kind: str, model_of: Callable[[str], Path], verdicts: Path
) -> None:
    text, grid = TEXTS[0], 16  # twice the window
    (stage,) = load_stages(model_of(kind), [], verdicts)
    budget = Budget(0, grid, [stage.cache_cost()])
    lanes = Lanes(stage)

    def forward(caches: Caches, tokens: mx.array) -> None:
        stage.forward(tokens, None, caches, head=False)
        mx.eval([cache.state for cache in caches])

    for sequence, length in ((1, 48), (2, 30)):
        for start in range(0, length, grid):
            chunk = text[start : min(length, start + grid)]
            forward(lanes.prefill(sequence, len(chunk)), mx.array([chunk], mx.uint32))
            alone = lanes.nbytes
            assert 0 < alone <= budget.charge([], [length])
        lanes.retain(sequence, sequence)
        assert lanes.nbytes - alone <= budget.kept(length)[0]
        lanes.evict(sequence)
        lanes.admit(sequence, sequence)  # each in a lane of its own
        forward(lanes.decode(sequence, 1, 1).caches, mx.array([[5]], mx.uint32))
        assert lanes.nbytes <= budget.charge([(1, length + 1)], [])
        lanes.drop(sequence)
    for sequence in (3, 4):
        forward(lanes.prefill(sequence, grid), mx.array([text[:grid]], mx.uint32))
        lanes.admit(sequence, 0)
    forward(lanes.decode(0, 2, 1).caches, mx.array([[5], [6]], mx.uint32))
    assert lanes.nbytes <= budget.charge([(2, grid + 1)], [])

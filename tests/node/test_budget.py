"""What caches are charged."""

from __future__ import annotations

from parallax.node.budget import Budget
from parallax.proto import wire_pb2 as wire

DENSE = wire.CacheCost(bytes_per_token=2, fixed_bytes=5)
WINDOW = wire.CacheCost(window_bytes_per_token=3, window_tokens=100)


def test_rows_are_charged_by_padded_length_with_a_copy_of_the_largest_lane() -> None:
    budget = Budget(0, 32, [DENSE])
    row = 5 + 2 * 512
    assert budget.charge([(3, 257), (1, 10)], []) == 3 * row + (5 + 512) + 3 * row
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
